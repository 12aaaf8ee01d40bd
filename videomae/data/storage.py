"""Bytes of local files and of objects behind fsspec's URLs (s3://, gs://, https://, memory://, ...), by range.

A path with "://" is a URL, any other a local file. Ranges of objects can be kept in a cache of bounded size on a local
disk, shared by all processes of a machine. An object must not change while it is read: a change is noticed by the next
process that opens it.
"""

import fcntl
import os
import threading
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kernels.launch import check

BLOCK = 256 * 1024  # bytes, aligned in the object: what the cache keeps, and the least it fetches

_T = TypeVar("_T")
_PAUSES = (0.2, 1.0)  # seconds before the second and the third try of a request
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_FILE = "file://"


def is_url(path: str) -> bool:
    return "://" in path


def join(base: str, name: str) -> str:
    """The name inside a folder or under a URL."""
    return base + name if not base or base.endswith("/") else f"{base}/{name}"


def read_range(path: str, offset: int, size: int) -> bytes:
    """size bytes from offset on; fewer at the end of the file, none behind it.

    Raises FileNotFoundError when there is no such thing, OSError when it cannot be read (a URL: after three tries),
    ValueError when a package for this kind of URL is missing.
    """
    check(offset >= 0 and size >= 0, f"offset and size must not be negative; got {offset} and {size} for {path}")
    if (local := _local(path)) is not None:
        return _open_files.read(local, offset, size)
    end = min(offset + size, _object(path).size)
    if offset >= end:
        return b""
    return _fetch(path, offset, end) if _cache is None else _read_blocks(_cache, path, offset, end)


def read_text(path: str) -> str:
    """A whole file as UTF-8 text, never from the cache; errors as in read_range, and UnicodeDecodeError."""
    if (local := _local(path)) is not None:
        return Path(local).read_text(encoding="utf-8")
    filesystem, name = _filesystem(path)
    return _patiently(path, lambda: filesystem.cat_file(name)).decode("utf-8")


def size_of(path: str) -> int | None:
    """Bytes of a file, looked up anew; None when there is no such file. Errors as in read_range."""
    if (local := _local(path)) is not None:
        return os.stat(local).st_size if os.path.isfile(local) else None
    _objects.pop(path, None)
    try:
        return _object(path).size
    except (FileNotFoundError, IsADirectoryError):
        return None


def exists(path: str) -> bool:
    """Whether there is such a file; errors as in read_range."""
    return size_of(path) is not None


def _local(path: str) -> str | None:
    """The name of a local file; None for what fsspec must read."""
    if path.startswith(_FILE):
        return path[len(_FILE) :]
    return None if is_url(path) else path


@dataclass(frozen=True)
class _OpenFile:
    fd: int
    identity: tuple[int, int]  # device and inode

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


class _OpenFiles:
    """Local files kept open, the last used ones; safe in threads: one that is let go closes after its last reader."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        # asked for each time (2 us): a file that was replaced is opened again, one that was removed is missing
        found = os.stat(path)
        file = self._get(path, (found.st_dev, found.st_ino))
        size = min(size, found.st_size - offset)  # pread makes room for all that it is asked for
        parts: list[bytes] = []
        try:
            # one pread gives at most 2 GiB, and a network's disk may give less than was asked for
            while size > 0 and (part := os.pread(file.fd, size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        except OSError:
            with self._lock:  # a stale handle of a network's disk, for one: the next read opens the file again
                self._files.pop(path, None)
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _get(self, path: str, identity: tuple[int, int]) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None or file.identity != identity:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                opened = os.fstat(fd)
                file = self._files[path] = _OpenFile(fd, (opened.st_dev, opened.st_ino))
            self._files.move_to_end(path)
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        return file


_open_files = _OpenFiles(limit=128)


class _Object(NamedTuple):
    """What is known of the object behind a URL."""

    size: int
    identity: str  # of this version of it


_objects: dict[str, _Object] = {}  # by URL: looked up once a process
_OBJECTS_LIMIT = 65536
# what filesystems call an object's version; any of them tells a changed one
_VERSIONS = "ETag etag Content-MD5 md5Hash generation LastModified Last-Modified last_modified mtime updated created"


def _object(url: str) -> _Object:
    """Raises FileNotFoundError, IsADirectoryError, and what read_range raises."""
    if (known := _objects.get(url)) is not None:
        return known
    filesystem, name = _filesystem(url)
    info = _patiently(url, lambda: filesystem.info(name))
    if info.get("type") == "directory":
        raise IsADirectoryError(f"{url}: a folder")
    if info.get("size") is None:
        raise OSError(f"{url}: its server does not say how large it is")
    if len(_objects) >= _OBJECTS_LIMIT:
        _objects.clear()
    versions = [f"{key}={info[key]}" for key in _VERSIONS.split() if info.get(key) is not None]
    found = _objects[url] = _Object(int(info["size"]), " ".join([str(info["size"]), *versions]))
    return found


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL (one a process and kind) and the object's name in it."""
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # 90 ms, and only where URLs are read
    except ImportError as error:
        raise ValueError(f"{url} is read by fsspec, which is missing: pip install fsspec") from error
    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'videomae-engine[{extra}]'" if extra else "install it with pip"
        raise ValueError(f"reading {url} needs a package that is missing ({error}): {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{url}: fsspec cannot read this kind of URL: {error}") from error


def _patiently(url: str, call: Callable[[], _T]) -> _T:
    """The call's result; it is tried three times, unless the object is missing or may not be read."""
    for pause in (*_PAUSES, None):
        try:
            return call()
        # every client library raises errors of its own (botocore, aiohttp, google-auth, ...), whose types cannot be
        # named without importing it; they are not hidden: after the last try one goes on as the OSError's cause
        except Exception as error:
            if isinstance(error, FileNotFoundError) and not _is_passing(error):
                raise FileNotFoundError(f"{url}: no such object") from error
            if isinstance(error, PermissionError | IsADirectoryError):
                raise
            if pause is None:
                reason = error.__cause__ if isinstance(error, FileNotFoundError) else error
                raise OSError(f"{url}: {type(reason).__name__}: {reason}") from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _is_passing(error: FileNotFoundError) -> bool:
    """fsspec's http calls whatever goes wrong with a look-up, a timeout or a 503, a missing file."""
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        return False
    of_network = isinstance(cause, OSError) or type(cause).__module__.split(".")[0] in ("aiohttp", "asyncio")
    return of_network and getattr(cause, "status", None) not in (404, 410)


def _fetch(url: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of an object, which lie inside it, in one request."""
    filesystem, name = _filesystem(url)

    def request() -> bytes:
        data = filesystem.cat_file(name, start=start, end=end)
        if len(data) != end - start:
            raise OSError(
                f"{end - start} bytes were asked for and {len(data)} came: the object changed, the connection broke, "
                "or the server knows no ranges"
            )
        return data

    try:
        return _patiently(url, request)
    except OSError:
        _objects.pop(url, None)
        raise


@dataclass(frozen=True)
class CacheConfig:
    """Where blocks of objects are kept, and at most how many gigabytes (1e9 bytes) of them."""

    folder: str
    gigabytes: float

    def __post_init__(self) -> None:
        check(bool(self.folder), "the cache needs a folder")
        check(self.gigabytes * 1e9 >= 16 * BLOCK, f"the cache needs at least 0.005 gigabytes; got {self.gigabytes:g}")


_cache: "Cache | None" = None


def configure(cache: CacheConfig | None) -> None:
    """Let this process read URLs through a cache, or without one.

    Raises ValueError when its folder cannot be made or written.
    """
    global _cache
    _cache = None if cache is None else Cache(cache.folder, int(cache.gigabytes * 1e9))


def _read_blocks(cache: "Cache", url: str, offset: int, end: int) -> bytes:
    """The bytes [offset, end) of an object, which lie inside it: blocks from the cache, the missing ones fetched,
    neighbours together."""
    size, identity = _object(url)
    version = sha256(f"{url}\n{identity}".encode()).hexdigest()
    numbers = range(offset // BLOCK, (end - 1) // BLOCK + 1)
    blocks: dict[int, bytes] = {}
    for n in numbers:
        if (block := cache.get(f"{version}-{n:x}", min(BLOCK, size - n * BLOCK))) is not None:
            blocks[n] = block
    for first, last in _runs([n for n in numbers if n not in blocks]):
        data = _fetch(url, first * BLOCK, min((last + 1) * BLOCK, size))
        for n in range(first, last + 1):
            blocks[n] = data[(n - first) * BLOCK : (n - first + 1) * BLOCK]
            cache.put(f"{version}-{n:x}", blocks[n])
    start = numbers[0] * BLOCK
    return b"".join(blocks[n] for n in numbers)[offset - start : end - start]


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbours among ascending numbers."""
    for i, n in enumerate(numbers):
        if i == 0 or numbers[i - 1] != n - 1:
            first = n
        if i == len(numbers) - 1 or numbers[i + 1] != n + 1:
            yield first, n


class Cache:
    """Blocks in files under a folder, at most limit_bytes of them; several processes may share the folder.

    A block is written under a lock and renamed into place, so the bound holds however many write; reading takes no
    lock. The lock's file holds the ledger: bytes held, and bytes written since the folder was last listed. A block ends
    in its CRC-32 (0.04 ms to check): after a power cut a file can have the right length and the wrong bytes.
    """

    _FRESH = 60.0  # seconds for which a block that was used is not marked as used again
    _CRC = 4  # bytes

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        """Raises ValueError when the folder cannot be made or written, or the limit is below 16 blocks."""
        check(limit_bytes >= 16 * BLOCK, f"the cache needs room for 16 blocks, {16 * BLOCK} bytes; got {limit_bytes}")
        self._limit = limit_bytes
        try:
            self._folder = Path(folder).expanduser()
            with self._ledger() as ledger:
                self._make_room(ledger, 0)
        except (OSError, RuntimeError) as error:  # the latter of a user without a home
            raise ValueError(f"the cache folder {folder} cannot be used: {error}") from error

    def get(self, name: str, size: int) -> bytes | None:
        """A block of size bytes, or None when it is not there or damaged; it counts as used now."""
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.readall()
                if time.time() - os.fstat(file.fileno()).st_mtime > self._FRESH:
                    with suppress(OSError):  # another user's block, or a file evicted meanwhile
                        os.utime(path)
        except OSError:
            return None
        block = data[: -self._CRC]
        if len(block) == size and zlib.crc32(block) == int.from_bytes(data[-self._CRC :], "big"):
            return block
        with suppress(OSError):
            path.unlink()
        return None

    def put(self, name: str, block: bytes) -> None:
        """Keep a block, and let the least recently used go, down to 90 % of the limit, when it does not fit.

        A disk that cannot take it is a warning: the block is in hand, only the next reader fetches it again.
        """
        path = self._path(name)
        data = block + zlib.crc32(block).to_bytes(self._CRC, "big")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._ledger() as ledger:
                if not path.exists():  # else another process fetched it too
                    self._make_room(ledger, len(data))
                    _write_renamed(path, data)
        except OSError as error:
            reason = error.strerror or str(error)
            warnings.warn(f"the cache {self._folder} takes no more blocks: {reason}", stacklevel=2)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.block"

    @contextmanager
    def _ledger(self) -> Iterator[int]:
        """The open ledger, held by nobody else in any process or thread."""
        self._folder.mkdir(parents=True, exist_ok=True)
        ledger = os.open(self._folder / "ledger", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(ledger, fcntl.LOCK_EX)
            yield ledger
        finally:
            os.close(ledger)

    def _make_room(self, ledger: int, room: int) -> None:
        """Enter room bytes, which are about to be written, after evicting what must go for them."""
        try:
            held, written = (int(word) for word in os.pread(ledger, 100, 0).split())
        except ValueError:  # a new folder, or a power cut
            held, written = self._limit, 0
        held, written = held + room, written + room
        # the folder is also listed now and then, since the ledger is wrong after a kill or a removal by hand
        if held > self._limit or written > self._limit / 20:
            held, written = self._evict(room), room
        os.pwrite(ledger, f"{held:20d} {written:20d}\n".encode(), 0)

    def _evict(self, room: int) -> int:
        """Bytes held, with room for room more; only files that a cache wrote are ever removed."""
        blocks = []
        for folder in os.scandir(self._folder):
            if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder.path):
                    with suppress(FileNotFoundError):  # a damaged block that its reader removed
                        if entry.name.endswith(".block"):
                            found = entry.stat(follow_symlinks=False)
                            blocks.append((found.st_mtime_ns, found.st_size, entry.path))
                        elif entry.name.endswith(".part"):  # its writer was killed: writing happens under this lock
                            os.unlink(entry.path)
        held = room + sum(size for _, size, _ in blocks)
        if held > self._limit:
            for _, size, path in sorted(blocks):
                if held <= 0.9 * self._limit:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                held -= size
        return held


def _write_renamed(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
