"""Demo videos in which the class is how one object moves; made once, then decoded like any other video.

A disc of two colours lies on a plain dark background. Its colours, place, size and angle in the middle of the video are
drawn from the seed alone; the motion only says how it comes there and goes on. So the middle
frame does not tell the class. A second domain, to see what carries over, has squares instead, dark on a bright
background.
Files are lossless H.264 in RGB, so what decord reads is what `render` drew, and a plain background is exactly plain: a
cube without contrast has the target 0, and one grey level of coding noise would turn that into noise of unit variance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from videomae.data.demo_folder import make_folder
from videomae.keys import Draws, key

# unit step per frame, x to the right and y down
_DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "down": (0.0, 1.0),
    "up": (0.0, -1.0),
    "down-right": (0.75, 0.75),
    "down-left": (-0.75, 0.75),
    "up-right": (0.75, -0.75),
    "up-left": (-0.75, -0.75),
}
_TURNS = {"clockwise": 1.0, "counterclockwise": -1.0}
_GROWTHS = {"approach": 1.0, "retreat": -1.0}

MOTIONS: tuple[str, ...] = (*_DIRECTIONS, *_TURNS, *_GROWTHS)

_FORMAT = 1  # raise it when the same parameters give other pixels or files

# half widths of the picture per frame (the turn: radians); within 12 frames the disc's centre stays inside the picture
_STEP, TURN, _GROWTH = (0.06, 0.09), (0.18, 0.30), (0.025, 0.035)
_RADIUS = (0.45, 0.70)
_CENTRE = 0.25
# grey levels of a channel: a dark background, and in each channel one half of the disc low and the other high
_DARK, _LOW, _HIGH = (10, 50), (85, 115), (210, 250)
# which half is high in red, green and blue: every choice but grey against white
_PAIRS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0))


Look = Literal["discs", "squares"]
_SIDE = 0.875  # half a square's side, in radii of the disc that it stands for: about the same area


@dataclass(frozen=True)
class Disc:
    """An object, the same for every motion: how it is in the middle of the video and how fast it would change."""

    halves: np.ndarray  # float64 [2, 3]: the colours of its halves; RGB
    centre: tuple[float, float]
    radius: float
    angle: float
    step: float
    turn: float
    growth: float
    square: bool = False


def render(seed: int, motion: int, *, frames: int, size: int, look: Look = "discs") -> np.ndarray:
    """One video, uint8 [frames, size, size, 3] in RGB, the same on every machine.

    `motion` is an index into `MOTIONS`; `seed` counts modulo 2**64.
    The middle frame (odd `frames`) is the same for every motion.
    """
    if not 0 <= motion < len(MOTIONS):
        raise ValueError(f"motion must be in [0, {len(MOTIONS)}), got {motion}")
    if frames < 1 or size < 8:
        raise ValueError(f"frames must be at least 1 and size at least 8, got {frames} and {size}")
    background, disc = _look(seed)
    disc = replace(disc, square=look == "squares")
    picture = paint(background, disc, motion, np.arange(frames) - (frames - 1) / 2, size=size)
    return to_bytes(255.0 - picture if look == "squares" else picture)


def _look(seed: int) -> tuple[np.ndarray, Disc]:
    """What a seed draws: the colour of the background, float64 [3], and the object."""
    draws = Draws(seed)
    pair = draw_pair(draws)
    background = draw_background(draws)
    return background, Disc(
        halves=draw_halves(draws, pair),
        centre=(between(draws, -_CENTRE, _CENTRE), between(draws, -_CENTRE, _CENTRE)),
        radius=between(draws, *_RADIUS),
        angle=between(draws, 0.0, 2 * math.pi),
        step=between(draws, *_STEP),
        turn=between(draws, *TURN),
        growth=between(draws, *_GROWTH),
    )


def pace(disc: Disc, motion: int) -> float:
    """How fast it moves, from 0 for the slowest of this motion to 1 for the fastest."""
    name = MOTIONS[motion]
    value, (low, high) = (disc.step, _STEP)
    if name in _TURNS:
        value, (low, high) = (disc.turn, TURN)
    elif name in _GROWTHS:
        value, (low, high) = (disc.growth, _GROWTH)
    return (value - low) / (high - low)


def between(draws: Draws, low: float, high: float) -> float:
    """The next number, uniform in [low, high)."""
    return low + (high - low) * (draws.below(2**32) / 2**32)


def draw_background(draws: Draws) -> np.ndarray:
    """A dark colour, whole grey levels in float64 [3]."""
    return _levels(draws, _DARK)


def draw_pair(draws: Draws) -> np.ndarray:
    """In which channels the first half of a disc is the brighter one, bool [3]."""
    return np.array(_PAIRS[draws.below(len(_PAIRS))], dtype=bool)


def draw_halves(draws: Draws, pair: np.ndarray) -> np.ndarray:
    """The colours of a disc's halves, whole grey levels in float64 [2, 3]."""
    low, high = _levels(draws, _LOW), _levels(draws, _HIGH)
    return np.array([np.where(pair, high, low), np.where(pair, low, high)])


def _levels(draws: Draws, bounds: tuple[int, int]) -> np.ndarray:
    return np.array([float(round(between(draws, *bounds))) for _ in range(3)])


def paint(below: np.ndarray, disc: Disc, motion: int, time: np.ndarray, *, size: int) -> np.ndarray:
    """The disc, smooth-edged, over what is below it: float64 [frames, size, size, 3].

    `below` is a colour or such frames; `time` counts frames from the moment in which the disc is as it was drawn.
    """
    name = MOTIONS[motion]
    along = _DIRECTIONS.get(name, (0.0, 0.0))
    half = size / 2
    x = half * (disc.centre[0] + time * (disc.step * along[0]))
    y = half * (disc.centre[1] + time * (disc.step * along[1]))
    radius = half * np.maximum(disc.radius + time * (disc.growth * _GROWTHS.get(name, 0.0)), 0.0)
    angle = disc.angle + time * (disc.turn * _TURNS.get(name, 0.0))
    pixel = np.arange(size) + (0.5 - half)
    dx = pixel[None, None, :] - x[:, None, None]
    dy = pixel[None, :, None] - y[:, None, None]
    # rounded, because the last bit of a cosine differs between machines; +, -, * and sqrt do not
    cosine = np.array([round(math.cos(a) * 2**20) / 2**20 for a in angle])[:, None, None]
    sine = np.array([round(math.sin(a) * 2**20) / 2**20 for a in angle])[:, None, None]
    along, across = dx * cosine + dy * sine, dy * cosine - dx * sine
    away = np.maximum(np.abs(along), np.abs(across)) / _SIDE if disc.square else np.sqrt(dx * dx + dy * dy)
    inside = np.clip(radius[:, None, None] - away + 0.5, 0.0, 1.0)[..., None]
    second = np.clip(along + 0.5, 0.0, 1.0)[..., None]
    colour = disc.halves[0] + (disc.halves[1] - disc.halves[0]) * second
    return below + (colour - below) * inside


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """Grey levels, rounded to uint8."""
    return np.floor(picture + 0.5).astype(np.uint8)


# size is not 32, 48 or 96: decord2 3.4 cannot return videos of widths 16, 24, 32, 48, 96 and 144
def make_demo(
    folder: Path,
    *,
    train: int = 4800,
    test: int = 480,
    frames: int = 12,
    size: int = 40,
    seed: int = 0,
    look: Look = "discs",
    paces: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The path of `train.csv` in a folder of demo videos, made there unless it is there already.

    `train` and `test` count videos, an equal number of each motion where they divide. The lists, `train.csv` and
    `test.csv`, hold lines `path label` with paths relative to the folder; `classes.txt` has the motions' names. paces:
    classes of each motion, from slow to fast; the videos are the same, whatever their number. The folder appears
    complete or not at all; one made with other parameters, or damaged, is made again. `progress` is called with the
    videos done and the videos to make. Several processes may call this at once: one makes the folder, the others wait.
    ValueError if the folder holds anything else.
    """

    drawn: dict[str, Any] = {"frames": frames, "size": size}
    if look != "discs":
        drawn["look"] = look

    def video(which: int, index: int, path: str) -> tuple[np.ndarray, list[str]]:
        motion, own = index % len(MOTIONS), key(seed, which, index)
        label = motion * paces + min(int(pace(_look(own)[1], motion) * paces), paces - 1)
        return render(own, motion, **drawn), [f"{path} {label}"]

    if paces < 1:
        raise ValueError(f"paces must be at least 1, got {paces}")
    named = [f"{name}, pace {i + 1} of {paces}" for name in MOTIONS for i in range(paces)]
    classes = MOTIONS if paces == 1 else named
    parameters = {"format": _FORMAT, "train": train, "test": test, "seed": seed, **drawn}
    if paces > 1:
        parameters["paces"] = paces
    return make_folder(folder, video, parameters=parameters, mark="demo.json", classes=classes, progress=progress)
