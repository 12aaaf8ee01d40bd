"""Crop, resize and flip of whole clips, in uint8; one draw for all frames of a clip."""

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


def crop_resize(frames: np.ndarray, crop: Crop, size: tuple[int, int], *, flip: bool = False) -> np.ndarray:
    """The crop of uint8 frames [T, h, w, 3], resized bilinearly (antialiased, as PIL's) to size: uint8 [T, *size,
    3]."""
    cut = frames[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if flip:
        cut = cut[:, :, ::-1]
    if cut.shape[1:3] == tuple(size):
        return np.ascontiguousarray(cut)
    # [T, 3, h, w] in channels-last memory: torch's uint8 path for it is 7 times as fast as PIL, and within 1 of it
    planes = torch.from_numpy(np.ascontiguousarray(cut)).permute(0, 3, 1, 2)
    resized = interpolate(planes, size=tuple(size), mode="bilinear", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()
