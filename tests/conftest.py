"""Fixtures of all tests: one thread, where kernels run, and real videos from outside the repository."""

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch


def _interpreted_kernels() -> None:
    """Without a GPU, import the kernels for Triton's interpreter. Only a test that asks for `kernel_device` uses it:
    others run the references, and commands that tests start see no trace of it."""
    asked = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    import kernels  # noqa: F401

    triton.knobs.runtime.interpret = True  # parts that Triton imports at the first launch ask again
    if asked is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = asked


if not torch.cuda.is_available():
    _interpreted_kernels()
# torch lists its factory functions at the first use of a device context: before a test replaces one of them
with torch.device("meta"):
    torch.empty(0)

from kernels import launch  # noqa: E402

launch._interpret = False

ROOT = Path(__file__).resolve().parent.parent


# tiny tensors: threads would only wait for each other, and sums would depend on their number. Commands that tests start
# see it too
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def _shared(name: str) -> Path:
    folder = Path(os.environ.get("VIDEOMAE_TEST_DATA", ROOT.parent / "shared" / "data")) / name
    if not folder.is_dir():
        pytest.skip(f"needs the test videos in {folder}; VIDEOMAE_TEST_DATA names another folder")
    return folder


@pytest.fixture
def clips() -> Path:
    """Seven ordinary videos."""
    return _shared("clips")


@pytest.fixture
def hard() -> Path:
    """Nine odd or broken ones."""
    return _shared("hard")


@pytest.fixture
def bare_kernel_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which ops run their kernels: the GPU, or the CPU by the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(launch, "_interpret", True)
    return "cpu"


@pytest.fixture
def kernel_device(bare_kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same, with every allocation poisoned and guarded."""
    guards = guard_allocations(monkeypatch)
    yield bare_kernel_device
    for guard in guards:
        assert (guard == CANARY).all(), "a kernel wrote past the end of a tensor it was given"


CANARY, GUARD_BYTES = 0xA5, 512


def guard_allocations(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What torch.empty and its kin give is NaN, or the largest integer, so that memory which nobody wrote is seen; and
    it lies between bytes that nobody may write: these are returned, all CANARY."""
    guards = []
    empty = torch.empty

    def guarded(size, dtype, device):
        count = prod(size)
        num_bytes = (count * dtype.itemsize + 15) // 16 * 16
        memory = empty(num_bytes + 2 * GUARD_BYTES, dtype=torch.uint8, device=device).fill_(CANARY)
        guards.extend((memory[:GUARD_BYTES], memory[GUARD_BYTES + num_bytes :]))
        x = empty(0, dtype=dtype, device=device)
        # not a view, as far as autograd and operator checks can see
        x.set_(memory.untyped_storage(), GUARD_BYTES // dtype.itemsize, tuple(size))
        return x.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)

    def ordinary(x):
        return type(x) is torch.Tensor and not x.is_meta

    def make_empty(*size, dtype=None, device=None, **others):
        plain = empty(*size, dtype=dtype, device=device, **others)
        return guarded(plain.shape, plain.dtype, plain.device) if ordinary(plain) and not others else plain

    like, new = torch.empty_like, torch.Tensor.new_empty

    def make_like(x, **others):
        plain = like(x, **others)
        return guarded(plain.shape, plain.dtype, plain.device) if ordinary(plain) and plain.is_contiguous() else plain

    def make_new(x, *size, **others):
        plain = new(x, *size, **others)
        return guarded(plain.shape, plain.dtype, plain.device) if ordinary(plain) else plain

    monkeypatch.setattr(torch, "empty", make_empty)
    monkeypatch.setattr(torch, "empty_like", make_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", make_new)
    return guards
