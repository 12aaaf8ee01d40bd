"""Boxes [n, 4] as (x1, y1, x2, y2), and what becomes of them when the frames below them change.

In files a box is in fractions of the frame. In memory it is in pixels and inclusive: x2 and y2 are the last ones that
it covers, x2 = x1 + w - 1 (RECIPES H.3). Everything here takes and gives pixels, as float64, but for the two ends.
"""

import numpy as np

from videomae.keys import Draws

# how far a side may move outwards and inwards in training, of the box's width and of its height
_OUT, _IN = np.array((0.2, 0.1)), np.array((0.1, 0.05))
# by how much a box grows in a test, both sides together
_MORE = np.array((0.1, 0.05))


def to_pixels(fractions: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fractions of a frame in its pixels: x1 * W, y1 * H, x2 * W - 1, y2 * H - 1."""
    return np.asarray(fractions, dtype=np.float64) * (width, height, width, height) - (0, 0, 1, 1)


def to_fractions(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels as fractions of the frame: x2 and y2 grow by the pixel that they cover, all are clipped to [0, 1] (RECIPES
    H.6)."""
    return ((boxes + (0.0, 0.0, 1.0, 1.0)) / (width, height, width, height)).clip(0, 1)


def scaled(boxes: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    """Boxes of frames that are resized, sizes being (height, width): all four sides are multiplied by the ratio, as in
    the published training, although they are inclusive."""
    down, across = after[0] / before[0], after[1] / before[1]
    return boxes * (across, down, across, down)


def cropped(boxes: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    """Boxes in a crop of that size (height, width): shifted, and clamped to it. One that lies outside is kept, as a
    line or a point on the crop's edge."""
    return _clamped(boxes - (left, top, left, top), *size)


def mirrored(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes in frames turned left to right: x1' = W - 1 - x2, x2' = W - 1 - x1."""
    x1, y1, x2, y2 = boxes.T
    return np.stack((width - 1 - x2, y1, width - 1 - x1, y2), axis=-1)


def jittered(boxes: np.ndarray, height: int, width: int, draws: Draws) -> np.ndarray:
    """Boxes whose sides each moved by themselves, by a share of the width or height (RECIPES H.4): x1 by U(-0.2, 0.1),
    x2 by U(-0.1, 0.2), y1 by U(-0.1, 0.05), y2 by U(-0.05, 0.1).

    They are clamped to the frame, and x2 and y2 are at least a pixel behind x1 and y1. Draws are taken box by box, so
    that a box moves alike whichever come after it.
    """
    drawn = np.array([draws.uniform() for _ in range(boxes.size)]).reshape(boxes.shape)
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = high - low + 1
    last = np.array((width - 1, height - 1))
    low = (low + sides * (drawn[:, :2] * (_OUT + _IN) - _OUT)).clip(0, last - 1)
    high = np.maximum((high + sides * (drawn[:, 2:] * (_OUT + _IN) - _IN)).clip(max=last), low + 1)
    return np.concatenate((low, high), axis=1)


def enlarged(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes as a test looks at them: wider by a tenth and higher by a twentieth, half on each side, and clamped to the
    frame (RECIPES H.4)."""
    more = (boxes[:, 2:] - boxes[:, :2] + 1) * _MORE / 2
    return _clamped(boxes + np.concatenate((-more, more), axis=1), height, width)


def _clamped(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return boxes.clip(0, (width - 1, height - 1, width - 1, height - 1))
