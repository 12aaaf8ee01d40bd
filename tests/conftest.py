"""Fixtures of all tests: one thread, where kernels run, and real videos from outside the repository."""

import os
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
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which ops run their kernels: the GPU, or the CPU by the interpreter. Fresh tensors hold NaN."""
    poison(monkeypatch)
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(launch, "_interpret", True)
    return "cpu"


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty and its kin give is NaN, or the largest integer: memory that nobody wrote is then seen."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            if not x.is_meta:
                x.fill_(float("nan") if x.dtype.is_floating_point else torch.iinfo(x.dtype).max)
            return x

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
