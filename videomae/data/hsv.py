"""Hue, saturation and value of whole clips, shifted: detection's colour augmentation (RECIPES H.3).

Units are OpenCV's for 8 bits: hue in [0, 180), saturation and value in [0, 255].
"""

from dataclasses import dataclass

import numpy as np

from videomae.keys import Draws

_HUE, _SATURATION, _VALUE = 10.0, 26.0, 26.0  # the largest shifts


@dataclass(frozen=True)
class HsvShift:
    """What is added to every pixel of a clip: the hue goes round, saturation and value stop at their ends."""

    hue: float
    saturation: float
    value: float


def draw_shift(draws: Draws) -> HsvShift:
    """Each part drawn evenly: hue from -10 to 10, saturation and value from -26 to 26."""
    hue, saturation, value = (most * (2 * draws.uniform() - 1) for most in (_HUE, _SATURATION, _VALUE))
    return HsvShift(hue, saturation, value)


def shift_hsv(frames: np.ndarray, shift: HsvShift) -> np.ndarray:
    """uint8 RGB frames [T, h, w, 3], shifted; a grey pixel has the hue of red, which more saturation shows.

    In float32, without a table's steps between. 16 frames of 224x224 take 25 ms on a core.
    """
    out = np.empty_like(frames)
    # frame by frame: the planes of one stay in the cache
    for image, shifted in zip(frames, out, strict=True):
        _shift(image, shift, shifted)
    return out


def _shift(image: np.ndarray, shift: HsvShift, out: np.ndarray) -> None:
    planes = np.empty((3, *image.shape[:2]), dtype=np.float32)
    planes[:] = image.transpose(2, 0, 1)
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    hue = _hue(red, green, blue, value, chroma)
    hue += np.float32(shift.hue / 30)  # in sixths of the circle
    # saturation: chroma / value, in 255ths
    np.maximum(value, 1, out=red)
    np.divide(chroma, red, out=chroma)
    chroma += np.float32(shift.saturation / 255)
    np.clip(chroma, 0, 1, out=chroma)
    value += np.float32(shift.value)
    np.clip(value, 0, 255, out=value)
    chroma *= value
    value += np.float32(0.5)  # so that cutting off the fraction rounds
    # how far each colour lies below the largest, as a function of the hue alone: 0 in the third around its own place,
    # 1 in the third across (https://en.wikipedia.org/wiki/HSL_and_HSV, "HSV to RGB alternative")
    for channel, place in enumerate((0, 2, 4)):
        away = np.subtract(hue, np.float32(place), out=red)
        np.abs(away, out=away)
        np.subtract(np.float32(3), np.abs(away - np.float32(3), out=away), out=away)
        away -= 1
        np.clip(away, 0, 1, out=away)
        away *= chroma
        np.subtract(value, away, out=away)
        out[..., channel] = away


def _hue(red: np.ndarray, green: np.ndarray, blue: np.ndarray, value: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """In sixths of the circle, from -1 to 5; 0 for grey."""
    per_chroma = np.float32(1) / np.maximum(chroma, 1)
    hue = np.where(value == red, green - blue, np.where(value == green, blue - red, red - green)) * per_chroma
    hue += np.where(value == red, np.float32(0), np.where(value == green, np.float32(2), np.float32(4)))
    return hue
