"""Checkpoints: copied off the training path, written whole or not at all, the newest kept, the last good one found
again.

checkpoints/step_<n>/ holds model.safetensors (readable by `videomae.load_weights`), optimizer/ (PyTorch's distributed
checkpoint of AdamW's moments, by parameter), state.pt (everything else that a run needs to go on) and files.json (sizes
and sums of all of them). Nothing in it is unpickled beyond tensors and plain values.
"""

import json
import os
import pickle
import re
import shutil
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kernels.launch import check
from train.moments import read_tensors
from videomae.pickles import check_file
from videomae.weights import copy_weights, load_weights


@dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written; there is always one at the end, and on SIGTERM and Ctrl-C."""

    every: int = 1000  # steps from one to the next
    keep: int = 3  # newest checkpoints that stay on disk
    keep_hours: float = 0.0  # and how long every one stays at least

    def __post_init__(self) -> None:
        check(self.every >= 1, f"checkpoint.every must be at least 1; got {self.every}")
        check(self.keep >= 1, f"checkpoint.keep must be at least 1; got {self.keep}")
        check(0 <= self.keep_hours < 1e6, f"checkpoint.keep-hours must not be negative; got {self.keep_hours}")


class CannotSave(Exception):
    """A checkpoint that cannot be written; those before it are as they were."""


class Damaged(Exception):
    """A checkpoint that cannot be read."""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint is made of, in memory of the host: training may go on while it is written."""

    step: int
    models: dict[str, Callable[[Path], None]]  # by file name, what writes them
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def take(step: int, models: Mapping[str, nn.Module], optimizer: Iterable[tuple[str, Tensor]], state: dict) -> Snapshot:
    """Copy what is to be saved. models: by file name, model.safetensors among them; optimizer: tensors by name."""
    copies = {name: x.detach().to("cpu", copy=True) for name, x in optimizer}
    return Snapshot(step, {name: copy_weights(model) for name, model in models.items()}, copies, dict(state))


def write(folder: Path, snapshot: Snapshot, config: Checkpointing) -> Path:
    """Write folder/step_<step> and remove those that need not be kept. A kill at any moment leaves whole checkpoints
    only. Raises CannotSave."""
    # here, see train/sharding.py
    from torch.distributed.checkpoint import CheckpointException

    step = snapshot.step
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step_{step}", folder / f".step_{step}.writing"
    for leftover in folder.glob(".step_*"):  # of a run that was killed while writing
        shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        _fill(temporary, snapshot)
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        # a full disk: what was half written would keep it full
        shutil.rmtree(temporary, ignore_errors=True)
        raise CannotSave(f"checkpoint of step {step} could not be written to {folder}: {_reason(error)}") from error
    if final.exists():
        # the same step of an earlier, resumed run: moved away first, since a folder cannot be replaced in one stroke
        os.rename(final, folder / f".step_{step}.old")
    os.rename(temporary, final)
    _sync(folder)
    older = [path for path in checkpoints(folder) if _number(path) <= step]
    spent = [path for path in older[config.keep :] if _age(path) >= 3600 * config.keep_hours]
    for old in spent:  # away in one stroke: a kill must not leave a part that passes for whole
        os.rename(old, folder / f".{old.name}.old")
    for old in folder.glob(".step_*.old"):
        shutil.rmtree(old, ignore_errors=True)
    return final


def _fill(folder: Path, snapshot: Snapshot) -> None:
    for name, write_model in snapshot.models.items():
        write_model(folder / name)
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import save as save_distributed

    # copied to the host before; copying ahead would wait for the training's stream, every 10 MB
    writer = FileSystemWriter(folder / _OPTIMIZER, sync_files=True, per_thread_copy_ahead=0)
    save_distributed(dict(snapshot.optimizer), storage_writer=writer, no_dist=True)
    with open(folder / "state.pt", "wb") as file:
        torch.save({**snapshot.state, "step": snapshot.step}, file)
        file.flush()
        os.fsync(file.fileno())
    with open(folder / _FILES, "w") as file:
        json.dump(_sums(folder), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder / _OPTIMIZER)
    _sync(folder)


def _reason(error: BaseException) -> str:
    """That of the distributed checkpoint stands in what it wraps."""
    from torch.distributed.checkpoint import CheckpointException

    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error)


def _sums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _FILES)
    return {str(path.relative_to(folder)): _sum(path) for path in files}


def _sum(path: Path) -> list[int]:
    size = total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, total = size + len(block), zlib.crc32(block, total)
    return [size, total]


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


class Saver:
    """Writes one checkpoint at a time beside the training. One that cannot be written is said, and the run goes on:
    the last good one stays."""

    def __init__(self, folder: Path, config: Checkpointing, say: Callable[[str], None]) -> None:
        self._folder, self._config, self._say = folder, config, say
        self._thread: threading.Thread | None = None
        self._failure: CannotSave | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write it, once the one before is written."""
        self._settle()
        if self._failure is not None:
            self._say(f"warning: {self._failure}; the run goes on, and tries again at the next one")
            self._failure = None
        # a second Ctrl-C does not wait for it
        self._thread = threading.Thread(target=self._write, args=(snapshot,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last one; raises CannotSave where it could not be written."""
        self._settle()
        if self._failure is not None:
            raise self._failure

    def _settle(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write(self._folder, snapshot, self._config)
        except CannotSave as error:
            self._failure = error
        except OSError as error:
            self._failure = CannotSave(f"checkpoint of step {snapshot.step}: {error}")


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
    """The training state of one checkpoint, on the CPU: that of `take`, and `optimizer`. Damaged when it, or the
    weights beside it, cannot be read."""
    try:
        _check_files(path)
        check_file(path / "state.pt")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        check(isinstance(state, dict) and state.keys() >= _KEYS, "state.pt is no checkpoint of this program")
        return state | {"optimizer": read_tensors(path / _OPTIMIZER)}
    except pickle.UnpicklingError as error:  # torch's message recommends loading it unsafely
        raise Damaged(f"{path}: state.pt is no checkpoint of this program, or is damaged") from error
    except _BROKEN as error:
        raise Damaged(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _check_files(path: Path) -> None:
    """ValueError unless every file is as it was written."""
    sums = json.loads((path / _FILES).read_text())
    check(isinstance(sums, dict), f"{_FILES} is no list of files")
    found = _sums(path)
    lost = sorted(sums.keys() - found.keys())
    check(not lost, f"{', '.join(lost)} missing")
    changed = [name for name, value in sums.items() if found[name] != value]
    check(not changed, f"{', '.join(changed)} damaged")


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


# what the reading of a damaged file raises
_BROKEN = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
# what a run needs to go on
_KEYS = frozenset(("step", "config", "videos", "micro_batch", "precision", "rng", "scaler"))
_OPTIMIZER, _FILES = "optimizer", "files.json"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
