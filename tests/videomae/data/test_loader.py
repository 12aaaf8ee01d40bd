"""The pool: the same batches whoever reads them, and clips that hang, crash or are damaged skipped by name."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.services import read_part
from tests.videos import moving_frames, write_video
from videomae.data.augment import Augment
from videomae.data.dataset import Order, Sample, find_videos
from videomae.data.loader import Loader, LoaderConfig
from videomae.data.prepare import main as prepare
from videomae.data.readers import ClipReader
from videomae.masking import tube

READER = ClipReader(frames=4, size=(16, 16), stride=1, augment=Augment(), seed=0)


@pytest.fixture
def paths(tmp_path):
    return [str(write_video(tmp_path / f"{i}.mp4", moving_frames(12, 24, 32, seed=i))) for i in range(5)]


def batches_of(count, size, num_videos=5, views=1):
    order = Order(num_videos, 0, views)
    return [order.samples(k * size, size) for k in range(count)]


def collect(paths, batches, workers, reader=READER, **options):
    size = max(map(len, batches))
    with Loader(reader, paths, batches, batch_size=size, workers=workers, **options) as loader:
        return [batch._replace(frames=batch.frames.clone()) for batch in loader]


def test_gives_the_same_batches_with_any_number_of_workers(paths):
    batches = batches_of(7, 4, views=2)
    here = collect(paths, batches, workers=0)
    assert [list(batch.samples) for batch in here] == batches
    for batch in here:
        assert batch.frames.dtype == torch.uint8
        assert batch.frames.shape == (4, 4, 16, 16, 3)
        assert batch.weight.tolist() == [1] * 4
        for frames, sample in zip(batch.frames, batch.samples, strict=True):
            assert torch.equal(frames, torch.from_numpy(READER.read(paths[sample.index], [sample])[0]))
    for workers in (1, 3):
        for got, wanted in zip(collect(paths, batches, workers), here, strict=True):
            assert torch.equal(got.frames, wanted.frames)
            assert torch.equal(got.keys, wanted.keys)
            assert got.samples == wanted.samples


@pytest.mark.long
def test_takes_batches_of_different_sizes_and_starts_anywhere(paths):
    batches = batches_of(6, 3)
    whole = collect(paths, batches, workers=1)
    part = collect(paths, [batches[4][:2], batches[5]], workers=1)
    assert torch.equal(part[0].frames, whole[4].frames[:2])
    assert torch.equal(part[1].frames, whole[5].frames)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_skips_unreadable_files_by_name_and_keeps_their_place(paths, tmp_path, workers):
    (tmp_path / "1.mp4").write_bytes(b"nothing")
    os.remove(tmp_path / "3.mp4")
    samples = [Sample(0, i, 0) for i in range(5)]
    batch = collect(paths, [samples], workers)[0]
    assert batch.weight.tolist() == [1, 0, 1, 0, 1]
    assert [(skip.sample.index, skip.path) for skip in batch.skips] == [(1, paths[1]), (3, paths[3])]
    assert "Invalid data" in batch.skips[0].reason
    assert "no such file" in batch.skips[1].reason
    assert batch.frames[1].max() == batch.frames[3].max() == 0
    assert batch.frames[2].max() > 0


@pytest.mark.long
def test_a_skipped_clip_is_zero_even_where_another_was_before(paths, tmp_path):
    os.remove(tmp_path / "3.mp4")
    batches = [[Sample(0, i, 0), Sample(0, 1, 0)] for i in (0, 0, 0, 0, 3, 3, 3)]
    got = collect(paths, batches, workers=1)
    assert got[0].frames[0].max() > 0
    assert all(batch.frames[0].max() == 0 for batch in got[4:])


@pytest.mark.long
def test_signals_to_the_whole_group_do_not_reach_the_workers(paths):
    """A scheduler's SIGTERM and a terminal's Ctrl-C go to every process of the group; clips in work must not be lost by
    it."""
    with Loader(READER, paths, batches_of(6, 4), batch_size=4, workers=2) as loader:
        stream = iter(loader)
        wait_until(lambda: len(loader.worker_pids) == 2)
        for pid in loader.worker_pids:  # perhaps still importing
            assert os.getpgid(pid) != os.getpgid(0)
        got = [next(stream)]
        for pid in loader.worker_pids:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        got += list(stream)
    assert len(got) == 6
    assert all(batch.weight.min() == 1 for batch in got)


@pytest.mark.long
def test_replaces_an_idle_worker_that_died_without_losing_a_clip(paths):
    order = Order(5, 0)
    go_on = threading.Event()

    def slow():
        yield order.samples(0, 4)
        go_on.wait()
        yield order.samples(4, 4)

    with Loader(READER, paths, slow(), batch_size=4, workers=1) as loader:
        # the manager is stuck in the generator, so it hears of the death only when it hands out the next clip
        stream = iter(loader)
        wait_until(lambda: loader.worker_pids)
        time.sleep(0.2)
        go_on.set()
        assert next(stream).weight.min() == 1
        os.kill(loader.worker_pids[0], signal.SIGKILL)
        assert sum(batch.weight.numel() for batch in stream) == 4


@pytest.mark.long
def test_ends_a_worker_that_hangs_and_goes_on(paths, tmp_path):
    # opening a pipe that nobody writes to blocks in C, and no exception or signal handler gets it out
    os.remove(paths[2])
    os.mkfifo(paths[2])
    batches = [[Sample(e, i, 0) for i in range(5)] for e in range(2)]
    begin = time.monotonic()
    got = collect(paths, batches, workers=2, config=LoaderConfig(timeout=5))
    assert time.monotonic() - begin < 120
    for batch in got:
        assert batch.weight.tolist() == [1, 1, 0, 1, 1]
        assert "longer than 5 s" in batch.skips[0].reason
    # a clip that waited behind it in the same worker is read all the same
    whole = collect(paths, [[Sample(1, 4, 0)]], workers=0)[0]
    assert torch.equal(got[1].frames[4], whole.frames[0])


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_blocked_in_open(pid):
    """Whether the process waits in the kernel for the other end of a pipe that it opens."""
    return (
        "fifo" in Path(f"/proc/{pid}/wchan").read_text() or "wait_for_partner" in Path(f"/proc/{pid}/wchan").read_text()
    )


@pytest.mark.long
def test_replaces_a_killed_worker_and_skips_a_clip_that_another_one_is_killed_with(paths):
    os.remove(paths[2])
    os.mkfifo(paths[2])
    batches = [[Sample(0, 2, 0)], *batches_of(6, 4, num_videos=2)]
    with Loader(READER, paths, batches, batch_size=4, workers=1, config=LoaderConfig(timeout=60)) as loader:
        stream = iter(loader)
        killed = [0]
        for _ in range(2):
            seen = [[], killed]
            wait_until(lambda seen=seen: loader.worker_pids not in seen and is_blocked_in_open(loader.worker_pids[0]))
            killed = loader.worker_pids
            os.kill(killed[0], signal.SIGKILL)
        first = next(stream)
        assert first.weight.tolist() == [0]
        assert "died (SIGKILL)" in first.skips[0].reason
        rest = list(stream)
    assert len(rest) == 6
    assert all(batch.weight.min() == 1 for batch in rest)


@pytest.mark.long
def test_replays_known_skips_without_reading(paths):
    known = {Sample(0, 1, 0): "hung last time"}
    batch = collect(paths, [[Sample(0, i, 0) for i in range(3)]], workers=1, known_skips=known)[0]
    assert batch.weight.tolist() == [1, 0, 1]
    assert batch.skips[0].reason == "hung last time"


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_bug_is_no_unreadable_video(paths, workers):
    broken = ClipReader(frames=4, size=(16, 16), stride=1, augment="not a setting", seed=0)
    with pytest.raises((RuntimeError, AttributeError), match="scales"):
        collect(paths, batches_of(1, 2), workers, reader=broken)


@pytest.mark.long
def test_leaves_no_process_behind(paths):
    with Loader(READER, paths, batches_of(100, 4), batch_size=4, workers=2) as loader:
        next(iter(loader))
        pids = loader.worker_pids
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_passes_on_an_error_in_the_order_itself(paths):
    def broken():
        yield batches_of(1, 2)[0]
        raise KeyError("order")

    with Loader(READER, paths, broken(), batch_size=2, workers=1) as loader, pytest.raises(KeyError, match="order"):
        list(loader)


@pytest.mark.long
def test_one_process_and_two_read_the_same_global_batches(paths, tmp_path):
    def read(parts):
        processes = []
        for part in range(parts):
            arguments = (paths, part, parts, str(tmp_path / f"{part}of{parts}.pt"))
            processes.append(multiprocessing.get_context("spawn").Process(target=read_part, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        loaded = [torch.load(tmp_path / f"{part}of{parts}.pt") for part in range(parts)]
        return [tuple(torch.cat(x) for x in zip(*step, strict=True)) for step in zip(*loaded, strict=True)]

    one, two = read(1), read(2)
    assert len(one) == len(two) == 10
    for (frames, keys), (same_frames, same_keys) in zip(one, two, strict=True):
        assert torch.equal(frames, same_frames)
        assert torch.equal(keys, same_keys)
        masks = [tube(grid=(2, 2, 2), ratio=0.5, keys=x).visible for x in (keys, same_keys)]
        assert torch.equal(*masks)


def own_memory(pid):
    """Bytes of a process that no other shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private"))


@pytest.mark.long
def test_memory_stays_flat_over_ten_thousand_clips(tmp_path):
    """Files that decord and PyAV read, stored ones of both codecs, and one that cannot be read."""
    source = tmp_path / "in"
    source.mkdir()
    frames = moving_frames(20, 24, 32)
    for i in range(6):
        write_video(source / f"{i}.mp4", frames[i:], **({} if i % 2 else {"bf": "0"}))
    (source / "broken.mp4").write_bytes(b"nothing")
    paths = list(find_videos(source).paths)
    for codec in ("h264-fast", "jpeg"):
        arguments = [str(source), str(tmp_path / codec), "--codec", codec, "--short-side", "24", "--workers", "2"]
        assert prepare([*arguments, "--stride", "2"]) == 0
        paths += find_videos(tmp_path / codec).paths
    assert len(paths) == 6 + 1 + 6 + 6
    order, size = Order(len(paths), 0), 20
    batches = (order.samples(k * size, size) for k in range(1520))
    taken = []
    with Loader(READER, paths, batches, batch_size=size, workers=2) as loader:
        for k, _ in enumerate(loader):
            if 500 <= k < 1500 and k % 10 == 0:
                taken.append([own_memory(pid) for pid in (os.getpid(), *loader.worker_pids)])
    # medians: what a process holds goes up and down by some MB with every file, and settles in the first 10,000 clips
    for early, late in zip(*np.median(np.array(taken).reshape(2, 50, -1), axis=1), strict=True):
        assert late - early < 8e6, f"{early / 1e6:.1f} MB from clip 10,000 to 20,000, {late / 1e6:.1f} MB to 30,000"
