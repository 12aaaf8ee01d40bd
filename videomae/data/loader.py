"""Batches of uint8 clips, decoded ahead of the step by a pool of worker processes, in an order fixed beforehand.

Workers crop into memory shared with the parent; a ring of batches is in flight, and a batch is handed out when all its
clips are there. A worker that hangs or dies is replaced; the clip it had is skipped: its slot is zero, its weight 0,
its name and the reason stand in the batch.
"""

import itertools
import mmap
import os
import queue
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.launch import check
from videomae.data.dataset import Sample, mask_keys
from videomae.data.decode import UnreadableVideo
from videomae.data.pool import Outcome, Pool
from videomae.data.readers import Reader, Spent
from videomae.data.storage import CacheConfig, configure


class Skip(NamedTuple):
    """A clip that could not be read."""

    sample: Sample
    path: str
    reason: str


class Effort(NamedTuple):
    """What it took to make a batch. clips: decoded for it; spent: their seconds, summed over the workers."""

    clips: int
    spent: Spent

    def plus(self, other: "Effort") -> "Effort":
        return Effort(self.clips + other.clips, self.spent.plus(other.spent))


NO_EFFORT = Effort(0, Spent())


class Batch(NamedTuple):
    """frames: uint8 [B, T, H, W, 3], valid until the batch is given back. weight: float32 [B], 0 for skipped clips,
    whose frames are 0.
    keys: int64 [B], for the masks. ready: finished batches that waited behind this one."""

    frames: Tensor
    weight: Tensor
    keys: Tensor
    samples: tuple[Sample, ...]
    skips: tuple[Skip, ...]
    effort: Effort = NO_EFFORT
    ready: int = 0
    place: int = 0


@dataclass(frozen=True)
class LoaderConfig:
    """How the pool runs; nothing here changes a clip."""

    timeout: float = 60.0  # seconds a worker may take for one clip before it is ended and the clip skipped
    batches_ahead: int = 4  # batches in memory, those in use included

    def __post_init__(self) -> None:
        check(0 < self.timeout < 1e6, f"loader.timeout must be between 0 and a million seconds; got {self.timeout}")
        check(self.batches_ahead >= 2, f"loader.batches-ahead must be at least 2; got {self.batches_ahead}")


class Task(NamedTuple):
    """Views of one clip to read, and the slots of the shared memory that they go to."""

    ticket: int
    path: str
    samples: tuple[Sample, ...]
    slots: tuple[int, ...]


class Done(NamedTuple):
    """What became of a task: unreadable holds the reason when the video could not be read."""

    unreadable: str | None = None
    spent: Spent = Spent()


@dataclass(frozen=True)
class ReadClips:
    """What a worker does: read a task's views into slots of the shared memory, a file of so many bytes."""

    reader: Reader
    fd: int
    size: int
    cache: CacheConfig | None = None  # of what is read from URLs

    @property
    def fds(self) -> tuple[int, ...]:
        return (self.fd,)

    @cached_property
    def _clips(self) -> np.ndarray:
        configure(self.cache)
        return np.frombuffer(mmap.mmap(self.fd, self.size), dtype=np.uint8).reshape(-1, *self.reader.shape)

    def __call__(self, task: Task) -> Done:
        try:
            return Done(None, self.reader.read_into(task.path, task.samples, [self._clips[i] for i in task.slots]))
        except UnreadableVideo as error:
            return Done(error.reason)


@dataclass
class _InFlight:
    """A batch being filled, in one place of the ring."""

    samples: tuple[Sample, ...]
    place: int
    missing: int
    skips: list[Skip] = field(default_factory=list)
    effort: Effort = NO_EFFORT


class Loader:
    """Batches for lists of samples, in order: iterate it inside `with`, or take them one by one with `next_batch` and
    `give_back`."""

    def __init__(
        self,
        reader: Reader,
        paths: Sequence[str],
        batches: Iterable[Sequence[Sample]],
        *,
        batch_size: int,
        workers: int,
        config: LoaderConfig | None = None,
        known_skips: Mapping[Sample, str] | None = None,
        cache: CacheConfig | None = None,
    ) -> None:
        """batches: lists of at most batch_size samples. workers: processes; 0 reads in this one, without a watchdog.
        known_skips: clips to be skipped unread, with the reason, so that a resumed run repeats what the first one
        did."""
        check(workers >= 0, f"workers must not be negative; got {workers}")
        check(batch_size >= 1, f"batch size must be at least 1; got {batch_size}")
        self._paths, self._batch_size, self._num_workers = paths, batch_size, workers
        self._batches = iter(batches)
        self._config = config or LoaderConfig()
        self._known = known_skips or {}
        clip_bytes = int(np.prod(reader.shape))
        self._fd, self._memory = _shared_memory(max(self._config.batches_ahead * batch_size * clip_bytes, 1))
        self._clips = np.frombuffer(self._memory, dtype=np.uint8).reshape(-1, *reader.shape)
        self._service = ReadClips(reader, self._fd, self._memory.size(), cache)
        self._pool: Pool | None = None
        self._waiting: deque[Task] = deque()  # without workers
        self._tickets = itertools.count()
        self._owner: dict[int, _InFlight] = {}
        self._flight: deque[_InFlight] = deque()
        self._free = deque(range(self._config.batches_ahead))
        self._out: queue.SimpleQueue[_InFlight | BaseException | None] = queue.SimpleQueue()
        self._wake, self._woken = (Connection(end.detach()) for end in socket.socketpair())
        self._closing, self._ended = False, False
        self._thread = threading.Thread(target=self._manage, name="videomae-loader", daemon=True)

    def __enter__(self) -> "Loader":
        if self._num_workers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        if self._num_workers:
            self._wake.send(None)
            self._thread.join()
        os.close(self._fd)

    def __iter__(self) -> Iterator[Batch]:
        """Each batch is given back when the next one is asked for."""
        while (batch := self.next_batch()) is not None:
            yield batch
            self.give_back(batch)

    def next_batch(self) -> Batch | None:
        """The next batch, waited for; None after the last. Its place in memory must be given back."""
        if not self._num_workers:
            flight = self._read_here()
            return None if flight is None else self._batch(flight)
        out = self._out.get()
        if isinstance(out, _InFlight):
            return self._batch(out)
        self._out.put(out)  # for whoever asks again
        if out is None:
            return None
        raise out

    def has_batch(self) -> bool:
        """Whether `next_batch` would give one without waiting or reading."""
        return not self._out.empty()

    def give_back(self, batch: Batch) -> None:
        """Say that nobody reads this batch's frames any more."""
        if self._num_workers:
            self._wake.send(batch.place)
        else:
            self._free.append(batch.place)

    @property
    def batch_size(self) -> int:
        """The most clips of a batch."""
        return self._batch_size

    @property
    def num_places(self) -> int:
        """Batches that the memory holds."""
        return self._config.batches_ahead

    @property
    def memory(self) -> np.ndarray:
        """All clips of the ring, uint8 [slots, T, H, W, 3]: batches are parts of it."""
        return self._clips

    @property
    def worker_pids(self) -> list[int]:
        return self._pool.pids if self._pool else []

    def _batch(self, flight: _InFlight) -> Batch:
        begin = flight.place * self._batch_size
        frames = torch.from_numpy(self._clips[begin : begin + len(flight.samples)])
        skipped = {skip.sample for skip in flight.skips}
        for i, sample in enumerate(flight.samples):
            if sample in skipped:
                frames[i] = 0
        weight = torch.tensor([float(sample not in skipped) for sample in flight.samples])
        keys = mask_keys(self._service.reader.seed, flight.samples)
        return Batch(
            frames,
            weight,
            keys,
            flight.samples,
            tuple(sorted(flight.skips)),
            flight.effort,
            self._out.qsize() - self._ended,
            flight.place,
        )

    def _read_here(self) -> _InFlight | None:
        flight = self._next_flight(self._free[0])
        if flight is not None:
            self._free.popleft()
        while self._waiting:
            task = self._waiting.popleft()
            self._settle(task, self._service(task))
        return flight

    # -- from here on in the managing thread, where there are workers

    def _next_flight(self, place: int) -> _InFlight | None:
        """Take the next list of samples, put its tasks in the queue; None when there is no more."""
        samples = tuple(next(self._batches, ()))
        if not samples:
            return None
        check(len(samples) <= self._batch_size, f"a batch of {len(samples)} clips does not fit {self._batch_size}")
        flight = _InFlight(samples, place, len(samples))
        # views of one clip that stand side by side are decoded once
        for _, group in itertools.groupby(enumerate(samples), key=lambda pair: (*pair[1][:2], pair[1] in self._known)):
            numbers, views = zip(*group, strict=True)
            slots = tuple(place * self._batch_size + n for n in numbers)
            task = Task(next(self._tickets), self._paths[views[0].index], views, slots)
            self._owner[task.ticket] = flight
            known = self._known.get(views[0])
            if known is not None:
                self._settle(task, Done(known))
            elif self._pool:
                self._pool.put(task)
            else:
                self._waiting.append(task)
        return flight

    def _settle(self, task: Task, done: Done) -> None:
        flight = self._owner.pop(task.ticket)
        flight.missing -= len(task.samples)
        if done.unreadable is not None:
            flight.skips += [Skip(sample, task.path, done.unreadable) for sample in task.samples]
        else:
            flight.effort = flight.effort.plus(Effort(1, done.spent))

    def _manage(self) -> None:
        try:
            see_gpus = self._service.reader.decoder.device != "cpu"
            with Pool(self._service, self._num_workers, self._config.timeout, see_gpus=see_gpus) as self._pool:
                more = True
                while not self._closing and (more or self._flight):
                    while more and self._free:
                        flight = self._next_flight(self._free[0])
                        more = flight is not None
                        if flight is not None:
                            self._free.popleft()
                            self._flight.append(flight)
                    while self._flight and self._flight[0].missing == 0:
                        self._out.put(self._flight.popleft())
                    if more or self._flight:
                        self._hear(self._pool.settle(self._woken))
            self._end(None)
        except BaseException as error:  # handed to the thread that iterates, which raises it
            self._end(error)

    def _end(self, how: BaseException | None) -> None:
        self._ended = True
        self._out.put(how)

    def _hear(self, settled: Iterable[Outcome]) -> None:
        for task, value, lost in settled:
            self._settle(task, value if lost is None else Done(lost))
        while self._woken.poll():
            if (place := self._woken.recv()) is not None:
                self._free.append(place)


def _shared_memory(size: int) -> tuple[int, mmap.mmap]:
    """Anonymous memory that a child can map by its file descriptor; gone when the last process that has it ends."""
    if hasattr(os, "memfd_create"):
        # not /dev/shm, which containers cut to 64 MB
        fd = os.memfd_create("videomae-clips")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd, mmap.mmap(fd, size)
