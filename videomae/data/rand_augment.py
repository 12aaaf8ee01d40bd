"""RandAugment (Cubuk et al., 2019) of whole uint8 clips: timm's operations in their increasing ranges (RECIPES E.1).

Pillow gives the values, frame by frame; where it is slow, the same sums are made on all frames of a clip at once.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.functional import embedding_bag

from kernels.launch import check
from videomae.keys import Draws

_FILL = 128  # grey where a moved frame shows nothing
# added before rounding down: float32 sums fall short of whole numbers by up to 6e-5; about one value in 8000 becomes
# one too high
_ROUNDING = 2.0**-13
# what is moved at once, of frames and of their lines: no faster than all, but 1080p would take 1 GB
_VALUES, _LINES = 1 << 25, 64


@dataclass(frozen=True)
class RandAugment:
    """Some of 15 operations, each the same for all frames of a clip."""

    magnitude: float = 7  # mean strength, of 10
    ops: int = 4  # drawn with replacement; 0: off
    deviation: float = 0.5  # of an operation's strength around the mean
    probability: float = 0.5  # that a drawn operation is applied

    def __post_init__(self) -> None:
        check(0 <= self.magnitude <= 10, f"rand_augment.magnitude must be in [0, 10]; got {self.magnitude}")
        check(self.ops >= 0, f"rand_augment.ops must not be negative; got {self.ops}")
        check(0 <= self.deviation <= 10, f"rand_augment.deviation must be in [0, 10]; got {self.deviation}")
        check(0 <= self.probability <= 1, f"rand_augment.probability must be in [0, 1]; got {self.probability}")

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """timm's notation, such as rand-m7-n4-mstd0.5-inc1, with timm's defaults for what is left out."""
        head, *parts = text.split("-")
        check(head == "rand", f"RandAugment's notation starts with rand, as rand-m7-n4-mstd0.5-inc1; got {text!r}")
        values = {"m": 10.0, "n": 2.0, "mstd": 0.0, "inc": 0.0, "p": 0.5}
        for part in parts:
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
            if match is None or match[1] not in values:
                raise ValueError(f"{part!r} in {text!r} is none of m, n, mstd, inc and p with a number")
            values[match[1]] = float(match[2])
        check(values["n"].is_integer(), f"n in {text!r} must be a whole number")
        check(values["inc"] == 1, f"{text!r} lacks inc1: only the ranges that increase with the magnitude are there")
        return cls(values["m"], int(values["n"]), values["mstd"], values["p"])

    def __call__(self, frames: np.ndarray, draws: Draws) -> np.ndarray:
        """uint8 [T, h, w, 3] to the same, contiguous; frames itself where no operation is applied."""
        check(
            frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3,
            f"frames must be uint8 [T, h, w, 3]; got {frames.dtype} {list(frames.shape)}",
        )
        frames = np.ascontiguousarray(frames)
        for _ in range(self.ops):
            operation = OPERATIONS[draws.below(len(OPERATIONS))]
            if draws.uniform() >= self.probability:
                continue
            level = min(max(self.magnitude + self.deviation * draws.normal(), 0), 10)
            frames = operation(frames, level, 1 - 2 * draws.below(2))
        return frames


def auto_contrast(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Each channel of each frame stretched to 0..255."""
    return _each(frames, ImageOps.autocontrast)


def equalize(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Each channel of each frame mapped to an even histogram."""
    return _each(frames, ImageOps.equalize)


def invert(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """255 - frames."""
    return ~frames


def rotate(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """By up to 30 degrees around the middle."""
    height, width = frames.shape[1:3]
    angle = -math.radians(sign * level / 10 * 30)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return _move(frames, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))


def posterize(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """The upper 4 to 0 bits."""
    bits = 4 - int(level / 10 * 4)
    return frames & np.uint8(256 - (1 << (8 - bits)))


def solarize(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Inverted from a threshold on, which sinks from 256 to 0."""
    threshold = 256 - int(level / 10 * 256)
    return _look_up(frames, bytes(i if i < threshold else 255 - i for i in range(256)))


def solarize_add(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Up to 110 added below 128."""
    added = int(level / 10 * 110)
    return _look_up(frames, bytes(min(i + added, 255) if i < 128 else i for i in range(256)))


def color(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Saturation times 0.1 to 1.9."""
    return np.array(ImageEnhance.Color(_stacked(frames)).enhance(_factor(level, sign))).reshape(frames.shape)


def contrast(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """The distance from a frame's mean brightness times 0.1 to 1.9."""
    greys = np.asarray(_stacked(frames).convert("L")).reshape(len(frames), -1)
    out = np.empty_like(frames)
    for grey, frame, changed in zip(greys, frames, out, strict=True):
        flat = Image.new("L", (256, 1), int(int(grey.sum()) / grey.size + 0.5))
        changed[:] = _look_up(frame, Image.blend(flat, _ramp(), _factor(level, sign)).tobytes())
    return out


def brightness(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Times 0.1 to 1.9."""
    return _look_up(frames, ImageEnhance.Brightness(_ramp()).enhance(_factor(level, sign)).tobytes())


def sharpness(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """The distance from a smoothed frame times 0.1 to 1.9."""
    smooth = frames.copy()
    for frame, inside in zip(frames, smooth[:, 1:-1, 1:-1], strict=True):
        lines = frame[:-2].astype(np.uint16)
        lines += frame[1:-1]
        lines += frame[2:]
        total = frame[1:-1, 1:-1] * np.uint16(4)
        for left in range(3):
            total += lines[:, left : lines.shape[1] - 2 + left]
        # Pillow's rounding of total / 13, which is never half-way
        total += 6
        inside[:] = total // np.uint16(13)
    # as grey images three times as wide, which Pillow need not repack
    first, second = (Image.fromarray(a.reshape(-1, frames.shape[2] * 3)) for a in (smooth, frames))
    return np.array(Image.blend(first, second, _factor(level, sign))).reshape(frames.shape)


def shear_x(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Each line moved sideways by up to 0.3 of its distance from the top."""
    return _move(frames, (1, sign * level / 10 * 0.3, 0, 0, 1, 0))


def shear_y(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Each column moved up or down by up to 0.3 of its distance from the left."""
    return _move(frames, (1, 0, 0, sign * level / 10 * 0.3, 1, 0))


def translate_x(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Sideways by up to 0.45 of the width."""
    return _move(frames, (1, 0, sign * level / 10 * 0.45 * frames.shape[2], 0, 1, 0))


def translate_y(frames: np.ndarray, level: float, sign: int) -> np.ndarray:
    """Up or down by up to 0.45 of the height."""
    return _move(frames, (1, 0, 0, 0, 1, sign * level / 10 * 0.45 * frames.shape[1]))


# each takes frames, a strength in [0, 10] and a sign; the order is timm's
OPERATIONS: tuple[Callable[[np.ndarray, float, int], np.ndarray], ...] = (
    *(auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add),
    *(color, contrast, brightness, sharpness, shear_x, shear_y, translate_x, translate_y),
)


def _factor(level: float, sign: int) -> float:
    return 1 + sign * level / 10 * 0.9


def _ramp() -> Image.Image:
    """The 256 levels, of which a pointwise operation of Pillow's makes its table."""
    return Image.frombytes("L", (256, 1), bytes(range(256)))


def _look_up(frames: np.ndarray, table: bytes) -> np.ndarray:
    # four times as fast as numpy's indexing
    return np.frombuffer(bytearray(frames).translate(table), np.uint8).reshape(frames.shape)


def _stacked(frames: np.ndarray) -> Image.Image:
    """The frames below each other, as one image."""
    return Image.fromarray(frames.reshape(-1, *frames.shape[2:]))


def _each(frames: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    out = np.empty_like(frames)
    for frame, changed in zip(frames, out, strict=True):
        changed[:] = np.asarray(operation(Image.fromarray(frame)))
    return out


def _move(frames: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Pillow's affine transform, bicubic: a pixel at (x, y) shows what is at matrix (x, y, 1), or grey outside.

    A pixel is a weighted sum of up to 16 others, with the same places and weights in all frames: an embedding bag over
    a table of one row for each pixel, with its values in all frames.
    """
    num_frames, height, width, _ = frames.shape
    if num_frames > 1 and frames.size > _VALUES:
        return np.concatenate([_move(half, matrix) for half in np.array_split(frames, 2)])
    # [T, h w] of 3 bytes, transposed
    pixels = np.ascontiguousarray(frames.reshape(num_frames, -1).view("V3").T)
    # the grey of the fill is 0 in it, so that weights of 0 leave it
    table = torch.from_numpy(pixels.view(np.uint8)).float().sub_(_FILL)
    moved = np.empty_like(pixels)
    for top in range(0, height, _LINES):
        places, weights = _taps(matrix, height, width, range(top, min(top + _LINES, height)))
        sums = embedding_bag(torch.from_numpy(places), table, mode="sum", per_sample_weights=torch.from_numpy(weights))
        levels = sums.add_(_FILL + _ROUNDING).clamp_(0, 255).to(torch.uint8).numpy()
        moved[top * width : top * width + len(levels)] = levels.view("V3")
    return np.ascontiguousarray(moved.T).view(np.uint8).reshape(frames.shape)


def _taps(matrix: tuple[float, ...], height: int, width: int, lines: range) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of some lines, the pixels it is a sum of, as int32 [lines * w, K], and their float32 weights."""
    a, b, c, d, e, f = matrix
    x, y = np.arange(width) + 0.5, np.array(lines)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    columns, rows = _cubic(x - 0.5, width), _cubic(y - 0.5, height)
    places = np.empty((*x.shape, len(rows), len(columns)), np.int32)
    weights = np.empty(places.shape, np.float32)
    for i, (row, row_weight) in enumerate(rows):
        row_weight, row = row_weight * inside, row * width
        for j, (column, column_weight) in enumerate(columns):
            np.add(row, column, out=places[..., i, j])
            np.multiply(row_weight, column_weight, out=weights[..., i, j])
    taps = (x.size, len(rows) * len(columns))
    return places.reshape(taps), weights.reshape(taps)


def _cubic(positions: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The neighbours (int32, repeated at the edges) of positions along one axis, and their float32 weights in the cubic
    convolution of slope -1; one neighbour where every position is a pixel's."""
    first = np.floor(positions)
    t = (positions - first).astype(np.float32)
    first = first.astype(np.int32)
    if not t.any():
        return [(np.clip(first, 0, size - 1), np.ones_like(t))]
    t2, t3 = t * t, t * t * t
    cubes = (2 * t2 - t - t3, 1 - 2 * t2 + t3, t + t2 - t3, t3 - t2)
    return [(np.clip(first + k, 0, size - 1), cube) for k, cube in zip((-1, 0, 1, 2), cubes, strict=True)]
