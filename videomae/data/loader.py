"""Batches of uint8 clips, decoded ahead of the step by a pool of worker processes, in an order fixed beforehand.

Workers write into memory shared with the parent; a ring of batches is in flight, and a batch is handed out when all its
clips are there. A watchdog ends and replaces a worker that hangs or dies; the clip it had is skipped: its slot is zero,
its weight 0, its name and the reason stand in the batch. torch's DataLoader can neither interrupt a decode that blocks
in C nor replace a killed worker.
"""

import itertools
import math
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.launch import check
from videomae.data.dataset import ClipReader, Sample, mask_keys
from videomae.data.worker import Done, Task, perform


class Skip(NamedTuple):
    """A clip that could not be read."""

    sample: Sample
    path: str
    reason: str


class Batch(NamedTuple):
    """frames: uint8 [B, T, H, W, 3], valid until the next batch is asked for. weight: float32 [B], 0 for skipped clips,
    whose frames are 0.
    keys: int64 [B], for the masks."""

    frames: Tensor
    weight: Tensor
    keys: Tensor
    samples: tuple[Sample, ...]
    skips: tuple[Skip, ...]


@dataclass(frozen=True)
class LoaderConfig:
    """How the pool runs; nothing here changes a clip."""

    timeout: float = 60.0  # seconds a worker may take for one clip before it is ended and the clip skipped
    batches_ahead: int = 3  # batches in memory, the one in use included

    def __post_init__(self) -> None:
        check(0 < self.timeout < 1e6, f"loader.timeout must be between 0 and a million seconds; got {self.timeout}")
        check(self.batches_ahead >= 2, f"loader.batches-ahead must be at least 2; got {self.batches_ahead}")


@dataclass
class _InFlight:
    """A batch being filled, in one place of the ring."""

    samples: tuple[Sample, ...]
    place: int
    missing: int
    skips: list[Skip] = field(default_factory=list)


# a job's SIGTERM and a terminal's Ctrl-C are ignored from the first line on: the parent decides when its workers stop
_START = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)
from videomae.data.worker import main
main(*{arguments})
"""
_START_LIMIT = 120.0  # seconds for a worker to import what it needs, from a slow disk


class _Worker:
    """One process, its socket, and the tasks it has: the first is being worked on, the second waits."""

    def __init__(self, reader: ClipReader, memory_fd: int, size: int) -> None:
        ours, theirs = socket.socketpair()
        # a worker decodes on one thread, and has no business on a GPU
        environment = dict(
            os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""
        )
        arguments = [theirs.fileno(), memory_fd, size, os.getpid()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(arguments=arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), memory_fd),
            # signals to the terminal's or the job's process group are the parent's business
            start_new_session=True,
        )
        theirs.close()
        self.link = Connection(ours.detach())
        self.link.send(reader)
        self.ready = False
        self.tasks: deque[Task] = deque()
        self.since = time.monotonic()

    def give(self, task: Task) -> bool:
        """False when the process is gone; its end is heard of at the next wait."""
        try:
            self.link.send(task)
        except OSError:
            return False
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        return True

    def deadline(self, timeout: float) -> float:
        """When its patience with the file at hand, or with its own start, is over; infinity for an idle one."""
        if not self.ready:
            return self.since + _START_LIMIT
        return self.since + timeout if self.tasks else math.inf

    def finish(self) -> Task:
        """The task that was being worked on; the clock of the next one starts."""
        self.since = time.monotonic()
        return self.tasks.popleft()

    def end(self) -> int:
        """Kill the process, if it is not dead already, and return its exit code."""
        self.process.kill()
        self.link.close()
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL  # in the kernel, waiting for a dead disk: it ends when that does


class Loader:
    """Iterate it once, inside `with`: it yields one Batch for each list of samples, in order."""

    def __init__(
        self,
        reader: ClipReader,
        paths: Sequence[str],
        batches: Iterable[Sequence[Sample]],
        *,
        batch_size: int,
        workers: int,
        config: LoaderConfig | None = None,
        known_skips: Mapping[Sample, str] | None = None,
    ) -> None:
        """batches: lists of at most batch_size samples. workers: processes; 0 reads in this one, without a watchdog.
        known_skips: clips to be skipped unread, with the reason, so that a resumed run repeats what the first one
        did."""
        check(workers >= 0, f"workers must not be negative; got {workers}")
        check(batch_size >= 1, f"batch size must be at least 1; got {batch_size}")
        self._reader, self._paths, self._batch_size, self._num_workers = reader, paths, batch_size, workers
        self._batches = iter(batches)
        self._config = config or LoaderConfig()
        self._known = known_skips or {}
        self._ring = self._config.batches_ahead if workers else 1
        clip_bytes = int(np.prod(reader.shape))
        self._fd, self._memory = _shared_memory(max(self._ring * batch_size * clip_bytes, 1))
        self._clips = np.frombuffer(self._memory, dtype=np.uint8).reshape(-1, *reader.shape)
        self._workers: list[_Worker] = []
        self._waiting: deque[Task] = deque()
        self._tickets = itertools.count()
        self._owner: dict[int, _InFlight] = {}
        self._flight: deque[_InFlight] = deque()
        self._free = deque(range(self._ring))
        self._out: queue.SimpleQueue[_InFlight | BaseException | None] = queue.SimpleQueue()
        self._wake, self._woken = (Connection(end.detach()) for end in socket.socketpair())
        self._closing = False
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
        if not self._num_workers:
            yield from self._read_here()
            return
        while (flight := self._out.get()) is not None:
            if isinstance(flight, BaseException):
                raise flight
            yield self._batch(flight)
            # the caller is done with the batch before this one
            self._wake.send(flight.place)

    @property
    def worker_pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    # -- everything below runs in the managing thread, but for _batch and _read_here
    # ------------------------------------------------

    def _batch(self, flight: _InFlight) -> Batch:
        begin = flight.place * self._batch_size
        frames = torch.from_numpy(self._clips[begin : begin + len(flight.samples)])
        skipped = {skip.sample for skip in flight.skips}
        for i, sample in enumerate(flight.samples):
            if sample in skipped:
                frames[i] = 0
        weight = torch.tensor([float(sample not in skipped) for sample in flight.samples])
        keys = mask_keys(self._reader.seed, flight.samples)
        return Batch(frames, weight, keys, flight.samples, tuple(sorted(flight.skips)))

    def _read_here(self) -> Iterator[Batch]:
        while (flight := self._next_flight(0)) is not None:
            while self._waiting:
                task = self._waiting.popleft()
                self._settle(task, perform(task, self._reader, self._clips).unreadable)
            yield self._batch(flight)

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
            if known is None:
                self._waiting.append(task)
            else:
                self._settle(task, known)
        return flight

    def _settle(self, task: Task, unreadable: str | None) -> None:
        flight = self._owner.pop(task.ticket)
        flight.missing -= len(task.samples)
        if unreadable is not None:
            flight.skips += [Skip(sample, task.path, unreadable) for sample in task.samples]

    def _manage(self) -> None:
        try:
            self._workers = [self._start() for _ in range(self._num_workers)]
            more = True
            while not self._closing and (more or self._flight):
                while more and self._free:
                    flight = self._next_flight(self._free[0])
                    more = flight is not None
                    if flight is not None:
                        self._free.popleft()
                        self._flight.append(flight)
                self._dispatch()
                while self._flight and self._flight[0].missing == 0:
                    self._out.put(self._flight.popleft())
                if more or self._flight:
                    self._wait()
            self._out.put(None)
        except BaseException as error:  # handed to the thread that iterates, which raises it
            self._out.put(error)
        finally:
            for worker in self._workers:
                worker.end()

    def _start(self) -> _Worker:
        return _Worker(self._reader, self._fd, self._memory.size())

    def _dispatch(self) -> None:
        # one task in work and one waiting, so that a worker never waits for its parent; the least loaded first
        for depth in (0, 1):
            for worker in self._workers:
                if self._waiting and worker.ready and len(worker.tasks) == depth:
                    task = self._waiting.popleft()
                    if not worker.give(task):
                        self._waiting.appendleft(task)

    def _wait(self) -> None:
        """Sleep until a worker answers, a batch is given back, or a worker's time is up; then see to it."""
        soonest = min(worker.deadline(self._config.timeout) for worker in self._workers)
        timeout = None if soonest == math.inf else max(soonest - time.monotonic(), 0)
        by_link: dict[Any, _Worker] = {worker.link: worker for worker in self._workers}
        for link in wait([self._woken, *by_link], timeout):
            if link is not self._woken:
                self._hear(by_link[link])
            elif (place := self._woken.recv()) is not None:
                self._free.append(place)
        now = time.monotonic()
        # after what arrived was heard: a clip that is there is not late, however long this process was stopped
        for worker in [w for w in self._workers if now > w.deadline(self._config.timeout)]:
            self._replace(worker, f"took longer than {self._config.timeout:g} s to decode")

    def _hear(self, worker: _Worker) -> None:
        try:
            message: Done | str = worker.link.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self._replace(worker, None)
            return
        if isinstance(message, str):
            worker.ready = True
        elif message.bug is not None:
            raise RuntimeError(f"a data worker failed on {worker.tasks[0].path}:\n{message.bug}")
        else:
            self._settle(worker.finish(), message.unreadable)

    def _replace(self, worker: _Worker, reason: str | None) -> None:
        """End the worker, skip what it was working on, give the rest back to the queue, and start another."""
        code = worker.end()
        if not worker.ready:
            raise RuntimeError(f"a data worker could not start (exit code {code}); what it printed stands above")
        if worker.tasks:
            self._settle(worker.finish(), reason or f"the worker decoding it died ({_describe(code)})")
        self._waiting.extendleft(reversed(worker.tasks))
        self._workers[self._workers.index(worker)] = self._start()


def _describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


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
