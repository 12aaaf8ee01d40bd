"""Crop, resize and flip of whole clips, in uint8; one draw for all frames of a clip."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

from kernels.launch import check
from videomae.keys import Draws

# the 13 places of a crop, in quarters of the free way (x, y): corners, centre, edge centres, quarter points (RECIPES
# D.1)
_PLACES = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)


@dataclass(frozen=True)
class Crop:
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Augment:
    """What pre-training does to a clip's frames: multi-scale crop, then a flip if asked for."""

    scales: tuple[float, ...] = (1, 0.875, 0.75, 0.66)  # of the short side
    flip: bool = False  # mirror half of the clips; the published scripts do not, the paper says yes on Kinetics

    def __post_init__(self) -> None:
        check(
            len(self.scales) > 0 and all(0 < s <= 1 for s in self.scales),
            f"augment.scales must be in (0, 1]; got {self.scales}",
        )


def multi_scale_crop(height: int, width: int, size: tuple[int, int], scales: tuple[float, ...], draws: Draws) -> Crop:
    """The crop of RECIPES D.1 out of height x width, to be resized to size (height, width).

    Its sides are scales of the short side whose ranks differ by at most one, snapped to size when within 2 pixels of
    it.
    """
    base = min(height, width)

    def sides(target: int, limit: int) -> list[int]:
        lengths = [max(int(base * scale), 1) for scale in scales]
        return [min(target, limit) if abs(length - target) < 3 else length for length in lengths]

    heights, widths = sides(size[0], height), sides(size[1], width)
    pairs = [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]
    h, w = pairs[draws.below(len(pairs))]
    x, y = _PLACES[draws.below(len(_PLACES))]
    return Crop((height - h) // 4 * y, (width - w) // 4 * x, h, w)


def random_resized_crop(
    height: int,
    width: int,
    draws: Draws,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
    """A crop of a share of the area drawn evenly, and of an aspect (width / height) drawn evenly on a log scale.

    After ten draws that do not fit in height x width, the largest crop in the middle whose aspect is in range
    (RECIPES E.1; the rule is torchvision's RandomResizedCrop's).
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        pixels = height * width * (area[0] + (area[1] - area[0]) * draws.uniform())
        ratio = math.exp(low + (high - low) * draws.uniform())
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Crop(draws.below(height - h + 1), draws.below(width - w + 1), h, w)
    h = min(height, round(width / aspect[0]))
    w = min(width, round(height * aspect[1]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def crop_resize(
    frames: np.ndarray, crop: Crop, size: tuple[int, int], *, flip: bool = False, antialias: bool = True
) -> np.ndarray:
    """The crop of uint8 frames [T, h, w, 3], resized bilinearly to size: uint8 [T, *size, 3].

    Antialiased as PIL's, which pre-training uses; without, as in fine-tuning and testing, a pixel is a mean of four
    whatever the scale.
    """
    cut = np.ascontiguousarray(frames[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width])
    pixels = torch.from_numpy(cut)
    if flip:
        pixels = pixels.flip(2)  # 15 times as fast as numpy's
    if pixels.shape[1:3] != tuple(size):
        # [T, 3, h, w] in channels-last memory: torch's uint8 path for it is 7 times as fast as PIL, and within 1 of it
        planes = interpolate(pixels.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", antialias=antialias)
        pixels = planes.permute(0, 2, 3, 1).contiguous()
    return pixels.numpy()


def resize_short(frames: np.ndarray, short: int) -> np.ndarray:
    """uint8 frames [T, h, w, 3] whose short side becomes `short` and the other keeps the aspect, rounded down; not
    antialiased."""
    height, width = frames.shape[1:3]
    base = min(height, width)
    size = (short * height // base, short * width // base)
    return crop_resize(frames, Crop(0, 0, height, width), size, antialias=False)


def crop_offsets(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    """(top, left) of `crops` squares of side size, evenly along the longer side of height x width, from end to end.

    One crop is in the middle (the published rule divides by zero), as each is along the shorter side. Raises
    ValueError where the square does not fit.
    """
    check(crops >= 1, f"a test needs at least one crop; got {crops}")
    check(min(height, width) >= size, f"a crop of {size} x {size} does not fit in {height} x {width}")
    free = max(height, width) - size
    along = [free * j // (crops - 1) for j in range(crops)] if crops > 1 else [free // 2]
    across = (min(height, width) - size) // 2
    return [(offset, across) if height >= width else (across, offset) for offset in along]
