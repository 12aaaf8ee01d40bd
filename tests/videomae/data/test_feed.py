"""The feed to a device: right clips whatever the order in which copies and the step really happen."""

import random
import time

import pytest
import torch

from tests.videos import moving_frames, write_video
from videomae.data.augment import Augment
from videomae.data.dataset import Order
from videomae.data.feed import DeviceFeed, HostFeed, feed
from videomae.data.loader import Loader, LoaderConfig
from videomae.data.readers import ClipReader

MORE = [(1, 4), (2, 4), (0, 2), (1, 2), (2, 2)]
READER = ClipReader(frames=4, size=(16, 16), stride=1, augment=Augment(), seed=0)


class Stream:
    """Work in order, done when somebody waits for it or by chance."""

    def __init__(self):
        self.work, self.finished = [], 0

    def give(self, function):
        self.work.append(function)
        return Place(self, len(self.work))

    def run_to(self, place):
        while self.finished < place:
            # what another stream must have done first is done by this very work
            self.work[self.finished]()
            self.finished += 1


class Place:
    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def done(self):
        return self.stream.finished >= self.number

    def wait_on_host(self):
        self.stream.run_to(self.number)


class SlowCopier:
    """Two streams of which either may lag behind: copies happen long after they were asked for."""

    def __init__(self, seed, locks=True):
        self.copies, self.compute = Stream(), Stream()
        self.locks, self.chance = locks, random.Random(seed)
        self.locked_copies = 0

    def lock(self, memory):
        return self.locks

    def locked_copy(self, x):
        self.locked_copies += 1
        return x.clone()

    def empty(self, like):
        return torch.zeros_like(like)

    def copy(self, to, source, after):
        self.copies.give(after.wait_on_host)
        self._by_chance()
        return self.copies.give(lambda: [a.copy_(b) for a, b in zip(to, source, strict=True)])

    def mark(self):
        self._by_chance()
        return Place(self.compute, len(self.compute.work))

    def wait(self, mark):
        self.compute.give(mark.wait_on_host)

    def seconds(self, begin, end):
        assert begin.stream is end.stream is self.compute
        return float(end.number - begin.number)

    def _by_chance(self):
        for stream in (self.copies, self.compute):
            if self.chance.random() < 0.3:
                stream.run_to(self.chance.randint(0, len(stream.work)))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [str(write_video(folder / f"{i}.mp4", moving_frames(12, 24, 32, seed=i))) for i in range(5)]


def loader_of(paths, ahead=4, workers=1, count=12, sizes=(4,)):
    order = Order(5, 0)
    batches = [order.samples(k * 4, sizes[k % len(sizes)]) for k in range(count)]
    config = LoaderConfig(batches_ahead=ahead)
    return Loader(READER, paths, batches, batch_size=4, workers=workers, config=config)


@pytest.fixture(scope="module")
def wanted(paths):
    with loader_of(paths, workers=0) as loader:
        return [(batch.frames.clone(), batch.keys) for batch in loader]


@pytest.mark.parametrize(("seed", "ahead"), [(0, 4), *(pytest.param(*x, marks=pytest.mark.long) for x in MORE)])
def test_gives_the_step_its_own_clips_however_late_they_are_copied(paths, wanted, seed, ahead):
    copier, seen = SlowCopier(seed, locks=seed % 2 == 0), []
    notes = []
    with loader_of(paths, ahead) as loader:
        for item in DeviceFeed(loader, copier, notes.append):
            copier.compute.give(lambda x=item: seen.append((x.frames.clone(), x.keys.clone(), x.weight.clone())))
        copier.compute.run_to(len(copier.compute.work))
    assert len(seen) == len(wanted)
    for (frames, keys, weight), (right, right_keys) in zip(seen, wanted, strict=True):
        assert torch.equal(frames, right)
        assert torch.equal(keys, right_keys)
        assert weight.tolist() == [1] * 4
    assert len(notes) == seed % 2  # memory that could not be locked is said, and frames are copied once more
    assert copier.locked_copies == len(wanted) * (3 if seed % 2 else 2)


def test_copies_the_next_batch_before_the_step_has_begun_with_this_one(paths):
    copier = SlowCopier(0)
    copier.chance.random = lambda: 1.0  # nothing by chance
    with loader_of(paths) as loader:
        deadline = time.monotonic() + 60
        while loader._out.qsize() < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        batches = DeviceFeed(loader, copier, print)
        next(batches)
        # what the computing stream does between a step's end and the next one's begin: wait for the copy
        assert next(batches).waited() == 1
        # the second one's copy, and the third one's, which waits for nobody but the first step
        assert sum("copy" in work.__qualname__ for work in copier.copies.work) == 3


@pytest.mark.long
def test_batches_of_other_sizes_use_a_part_of_the_buffers(paths):
    copier, sizes = SlowCopier(1), []
    with loader_of(paths, sizes=(4, 2, 3)) as loader:
        for item in DeviceFeed(loader, copier, print):
            sizes.append((len(item.frames), len(item.weight), len(item.keys)))
    assert sizes == [(n, n, n) for n in (4, 2, 3) * 4]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_cpu_reads_the_loaders_own_memory(paths, wanted, workers):
    with loader_of(paths, workers=workers) as loader, feed(loader, torch.device("cpu"), print) as batches:
        assert isinstance(batches, HostFeed)
        for item, (right, _) in zip(batches, wanted, strict=True):
            assert torch.equal(item.frames, right)
            assert item.frames.data_ptr() == item.batch.frames.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(paths, wanted):
    notes, seen = [], []
    with loader_of(paths) as loader, feed(loader, torch.device("cuda"), notes.append) as batches:
        for item in batches:
            torch.cuda._sleep(20_000_000)
            seen.append((item.frames.clone(), item.keys.clone()))
    assert notes == []
    for (frames, keys), (right, right_keys) in zip(seen, wanted, strict=True):
        assert torch.equal(frames.cpu(), right)
        assert torch.equal(keys.cpu(), right_keys)
