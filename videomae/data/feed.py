"""From the loader's memory to the device, one batch ahead of the step, on a stream of its own.

On a GPU the loader's shared memory is page-locked, so that workers' clips go over the bus without another copy on the
host; two buffers on the device take turns. On a CPU the loader's memory is used as it is.
"""

import ctypes
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from videomae.data.loader import Batch, Loader

_BUFFERS = 2  # on the device: one in use, one being filled


class OnDevice(NamedTuple):
    """A batch whose frames, weight and keys are on the device, until the next one is asked for.

    waited: seconds for which the device had nothing to do because the batch was not there; to be asked once the step
    that uses it is done.
    """

    batch: Batch
    frames: Tensor
    weight: Tensor
    keys: Tensor
    waited: Callable[[], float]


class Mark(Protocol):
    """A place in a stream's work."""

    def done(self) -> bool: ...

    def wait_on_host(self) -> None: ...


class Copier(Protocol):
    """The stream that copies, beside the one that computes."""

    def lock(self, memory: Tensor) -> bool:
        """Page-lock host memory; False when that cannot be."""
        ...

    def locked_copy(self, x: Tensor) -> Tensor:
        """A copy in page-locked host memory."""
        ...

    def empty(self, like: Tensor) -> Tensor:
        """An uninitialised tensor on the device."""
        ...

    def copy(self, to: Sequence[Tensor], source: Sequence[Tensor], after: Mark) -> Mark:
        """Copy page-locked tensors to the device once the computing stream has come to after; the end of that."""
        ...

    def mark(self) -> Mark:
        """The end of what the computing stream has been given so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """The computing stream goes on only after mark."""
        ...

    def seconds(self, begin: Mark, end: Mark) -> float:
        """From one mark of the computing stream to another, both done."""
        ...

    def close(self) -> None:
        """Unlock what was locked, after all that was copied from it has arrived."""
        ...


class _CudaMark:
    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def done(self) -> bool:
        return self.event.query()

    def wait_on_host(self) -> None:
        self.event.synchronize()


class CudaCopier:
    """A side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._locked: list[int] = []

    def lock(self, memory: Tensor) -> bool:
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) != 0:
            _forget_cuda_error()
            return False
        self._locked.append(memory.data_ptr())
        return True

    def locked_copy(self, x: Tensor) -> Tensor:
        return x.pin_memory()

    def empty(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device=self._device)

    def copy(self, to: Sequence[Tensor], source: Sequence[Tensor], after: Mark) -> Mark:
        assert isinstance(after, _CudaMark)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after.event)
            for target, x in zip(to, source, strict=True):
                target.copy_(x, non_blocking=True)
            return _CudaMark()

    def mark(self) -> Mark:
        return _CudaMark()

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        torch.cuda.current_stream(self._device).wait_event(mark.event)

    def seconds(self, begin: Mark, end: Mark) -> float:
        assert isinstance(begin, _CudaMark)
        assert isinstance(end, _CudaMark)
        end.wait_on_host()
        return begin.event.elapsed_time(end.event) / 1000

    def close(self) -> None:
        self._stream.synchronize()
        for address in self._locked:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._locked.clear()


def _forget_cuda_error() -> None:
    """Take the last error out of the CUDA runtime: the next kernel's start would report it as its own."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    for path in {line.split()[-1] for line in lines if "libcudart" in line}:
        ctypes.CDLL(path).cudaGetLastError()


class HostFeed:
    """Batches where they are: for a CPU."""

    def __init__(self, loader: Loader) -> None:
        self._batches = iter(loader)

    def __iter__(self) -> Iterator[OnDevice]:
        return self

    def __next__(self) -> OnDevice:
        begin = time.monotonic()
        batch = next(self._batches)
        waited = time.monotonic() - begin
        return OnDevice(batch, batch.frames, batch.weight, batch.keys, lambda: waited)


class _Copied(NamedTuple):
    batch: Batch
    inputs: tuple[Tensor, ...]  # on the device
    arrived: Mark
    turn: int
    sources: tuple[Tensor, ...]  # held until they have arrived


class DeviceFeed:
    """Batches on a device. What the step does with one must have been started before the next is asked for."""

    def __init__(self, loader: Loader, copier: Copier, say: Callable[[str], None]) -> None:
        """say: takes a note when memory cannot be page-locked."""
        self._loader, self._copier = loader, copier
        memory = torch.from_numpy(loader.memory)
        self._locked = copier.lock(memory)
        if not self._locked:
            say("note: the loader's memory could not be page-locked; every batch is copied once more on the host")
        size = loader.batch_size
        inputs = (memory[:size], torch.empty(size), torch.empty(size, dtype=torch.int64))
        self._buffers = [tuple(copier.empty(x) for x in inputs) for _ in range(_BUFFERS)]
        # where the step is done with what a buffer held; at first, where its memory's last user is
        self._used = [copier.mark() for _ in range(_BUFFERS)]
        self._turns = itertools.cycle(range(_BUFFERS))
        self._next: _Copied | None = None
        self._current: _Copied | None = None
        self._leaving: deque[_Copied] = deque()  # batches whose host memory is still being read

    def __iter__(self) -> Iterator[OnDevice]:
        return self

    def __next__(self) -> OnDevice:
        idle = self._copier.mark()
        if self._current is not None:
            self._used[self._current.turn] = idle
        self._current = self._next or self._fetch()
        if self._current is None:
            raise StopIteration
        self._next = self._fetch() if self._loader.has_batch() else None
        self._copier.wait(self._current.arrived)
        goes_on = self._copier.mark()
        frames, weight, keys = self._current.inputs
        waited = partial(self._copier.seconds, idle, goes_on)
        return OnDevice(self._current.batch, frames, weight, keys, waited)

    def _fetch(self) -> _Copied | None:
        """Take the loader's next batch and start its copy."""
        # one place of the loader's memory must be left to fill
        self._return_places(keep=self._loader.num_places - 2)
        batch = self._loader.next_batch()
        if batch is None:
            return None
        turn = next(self._turns)
        frames = batch.frames if self._locked else self._copier.locked_copy(batch.frames)
        sources = (frames, self._copier.locked_copy(batch.weight), self._copier.locked_copy(batch.keys))
        targets = tuple(buffer[: len(frames)] for buffer in self._buffers[turn])
        arrived = self._copier.copy(targets, sources, after=self._used[turn])
        copied = _Copied(batch, targets, arrived, turn, sources)
        self._leaving.append(copied)
        return copied

    def _return_places(self, keep: int) -> None:
        """Give the loader back what has arrived; wait for all but the latest keep."""
        while self._leaving and (len(self._leaving) > keep or self._leaving[0].arrived.done()):
            copied = self._leaving.popleft()
            copied.arrived.wait_on_host()
            self._loader.give_back(copied.batch)


@contextmanager
def feed(loader: Loader, device: torch.device, say: Callable[[str], None]) -> Iterator[Iterator[OnDevice]]:
    """The loader's batches on the device."""
    if device.type == "cpu":
        yield HostFeed(loader)
        return
    copier = CudaCopier(device)
    try:
        yield DeviceFeed(loader, copier, say)
    finally:
        copier.close()
