"""Fixtures of all tests: one thread, and real videos from outside the repository."""

import os
from pathlib import Path

import pytest
import torch

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
