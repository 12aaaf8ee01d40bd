"""Which tile a kernel runs with: a shipped table of measured ones per GPU and shape, else the kernel's own default.

`python -m kernels.tune` measures and writes the table, `tiles.json`. Training only reads it, so that one table means
the same bits on every run; `table_hash()` goes into the run's record.

    {"NVIDIA H200 sm_90": {"bias_gelu.forward": {"bfloat16 D=3072": {"ROWS": 4, "COLS": 1024, "num_warps": 4}}}}
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tiles.json")
Tile = dict[str, int]


@dataclass(frozen=True)
class Target:
    """A GPU as tiles see it: its name, its compute capability (90 = sm_90), its multiprocessors."""

    name: str
    capability: int
    processors: int

    @property
    def key(self) -> str:
        """How the table names it."""
        return f"{self.name} sm_{self.capability}"

    @property
    def shared_bytes(self) -> int:
        """Shared memory one program can have."""
        return {75: 64, 80: 163, 90: 227, 100: 227, 103: 227}.get(self.capability, 99) * 1024


# the interpreter knows no GPU: it runs what a Hopper GPU would
INTERPRETER = Target("interpreter", 90, 132)
_assumed: Target | None = None
_trial: tuple[str, Tile] | None = None


@lru_cache
def _present(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    return Target(found.name, 10 * found.major + found.minor, found.multi_processor_count)


def target_of(device: torch.device) -> Target:
    """The GPU a kernel on that device is for."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return INTERPRETER
    return _present(torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def assuming(target: Target) -> Iterator[None]:
    """Inside, every device is taken for target: for compiling without the GPU."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


@contextmanager
def trying(op: str, tile: Tile) -> Iterator[None]:
    """Inside, op runs with this tile whatever the table says: for measuring it."""
    global _trial
    before, _trial = _trial, (op, tile)
    try:
        yield
    finally:
        _trial = before


@lru_cache
def table() -> dict[str, Any]:
    """GPU -> op -> shape -> tile."""
    return json.loads(TABLE.read_text())


def measured_on(capability: int) -> list[Target]:
    """The GPUs of that compute capability that the table has tiles for; their multiprocessors are not recorded."""
    ending = f" sm_{capability}"
    return [Target(key.removesuffix(ending), capability, 132) for key in table() if key.endswith(ending)]


def table_hash() -> str:
    """The first 12 hexadecimal digits of the table's SHA-256, or "none" without one."""
    return hashlib.sha256(TABLE.read_bytes()).hexdigest()[:12] if TABLE.exists() else "none"


def shape_key(dtype: torch.dtype, **sizes: int) -> str:
    """How the table spells a shape: `bfloat16 D=768 K=1536`."""
    return " ".join([str(dtype).removeprefix("torch."), *(f"{k}={v}" for k, v in sorted(sizes.items()))])


def tile(op: str, default: Callable[..., Tile], device: torch.device, dtype: torch.dtype, **sizes: int) -> Tile:
    """The tile of op at this shape on this device: the table's entry, else default(target, dtype, **sizes)."""
    if _trial is not None and _trial[0] == op:
        return _trial[1]
    target = target_of(device)
    measured = table().get(target.key, {}).get(op, {}).get(shape_key(dtype, **sizes))
    return measured if measured is not None else default(target, dtype, **sizes)
