"""Checkpoints: written whole or not at all, the newest few kept, the last good one found again.

checkpoints/step_<n>/ holds model.safetensors (readable by `videomae.load_weights`) and state.pt (everything else a run
needs to go on).
"""

import os
import pickle
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kernels.launch import check
from videomae.weights import load_weights, save_weights


@dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written; there is always one at the end, and on SIGTERM and Ctrl-C."""

    every: int = 1000  # steps
    keep: int = 3  # newest checkpoints that stay on disk

    def __post_init__(self) -> None:
        check(self.every >= 1, f"checkpoint.every must be at least 1; got {self.every}")
        check(self.keep >= 1, f"checkpoint.keep must be at least 1; got {self.keep}")


class CannotSave(Exception):
    """A checkpoint that cannot be written; those before it are as they were."""


class Damaged(Exception):
    """A checkpoint that cannot be read."""


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    state: dict[str, Any],
    *,
    keep: int,
    beside: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Write folder/step_<step> and remove all but the newest `keep`. A kill at any moment leaves whole checkpoints
    only. beside: other models, by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step_{step}", folder / f".step_{step}.writing"
    for leftover in folder.glob(".step_*"):  # of a run that was killed while writing
        shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        for name, each in {"model.safetensors": model, **(beside or {})}.items():
            save_weights(each, temporary / name)
        with open(temporary / "state.pt", "wb") as file:
            torch.save({**state, "step": step}, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:
        # a full disk: what was half written would keep it full
        shutil.rmtree(temporary, ignore_errors=True)
        raise CannotSave(f"checkpoint of step {step} could not be written to {folder}: {error}") from error
    if final.exists():
        # the same step of an earlier, resumed run: moved away first, since a folder cannot be replaced in one stroke
        os.rename(final, folder / f".step_{step}.old")
    os.rename(temporary, final)
    _sync(folder)
    older = [path for path in checkpoints(folder) if _number(path) <= step]
    for old in [folder / f".step_{step}.old", *older[keep:]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """All that are there, newest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=_number, reverse=True)


def set_aside_after(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps to set_aside_step_<n>: the run goes on from `step`, and they are not of its
    past."""
    for path in checkpoints(folder):
        if _number(path) > step:
            aside = path.with_name(f"set_aside_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            print(f"{path} was renamed to {aside.name}: the run goes on from step {step}", file=sys.stderr)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def read_state(path: Path) -> dict[str, Any]:
    """The training state of one checkpoint, on the CPU; Damaged when it, or the weights beside it, cannot be read."""
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        with safe_open(path / "model.safetensors", framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                weights.get_tensor(name)
    except pickle.UnpicklingError as error:  # torch's message recommends loading it unsafely
        raise Damaged(f"{path}: state.pt is no checkpoint of this program, or is damaged") from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise Damaged(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    if not (isinstance(state, dict) and state.keys() >= _KEYS):
        raise Damaged(f"{path}: state.pt is no checkpoint of this program")
    return state


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, and its state; those passed over are named on stderr. None where there is
    none at all.

    Raises Damaged when there are checkpoints and none can be read: starting afresh would throw a run away.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            return path, read_state(path)
        except Damaged as error:
            print(f"warning: damaged checkpoint passed over: {error}", file=sys.stderr)
    if found:
        raise Damaged(f"none of the {len(found)} checkpoints in {folder} can be read")
    return None


def restore(path: Path, model: nn.Module) -> None:
    """The checkpoint's weights into the model."""
    load_weights(model, path / "model.safetensors")


# what a run needs to go on
_KEYS = frozenset(("step", "config", "videos", "micro_batch", "precision", "rng", "optimizer", "scaler"))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
