"""Processes that work for the data commands and the loader, each watched: one that hangs or dies costs the task it had.

torch's DataLoader and concurrent.futures can neither interrupt a decode that blocks in C nor replace a killed worker.
"""

import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from kernels.launch import check


def available_cpus() -> int:
    """Cores this process may use: affinity and the container's quota, where torch would count the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(int(limit) // int(period), 1))
    return cores


class Service(Protocol):
    """What the workers do: pickled into each of them. fds: open files that it refers to, by the same numbers there."""

    @property
    def fds(self) -> tuple[int, ...]: ...

    def __call__(self, task: Any) -> Any:
        """Perform one task. What it raises is a bug: the pool stops."""
        ...


class Outcome(NamedTuple):
    """A task that is done, with what the service returned, or one that is lost, with the reason."""

    task: Any
    value: Any = None
    lost: str | None = None


class Answer(NamedTuple):
    """A worker's message: bug holds a traceback when the service raised."""

    value: Any = None
    bug: str | None = None


# a job's SIGTERM and a terminal's Ctrl-C are ignored from the first line on: the parent decides when its workers stop
_START = """
import signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
from videomae.data.worker import main
main(*{arguments})
"""
_STARTS_TO_FAIL = 10  # workers killed while they start, before it is given up
_START_LIMIT = 120.0  # seconds for a worker to import what it needs, from a slow disk
# tasks after which a worker is replaced, which takes 2 s: decoders keep a little of every file (decord 300 bytes)
_LIFETIME = 200_000


def _own_gpu() -> str:
    """Of the GPUs that this process sees, the one that it has, by torchrun's number of it: for CUDA_VISIBLE_DEVICES."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[number] if number < len(visible) else str(number)


class _Worker:
    """One process, its socket, and the tasks it has: the first is being worked on, the second waits."""

    def __init__(self, service: Service, lifetime: int, see_gpus: bool) -> None:
        ours, theirs = socket.socketpair()
        # a worker decodes on one thread, and has no business on a GPU unless its decoder is there
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
        environment["CUDA_VISIBLE_DEVICES"] = _own_gpu() if see_gpus else ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(arguments=[theirs.fileno(), os.getpid()])],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), *service.fds),
            # signals to the terminal's or the job's process group are the parent's business
            start_new_session=True,
        )
        theirs.close()
        self.link = Connection(ours.detach())
        self.link.send(service)
        self.ready = False
        self.tasks: deque[Any] = deque()
        self.left = lifetime  # tasks that it will still be given
        self.since = time.monotonic()

    def give(self, task: Any) -> bool:
        """False when the process is gone; its end is heard of at the next wait."""
        try:
            self.link.send(task)
        except OSError:
            return False
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        self.left -= 1
        return True

    def deadline(self, timeout: float) -> float:
        """When its patience with the task at hand, or with its own start, is over; infinity for an idle one."""
        if not self.ready:
            return self.since + _START_LIMIT
        return self.since + timeout if self.tasks else math.inf

    def finish(self) -> Any:
        """The task that was being worked on; the clock of the next one starts."""
        self.since = time.monotonic()
        return self.tasks.popleft()

    def end(self, patience: float = 10.0) -> int:
        """Kill the process, if it is not dead already, and return its exit code."""
        self.process.kill()
        self.link.close()
        try:
            return self.process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL  # in the kernel, waiting for a dead disk: it ends when that does


class Pool:
    """Worker processes; use it inside `with`, from one thread."""

    def __init__(
        self, service: Service, workers: int, timeout: float, *, see_gpus: bool = False, lifetime: int = _LIFETIME
    ) -> None:
        """timeout: seconds that a worker may take for one task. see_gpus: leave the workers
        the GPU that this process has.
        lifetime: tasks after which a worker makes room for a fresh one."""
        check(workers >= 1, f"workers must be at least 1; got {workers}")
        self._service, self._timeout, self._see_gpus, self._lifetime = service, timeout, see_gpus, lifetime
        self._waiting: deque[Any] = deque()
        self._failed_starts = 0
        self._tried: list[Any] = []  # what a worker was killed with: once may not be the task's doing
        # the first ones live shorter, so that not all are replaced at once
        self._workers = [self._start(-(-lifetime * (i + 1) // workers)) for i in range(workers)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        until = time.monotonic() + 10
        for worker in self._workers:
            worker.end(max(until - time.monotonic(), 0.01))

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    @property
    def unfinished(self) -> int:
        """Tasks put and not yet settled."""
        return len(self._waiting) + sum(len(worker.tasks) for worker in self._workers)

    def put(self, task: Any) -> None:
        self._waiting.append(task)

    def settle(self, woken: Connection | None = None) -> list[Outcome]:
        """Sleep until a worker answers, is found dead, its time is up, or woken can be read; what that settled, maybe
        nothing.

        Raises RuntimeError when the service has a bug or a worker cannot start.
        """
        self._dispatch()
        soonest = min(worker.deadline(self._timeout) for worker in self._workers)
        timeout = None if soonest == math.inf else max(soonest - time.monotonic(), 0)
        by_link: dict[Any, _Worker] = {worker.link: worker for worker in self._workers}
        heard = wait([*by_link, *([woken] if woken else [])], timeout)
        settled = [self._hear(by_link[link]) for link in heard if link is not woken]
        now = time.monotonic()
        # after what arrived was heard: a task that is done is not late, however long this process was stopped
        for worker in [w for w in self._workers if now > w.deadline(self._timeout)]:
            limit = self._timeout if worker.ready else _START_LIMIT
            settled.append(self._replace(worker, f"took longer than {limit:g} s"))
        for worker in [w for w in self._workers if w.left == 0 and not w.tasks]:
            worker.end()
            self._workers[self._workers.index(worker)] = self._start(self._lifetime)
        self._dispatch()
        return [outcome for outcome in settled if outcome is not None]

    def _start(self, lifetime: int) -> _Worker:
        return _Worker(self._service, lifetime, self._see_gpus)

    def _dispatch(self) -> None:
        # one task in work and one waiting, so that a worker never waits for its parent; the least loaded first
        for depth in (0, 1):
            for worker in self._workers:
                if self._waiting and worker.ready and worker.left and len(worker.tasks) == depth:
                    task = self._waiting.popleft()
                    if not worker.give(task):
                        self._waiting.appendleft(task)

    def _hear(self, worker: _Worker) -> Outcome | None:
        try:
            message: Answer | str = worker.link.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._replace(worker, None)
        if isinstance(message, str):
            worker.ready = True
            return None
        if message.bug is not None:
            raise RuntimeError(f"a data worker failed on {worker.tasks[0]}:\n{message.bug}")
        return Outcome(worker.finish(), message.value)

    def _replace(self, worker: _Worker, reason: str | None) -> Outcome | None:
        """End the worker, put what it was to do back into the queue, and start another. What it was working on is given
        up, unless it was killed from outside, and for the first time with that."""
        code = worker.end()
        if not worker.ready:
            self._failed_starts += 1
            # killed for want of memory, or by us, on a disk that many wait for: another may come through
            if code >= 0 or self._failed_starts > _STARTS_TO_FAIL:
                why = f"{_describe(code)}; what it printed stands above" if reason is None else reason
                raise RuntimeError(f"a data worker could not start: {why}")
        lost = None
        if worker.tasks and reason is None and code == -signal.SIGKILL and worker.tasks[0] not in self._tried:
            self._tried.append(worker.tasks[0])
        elif worker.tasks and (worker.ready or reason is None):  # a task is not to blame for a slow start
            lost = Outcome(worker.finish(), lost=reason or f"the worker decoding it died ({_describe(code)})")
        self._waiting.extendleft(reversed(worker.tasks))
        self._workers[self._workers.index(worker)] = self._start(self._lifetime)
        return lost


def _describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def perform_all(
    service: Service, tasks: Iterable[Any], *, workers: int, timeout: float, lifetime: int = _LIFETIME
) -> Iterator[Outcome]:
    """Every task's outcome, as they come; tasks are taken only a little ahead of the work."""
    waiting = iter(tasks)
    more = True
    with Pool(service, workers, timeout, lifetime=lifetime) as pool:
        while more or pool.unfinished:
            while more and pool.unfinished < 3 * workers:
                try:
                    pool.put(next(waiting))
                except StopIteration:
                    more = False
            if pool.unfinished:
                yield from pool.settle()
