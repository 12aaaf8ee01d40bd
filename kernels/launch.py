"""What every op shares: input checks, and the normalisation constants of its pixels."""

from functools import lru_cache

import torch
from torch import Tensor

# ImageNet's, on pixels scaled to [0, 1], red first: what the official VideoMAE data pipeline uses
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache(maxsize=64)
def channel_values(values: tuple[float, ...], repeats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A value for each channel, repeated, as a tensor. Remembered: making one from a list waits for a GPU."""
    return torch.tensor(values, dtype=dtype, device=device).repeat(repeats)


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless condition holds."""
    if not condition:
        raise ValueError(message)


def check_frames(frames: Tensor, cube: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid (T', H', W') of frames [B, T, H, W, C]; ValueError when they are no clips or the cube does not divide
    them."""
    check(frames.ndim == 5, f"frames must be [B, T, H, W, C]; got shape {tuple(frames.shape)}")
    known = frames.dtype.is_floating_point or frames.dtype == torch.uint8
    check(known, f"frames must be uint8, or floating point and already normalised; got {frames.dtype}")
    sizes = tuple(frames.shape[1:4])
    divides = all(size > 0 and size % step == 0 for size, step in zip(sizes, cube, strict=True))
    check(divides, f"frames, height and width {sizes} must be multiples of the cube {tuple(cube)}")
    return sizes[0] // cube[0], sizes[1] // cube[1], sizes[2] // cube[2]


def check_index(index: Tensor, name: str, batch: int, frames: Tensor) -> None:
    """ValueError unless index is an integer [batch, K] on the device of frames."""
    check(
        index.ndim == 2 and index.shape[0] == batch,
        f"{name} must be [{batch}, K], one row per clip; got shape {tuple(index.shape)}",
    )
    check(
        not index.dtype.is_floating_point and index.dtype != torch.bool,
        f"{name} must hold integer cube numbers; got {index.dtype} (a boolean mask: videomae.masking.Mask.from_bool)",
    )
    check(index.device == frames.device, f"{name} is on {index.device}, the frames on {frames.device}")
