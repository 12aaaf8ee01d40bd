"""What every op shares: where it runs, how a kernel starts, input checks, and the normalisation of its pixels.

A CUDA tensor runs the Triton kernel, any other the reference; under TRITON_INTERPRET=1 a CPU tensor runs the kernel
too, in Triton's interpreter. Nothing falls back from a kernel to a reference in silence.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# ImageNet's, on pixels scaled to [0, 1], red first: what the official VideoMAE data pipeline uses
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_interpret = os.environ.get("TRITON_INTERPRET") == "1"
_recorded: list["Launch"] | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel start: what is needed to run it, or to compile it without running it."""

    kernel: Any  # a triton JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]  # compile-time constants, num_warps, num_stages


def runs_triton(x: Tensor) -> bool:
    """CUDA tensors run the kernel, all others the reference; under TRITON_INTERPRET=1 a CPU tensor too."""
    return x.is_cuda or _interpret


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start kernel on grid, on the device of its first tensor; a grid with nothing in it starts nothing."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, options))
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device_of(first):  # Triton starts on the current device, which need not be the tensor's
        kernel[grid](*arguments, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, kernels are not started but listed: with meta tensors, what an op would start and with which types."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as torch is told to, by either of its settings; other types have one way."""
    # torch.get_float32_matmul_precision raises once the newer setting was used
    fast = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if fast else "ieee"


@lru_cache(maxsize=64)
def channel_values(values: tuple[float, ...], repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A value for each channel, repeated, as a tensor. Remembered: making one from a list waits for a GPU.

    Not for use inside a registered op: under CUDA graphs of torch.compile, what an op makes must not outlive it.
    """
    # one first made in inference mode would be of no use in training
    with torch.inference_mode(False):
        return torch.tensor(values * repeats, dtype=dtype, device=device)


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless condition holds."""
    if not condition:
        raise ValueError(message)


def check_contiguous(**tensors: Tensor | None) -> None:
    """ValueError for the first that is not contiguous: the copy is the caller's to make, where it can be seen."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous; got shape {tuple(x.shape)} with strides {x.stride()}")


def check_same_device(**tensors: Tensor | None) -> None:
    """ValueError unless all lie on the device of the first."""
    present = {name: x for name, x in tensors.items() if x is not None}
    first, reference = next(iter(present.items()))
    for name, x in present.items():
        if x.device != reference.device:
            raise ValueError(f"{name} is on {x.device}, {first} on {reference.device}")


def check_kernel_dtypes(**tensors: Tensor | None) -> None:
    """ValueError unless each is bfloat16, float16 or float32, which is what the kernels take (references take more)."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in KERNEL_DTYPES:
            raise ValueError(f"{name} must be bfloat16, float16 or float32 to run a kernel; got {x.dtype}")


def check_frames(frames: Tensor, cube: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid (T', H', W') of frames [B, T, H, W, C]; ValueError when they are no clips or the cube does not divide
    them."""
    check(frames.ndim == 5, f"frames must be [B, T, H, W, C]; got shape {tuple(frames.shape)}")
    known = frames.dtype.is_floating_point or frames.dtype == torch.uint8
    check(known, f"frames must be uint8, or floating point and already normalised; got {frames.dtype}")
    sizes = tuple(frames.shape[1:4])
    divides = all(size > 0 and size % step == 0 for size, step in zip(sizes, cube, strict=True))
    check(divides, f"frames, height and width {sizes} must be multiples of the cube {tuple(cube)}")
    # offsets inside a clip are 32 bits wide, those of clips 64
    check(frames[:1].numel() < 2**31, f"a clip must have fewer than 2^31 values; got {tuple(frames.shape[1:])}")
    check_contiguous(frames=frames)
    return sizes[0] // cube[0], sizes[1] // cube[1], sizes[2] // cube[2]


def check_index(index: Tensor, name: str, frames: Tensor) -> None:
    """ValueError unless index is a contiguous integer [B, K] on the device of frames [B, ...]."""
    # shapes in messages stand as tuples: a bare size would make torch.compile compile anew for every batch
    check(
        index.ndim == 2 and index.shape[0] == frames.shape[0],
        f"{name} must have one row per clip, {tuple(frames.shape[:1])}; got shape {tuple(index.shape)}",
    )
    check(
        not index.dtype.is_floating_point and index.dtype != torch.bool,
        f"{name} must hold integer cube numbers; got {index.dtype} (a boolean mask: videomae.masking.Mask.from_bool)",
    )
    check(index.device == frames.device, f"{name} is on {index.device}, the frames on {frames.device}")
    check_contiguous(**{name: index})
