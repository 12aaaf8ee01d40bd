"""Ranges of files and objects: their ends, what is missing or fails, and a cache that is right, bounded, shared."""

import multiprocessing
import os
import pickle
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from videomae.data import storage
from videomae.data.storage import BLOCK, Cache, CacheConfig, read_range, read_text, size_of

LIMIT = 16 * BLOCK
CONTENT = random.Random(0).randbytes(3 * BLOCK + 1000)


class RemoteFileSystem(MemoryFileSystem):
    """Keeps its objects in memory, lists the requests made, and fails as often as it is told to."""

    protocol = "remote"
    requests: list[tuple[int, int]] = []
    failures: list[Exception] = []
    lookups = 0

    def info(self, path, **kwargs):
        type(self).lookups += 1
        return super().info(path, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.requests.append((start, end))
        if self.failures:
            raise self.failures.pop(0)
        return super().cat_file(path, start, end, **kwargs)


fsspec.register_implementation("remote", RemoteFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    forget()
    RemoteFileSystem.failures.clear()
    monkeypatch.setattr(storage, "_PAUSES", (0.01, 0.02))
    yield
    storage.configure(None)
    fsspec.filesystem("remote").store.clear()


@pytest.fixture
def url():
    fsspec.filesystem("remote").pipe("remote://set/a.tar", CONTENT)
    return "remote://set/a.tar"


@pytest.fixture
def folder(tmp_path):
    storage.configure(CacheConfig(str(tmp_path / "cache"), LIMIT / 1e9))
    return tmp_path / "cache"


def forget():
    """What another process would not know."""
    storage._objects.clear()
    RemoteFileSystem.requests.clear()
    RemoteFileSystem.lookups = 0


def blocks_in(folder):
    return sorted(folder.glob("??/*.block"))


def bytes_in(folder):
    """What lies in the folder, files that vanish meanwhile left out."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def test_joins_names_to_folders_and_urls():
    assert storage.join("/data/set", "a/b") == "/data/set/a/b"
    assert storage.join("s3://bucket/set/", "a") == "s3://bucket/set/a"
    assert storage.join("memory://", "a") == "memory://a"
    assert storage.join("", "a") == "a"
    assert storage.is_url("s3://bucket/a")
    assert not storage.is_url("/data/set/shard-00000.tar::a/b@512")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["path", "file", "remote"])
def test_reads_ranges_up_to_the_end(kind, cached, tmp_path, url, request):
    if kind in ("path", "file"):
        (tmp_path / "a.tar").write_bytes(CONTENT)
        url = str(tmp_path / "a.tar") if kind == "path" else f"file://{tmp_path}/a.tar"
    folder = request.getfixturevalue("folder") if cached else tmp_path
    size = len(CONTENT)
    for offset, count in [(0, 1), (0, size), (5, 10**12), (BLOCK - 1, 2), (BLOCK, BLOCK), (size - 3, 10), (77, 0)]:
        assert read_range(url, offset, count) == CONTENT[offset : offset + count], (offset, count)
    assert read_range(url, size, 1) == read_range(url, size + BLOCK, 1) == b""
    assert size_of(url) == size
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        read_range(url, -1, 1)
    assert bool(blocks_in(folder)) == (cached and kind == "remote")  # local files need no cache


@pytest.mark.parametrize("base", ["{}", "file://{}", "remote://set", "memory://set"])
def test_what_is_missing_is_told_from_what_fails(base, tmp_path):
    (tmp_path / "inside").mkdir()
    missing = storage.join(base.format(tmp_path), "none.tar")
    assert size_of(missing) is None
    assert not storage.exists(missing)
    for read in (partial(read_range, missing, 0, 1), partial(read_text, missing)):
        with pytest.raises(FileNotFoundError, match=re.escape(missing.removeprefix("file://"))):
            read()


def test_a_folder_has_no_size_and_no_bytes(tmp_path, url):
    for folder in (str(tmp_path), "remote://set"):
        assert size_of(folder) is None
        with pytest.raises(IsADirectoryError):
            read_range(folder, 0, 1)


def test_reads_text(tmp_path):
    (tmp_path / "a.json").write_text("fünf\n", encoding="utf-8")
    fsspec.filesystem("memory").pipe("/set/a.json", "fünf\n".encode())
    for path in (str(tmp_path / "a.json"), f"file://{tmp_path}/a.json", "memory://set/a.json"):
        assert read_text(path) == "fünf\n"
        assert size_of(path) == 6


def test_a_file_replaced_or_removed_while_open_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"old")
    assert read_range(str(path), 0, 3) == b"old"
    (tmp_path / "b").write_bytes(b"newer")
    os.replace(tmp_path / "b", path)
    assert read_range(str(path), 0, 9) == b"newer"
    with open(path, "ab") as file:
        file.write(b" still")
    assert read_range(str(path), 0, 99) == b"newer still"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_range(str(path), 0, 1)


def test_only_the_last_used_files_stay_open(tmp_path):
    for i in range(300):
        (tmp_path / str(i)).write_bytes(bytes([i % 256]))
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        assert all(read_range(str(tmp_path / str(i)), 0, 1) == bytes([i % 256]) for i in range(300))
    assert len(os.listdir("/dev/fd")) - before <= 128


def test_threads_may_read_while_files_are_closed(tmp_path):
    for i in range(200):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 4096)

    def all_are_right(seed):
        draws = random.Random(seed).choices(range(200), k=1000)
        return all(read_range(str(tmp_path / str(i)), 0, 4096) == bytes([i]) * 4096 for i in draws)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(all_are_right, range(4)))


class ThrottledError(Exception):
    pass


def test_a_passing_error_is_tried_three_times(url):
    RemoteFileSystem.failures[:] = [ConnectionResetError("reset"), TimeoutError("slow")]
    assert read_range(url, 0, 10) == CONTENT[:10]
    assert len(RemoteFileSystem.requests) == 3
    # a client library's own error, of a type that nobody here knows
    RemoteFileSystem.failures[:] = [ThrottledError("slow down")] * 3
    with pytest.raises(OSError, match="remote://set/a.tar: ThrottledError: slow down") as caught:
        read_range(url, 0, 10)
    assert isinstance(caught.value.__cause__, ThrottledError)
    assert len(RemoteFileSystem.requests) == 6


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("not yours")])
def test_what_will_not_pass_is_not_tried_again(url, error):
    RemoteFileSystem.failures[:] = [error]
    with pytest.raises(type(error)):
        read_range(url, 0, 10)
    assert len(RemoteFileSystem.requests) == 1


def test_an_object_that_shrank_is_an_error_and_then_looked_up_again(url):
    assert read_range(url, 0, 10) == CONTENT[:10]
    fsspec.filesystem("remote").pipe(url, b"short")
    with pytest.raises(OSError, match="10 bytes were asked for and 5 came"):
        read_range(url, 0, 10)
    assert read_range(url, 0, 10) == b"short"


@pytest.mark.parametrize(
    ("url", "package", "remedy"),
    [
        ("s3://bucket/a", "s3fs", "pip install 'videomae-engine[s3]'"),
        ("gs://bucket/a", "gcsfs", "pip install 'videomae-engine[gcs]'"),
        ("https://host/a", "aiohttp", "pip install 'videomae-engine[http]'"),
        ("memory://set/a", "fsspec.core", "pip install fsspec"),
        ("nowhere://a", "s3fs", "nowhere://a: fsspec cannot read this kind of URL"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, url, package, remedy):
    # None in sys.modules is how Python marks a module that cannot be imported
    monkeypatch.setitem(sys.modules, package, None)
    # and fsspec keeps what an earlier test made it import
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition("://")[0], raising=False)
    with pytest.raises(ValueError, match=re.escape(remedy)):
        read_range(url, 0, 1)


def test_cached_blocks_are_not_fetched_again_and_neighbours_come_in_one_request(url, folder):
    assert read_range(url, BLOCK + 10, 100) == CONTENT[BLOCK + 10 : BLOCK + 110]
    assert RemoteFileSystem.requests == [(BLOCK, 2 * BLOCK)]
    assert read_range(url, 0, len(CONTENT)) == CONTENT
    assert RemoteFileSystem.requests[1:] == [(0, BLOCK), (2 * BLOCK, len(CONTENT))]
    assert read_range(url, 7, len(CONTENT)) == CONTENT[7:]
    assert len(RemoteFileSystem.requests) == 3
    assert RemoteFileSystem.lookups == 1
    forget()  # another process
    assert read_range(url, 0, len(CONTENT)) == CONTENT
    assert RemoteFileSystem.requests == []


def test_a_changed_object_is_not_served_stale(url, folder):
    assert read_range(url, 0, 10) == CONTENT[:10]
    forget()
    changed = bytes(reversed(CONTENT))  # of the same size
    fsspec.filesystem("remote").pipe(url, changed)
    assert read_range(url, 0, 10) == changed[:10]
    fsspec.filesystem("remote").pipe(url, b"other")
    assert size_of(url) == 5  # looked up anew
    assert read_range(url, 0, 10) == b"other"


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "longer"])
def test_a_damaged_block_is_fetched_again(url, folder, damage):
    read_range(url, 0, 10)
    (block,) = blocks_in(folder)
    good = block.read_bytes()
    block.write_bytes({"cut": good[:1000], "empty": b"", "zeros": bytes(len(good)), "longer": good + b"x"}[damage])
    assert read_range(url, 0, 10) == CONTENT[:10]
    assert len(RemoteFileSystem.requests) == 2
    assert block.read_bytes() == good
    assert read_range(url, 0, 10) == CONTENT[:10]
    assert len(RemoteFileSystem.requests) == 2


def test_the_least_recently_used_blocks_go_first(tmp_path):
    cache = Cache(tmp_path, LIMIT)
    for i in range(15):  # with their checksums, 16 blocks are past the limit
        cache.put(f"{i:04x}", bytes([i]) * BLOCK)
    for i in range(15):
        os.utime(tmp_path / "00" / f"{i:04x}.block", (1000 + i, 1000 + i))
    assert cache.get("0000", BLOCK) == bytes(BLOCK)  # used now
    assert (tmp_path / "00" / "0000.block").stat().st_mtime > time.time() - 60
    os.utime(tmp_path / "00" / "0000.block", (2**30, time.time() - 30))
    marked = (tmp_path / "00" / "0000.block").stat().st_mtime
    assert cache.get("0000", BLOCK) == bytes(BLOCK)
    assert (tmp_path / "00" / "0000.block").stat().st_mtime == marked  # a moment ago is not marked again
    cache.put("000f", bytes(BLOCK))
    left = {path.stem for path in blocks_in(tmp_path)}
    assert left == {"0000", "000f", *(f"{i:04x}" for i in range(3, 15))}  # down to 90 %: 14 blocks of 16
    assert cache.get("0001", BLOCK) is None


def test_a_smaller_limit_is_met_at_the_start_and_foreign_files_stay(tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "thesis.txt").write_text("mine")
    (tmp_path / "ab" / "killed.part").write_bytes(bytes(BLOCK))
    cache = Cache(tmp_path, 2 * LIMIT)
    for i in range(30):
        cache.put(f"{i:04x}", bytes(BLOCK))
    Cache(tmp_path, LIMIT)
    assert bytes_in(tmp_path) <= LIMIT
    assert len(blocks_in(tmp_path)) == 14
    assert (tmp_path / "ab" / "thesis.txt").exists()
    assert not (tmp_path / "ab" / "killed.part").exists()


@pytest.mark.parametrize("ledger", [b"", b"\0" * 42, b"garbage"])
def test_a_lost_ledger_is_made_again_from_the_folder(tmp_path, ledger):
    cache = Cache(tmp_path, LIMIT)
    for i in range(12):
        cache.put(f"{i:04x}", bytes(BLOCK))
    (tmp_path / "ledger").write_bytes(ledger)
    for i in range(12, 40):
        cache.put(f"{i:04x}", bytes(BLOCK))
        assert bytes_in(tmp_path) <= LIMIT + 100


def test_the_folder_is_listed_seldom(tmp_path, monkeypatch):
    cache = Cache(tmp_path, 4000 * 5000)
    listed = []
    evict = Cache._evict
    monkeypatch.setattr(Cache, "_evict", lambda self, room: listed.append(room) or evict(self, room))
    for i in range(1000):
        cache.put(f"{i:04x}", bytes(4996))
    assert 3 <= len(listed) <= 5  # once each twentieth of the limit: after 200 blocks


def test_a_disk_that_takes_no_block_is_a_warning(url, folder):
    # a folder where the block's file would be renamed to: writing fails for root too
    Cache.put(storage._cache, "ab", b"x")
    (folder / "ledger").unlink()
    (folder / "ledger").mkdir()
    with pytest.warns(UserWarning, match="takes no more blocks: Is a directory"):
        assert read_range(url, 0, 10) == CONTENT[:10]


def test_a_folder_removed_under_way_is_made_again(url, folder):
    read_range(url, 0, 10)
    for block in blocks_in(folder):
        block.unlink()
        block.parent.rmdir()
    (folder / "ledger").unlink()
    folder.rmdir()
    assert read_range(url, 0, 10) == CONTENT[:10]
    assert len(blocks_in(folder)) == 1


def test_the_cache_may_lie_in_the_home_folder(url, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.configure(CacheConfig("~/cache", 0.01))
    read_range(url, 0, 10)
    assert len(blocks_in(tmp_path / "cache")) == 1


def test_refuses_a_cache_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache folder .* cannot be used"):
        storage.configure(CacheConfig(str(tmp_path / "file" / "cache"), 1.0))
    with pytest.raises(ValueError, match="cache folder ~nobody-of-this-name/cache cannot be used"):
        storage.configure(CacheConfig("~nobody-of-this-name/cache", 1.0))
    with pytest.raises(ValueError, match=r"at least 0\.005 gigabytes; got 0\.001"):
        CacheConfig(str(tmp_path), 0.001)
    with pytest.raises(ValueError, match="needs a folder"):
        CacheConfig("", 1.0)
    with pytest.raises(ValueError, match="room for 16 blocks"):
        Cache(tmp_path, LIMIT - 1)
    assert pickle.loads(pickle.dumps(CacheConfig("a", 2.5))) == CacheConfig("a", 2.5)


def work(folder, seed, rounds):
    """Read objects at random through the cache, and exit with 1 at the first wrong byte."""
    forget()
    storage.configure(CacheConfig(str(folder), LIMIT / 1e9))
    draw = random.Random(seed)
    for _ in range(rounds):
        number, offset = draw.randrange(12), draw.randrange(len(CONTENT))
        size = draw.randrange(2 * BLOCK)
        found = read_range(f"remote://set/{number}.tar", offset, size)
        if found != (CONTENT[number:] + CONTENT[:number])[offset : offset + size]:
            os._exit(1)
    os._exit(0)


def names_in(folder):
    return {path.name for path in folder.rglob("*.block")}


def test_processes_share_a_folder_and_never_pass_the_limit(tmp_path):
    # 12 objects of 3 blocks and a bit in a cache of 16 blocks: evicted all the time
    for number in range(12):
        fsspec.filesystem("remote").pipe(f"remote://set/{number}.tar", CONTENT[number:] + CONTENT[:number])
    context = multiprocessing.get_context("fork")  # a copy of the objects in memory, and no second import of torch
    workers = [context.Process(target=work, args=(tmp_path / "cache", seed, 150)) for seed in range(3)]
    for worker in workers:
        worker.start()
    most = 0
    while any(worker.is_alive() for worker in workers):
        before = names_in(tmp_path / "cache")
        size = bytes_in(tmp_path / "cache")
        # a block that went and one that came while they were counted were not there together
        if names_in(tmp_path / "cache") == before:
            most = max(most, size)
        time.sleep(0.002)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert most <= LIMIT * 1.05
    assert bytes_in(tmp_path / "cache") > LIMIT * 0.8
    assert not list(tmp_path.rglob("*.part"))
