"""What contrastive pre-training reads: views of a video that differ in time, place, colour and sharpness.

Crops and colours follow MoCo v3 (arXiv 2104.02057, and BYOL's before it), one draw for all frames of a clip, so that
motion stays motion. Left out: solarising; and the operations come in one order, not in a random one.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from kernels.launch import check
from videomae.data.augment import crop_resize, random_resized_crop
from videomae.data.dataset import AUGMENT, CROP, Sample
from videomae.data.readers import ClipReader
from videomae.keys import Draws

_GREY = (0.299, 0.587, 0.114)  # of red, green and blue: how bright they seem (ITU-R BT.601)
# the colours' plane of YIQ, by which hues are turned
_TO_YIQ = np.array([_GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_BLUR = (0.1, 2.0)  # deviation in pixels, of a picture with this side
_BLUR_SIDE = 224
_NARROW = 0.25  # pixels: a neighbour weighs 3e-4 of the middle


@dataclass(frozen=True)
class ContrastAugment:
    """What makes the views of a video differ."""

    area: tuple[float, float] = (0.08, 1.0)  # of the crop, as a share of the frame
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # of the crop, width by height
    flip: bool = False  # mirror half of the views; never where motions to the left and to the right shall differ
    jitter: float = 0.8  # share of the views whose colours are changed, by
    brightness: float = 0.4  # a factor from 1 - this to 1 + this
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # a turn of at most so much of the circle; 0.5 is every hue
    grey: float = 0.2  # share of the views without colours
    blur: float = 0.5  # share of the blurred views: deviation 0.1 to 2 pixels where the short side is 224, less below

    def __post_init__(self) -> None:
        check(0 < self.area[0] <= self.area[1] <= 1, f"augment.area must rise within (0, 1]; got {self.area}")
        check(
            0 < self.aspect[0] <= self.aspect[1] < math.inf, f"augment.aspect must rise from above 0; got {self.aspect}"
        )
        for name in ("jitter", "brightness", "contrast", "saturation", "grey", "blur"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"augment.{name} must be in [0, 1]; got {value}")
        check(0 <= self.hue <= 0.5, f"augment.hue must be in [0, 0.5]; got {self.hue}")


class Colours(NamedTuple):
    """Factors of brightness, contrast and saturation; the hue's turn, in radians."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def draw_colours(config: ContrastAugment, draws: Draws) -> Colours:
    """Those of one view."""

    def between(most: float) -> float:
        return most * (2 * draws.uniform() - 1)

    colours = Colours()
    if draws.uniform() < config.jitter:
        gain, contrast, saturation = (
            1 + between(most) for most in (config.brightness, config.contrast, config.saturation)
        )
        colours = Colours(gain, contrast, saturation, 2 * math.pi * between(config.hue))
    return colours._replace(saturation=0.0) if draws.uniform() < config.grey else colours


def change_colours(frames: np.ndarray, colours: Colours) -> np.ndarray:
    """uint8 frames [T, h, w, 3], in this order: brighter, with more contrast around the clip's mean grey, more
    saturated, hues turned. One map of each pixel, cut off to bytes once at its end."""
    if colours == Colours():
        return frames
    grey = np.outer(np.ones(3), _GREY)
    cosine, sine = math.cos(colours.hue), math.sin(colours.hue)
    turn = _FROM_YIQ @ np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ _TO_YIQ
    colour = turn @ (colours.saturation * np.eye(3) + (1 - colours.saturation) * grey)
    gain = colours.brightness * colours.contrast
    mean = colours.brightness * float(frames.reshape(-1, 3).mean(axis=0, dtype=np.float64) @ _GREY)
    # greys are what neither saturation nor hue changes
    offset = (1 - colours.contrast) * mean + 0.5  # so that cutting off the fraction rounds
    pixels = torch.from_numpy(frames).float() @ torch.from_numpy(gain * colour.T).float()
    return pixels.add_(offset).clamp_(0, 255.0).byte().numpy()


def blurred(frames: np.ndarray, deviation: float) -> np.ndarray:
    """uint8 frames [T, h, w, 3] under a Gaussian of this deviation in pixels, edges repeated."""
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation).square())
    kernel = (weights / weights.sum()).expand(3, 1, 1, -1)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    padded = functional.pad(planes, (reach, reach, reach, reach), mode="replicate")
    across = functional.conv2d(padded, kernel, groups=3)
    both = functional.conv2d(across, kernel.transpose(2, 3), groups=3)
    return both.permute(0, 2, 3, 1).add(0.5).clamp_(0, 255.0).byte().contiguous().numpy()


@dataclass(frozen=True)
class ContrastReader(ClipReader):
    """Reads views of a video whose windows are as `ClipReader`'s; the rest of each is drawn by itself: a random resized
    crop, colours, a blur, a flip."""

    contrast: ContrastAugment = ContrastAugment()

    def _view(self, frames: np.ndarray, sample: Sample, out: np.ndarray) -> None:
        config, draws = self.contrast, Draws(self.seed, *sample, CROP)
        height, width = frames.shape[1:3]
        crop = random_resized_crop(height, width, draws, area=config.area, aspect=config.aspect)
        flip = config.flip and draws.below(2) == 1
        clip = crop_resize(frames, crop, self.size, flip=flip)
        draws = Draws(self.seed, *sample, AUGMENT)
        clip = change_colours(clip, draw_colours(config, draws))
        if draws.uniform() < config.blur:
            low, high = _BLUR
            deviation = (low + (high - low) * draws.uniform()) * min(self.size) / _BLUR_SIDE
            # a narrower one leaves bytes as they are
            clip = blurred(clip, deviation) if deviation > _NARROW else clip
        out[:] = clip
