"""Demo videos of several objects that move each in its own way, and where they are: to learn action detection on.

Each object is a disc of the demo's, and its label is its motion, one of the demo's too. At the key frame, the middle
one, all objects are whole and apart, and everything that is seen then is drawn from the seed alone: the key frame tells
no motion, and one object's motion nothing of another's. Before and after it they may hide one another and leave the
picture, but within 4 frames no centre does.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from kernels.launch import check
from videomae.data.demo import (
    MOTIONS,
    TURN,
    Disc,
    between,
    draw_background,
    draw_halves,
    draw_pair,
    paint,
    to_bytes,
)
from videomae.data.demo_folder import FRAME_RATE, make_folder
from videomae.keys import Draws, key

HEADER = "path,second,x1,y1,x2,y2,label"

_FORMAT = 1  # raise it when the same parameters give other pixels or files
_MOST = 3  # objects: a fourth would seldom find a place

# half widths of the picture (per frame): in 40 x 40 pixels what the demo's discs have in 32 x 32, but for the largest
_RADIUS, _STEP, _GROWTH = (0.36, 0.46), (0.050, 0.070), (0.020, 0.028)
# half widths from one object's edge to the next one's at the key frame: a pixel of the smallest picture
_GAP = 0.05
_SMALLEST = 40


def render_scene(seed: int, motions: Sequence[int], *, frames: int, size: int) -> np.ndarray:
    """One video, uint8 [frames, size, size, 3] in RGB, the same on every machine.

    `motions` are indices into `MOTIONS`, one for each object; later objects hide earlier ones. The key frame,
    `frames // 2`, is the same for all motions.
    """
    check(all(0 <= m < len(MOTIONS) for m in motions), f"motions must be in [0, {len(MOTIONS)}); got {motions}")
    check(frames >= 1, f"frames must be at least 1; got {frames}")
    background, discs = _scene(seed, len(motions), size)
    time = np.arange(frames) - frames // 2
    picture = background
    for disc, motion in zip(discs, motions, strict=True):
        picture = paint(picture, disc, motion, time, size=size)
    return to_bytes(picture)


def key_boxes(seed: int, objects: int, *, size: int) -> np.ndarray:
    """Where the objects are at the key frame: float64 [objects, 4], x1, y1, x2, y2 in fractions of the picture.

    A box holds every pixel of its object, and reaches from the first one's near edge to the last one's far edge.
    """
    background, discs = _scene(seed, objects, size)
    boxes = []
    for disc in discs:
        # at time 0 every motion shows the same
        alone = to_bytes(paint(background, disc, 0, np.zeros(1), size=size))[0]
        y, x = np.nonzero((alone != background).any(axis=-1))
        boxes.append((x.min() / size, y.min() / size, (x.max() + 1) / size, (y.max() + 1) / size))
    return np.array(boxes)


def _scene(seed: int, objects: int, size: int) -> tuple[np.ndarray, list[Disc]]:
    """What a seed draws: the colour of the background, float64 [3], and the objects."""
    check(1 <= objects <= _MOST, f"objects must be 1 to {_MOST}; got {objects}")
    check(size >= _SMALLEST, f"size must be at least {_SMALLEST}; got {size}")
    draws = Draws(seed)
    background = draw_background(draws)
    return background, [
        Disc(
            halves=draw_halves(draws, draw_pair(draws)),
            centre=centre,
            radius=radius,
            angle=between(draws, 0.0, 2 * math.pi),
            step=between(draws, *_STEP),
            turn=between(draws, *TURN),
            growth=between(draws, *_GROWTH),
        )
        for centre, radius in _places(draws, objects)
    ]


def _places(draws: Draws, objects: int) -> list[tuple[tuple[float, float], float]]:
    """Centres and radii of discs that are whole and apart: drawn evenly, all together, until they are."""
    while True:
        radii = [between(draws, *_RADIUS) for _ in range(objects)]
        places = [((between(draws, r - 1, 1 - r), between(draws, r - 1, 1 - r)), r) for r in radii]
        if all(_apart(*one, *other) for one, other in combinations(places, 2)):
            return places


def _apart(centre: tuple[float, float], radius: float, other: tuple[float, float], others: float) -> bool:
    across, down = centre[0] - other[0], centre[1] - other[1]
    return across * across + down * down >= (radius + others + _GAP) ** 2


# size is not 48 or 96: decord2 3.4 cannot return videos of widths 16, 24, 32, 48, 96 and 144
def make_scenes(
    folder: Path,
    *,
    train: int = 4800,
    test: int = 480,
    objects: int = 2,
    frames: int = 16,
    size: int = 56,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The path of `train.csv` in a folder of scenes, made there unless it is there already.

    `train` and `test` count videos, each with so many `objects`. The lists, `train.csv` and `test.csv`, have a header
    and a line for each object of each video: the video's path relative to the folder, the second of its key frame, the
    object's box in fractions of the picture, and the name of its motion; `classes.txt` has the motions' names.
    `train/` has the training videos alone: pre-training without labels is given that. Everything else is as with
    `demo.make_demo`.
    """
    check(frames >= 1, f"frames must be at least 1; got {frames}")
    second = frames // 2 / FRAME_RATE

    def video(which: int, index: int, path: str) -> tuple[np.ndarray, list[str]]:
        scene = key(seed, which, index)
        motions = draw_motions(scene, objects)
        boxes = key_boxes(scene, objects, size=size)
        rows = [
            ",".join((path, f"{second:g}", *(f"{side:.6f}" for side in box), MOTIONS[motion]))
            for box, motion in zip(boxes, motions, strict=True)
        ]
        return render_scene(scene, motions, frames=frames, size=size), rows

    parameters = {"format": _FORMAT, "train": train, "test": test, "objects": objects}
    return make_folder(
        folder,
        video,
        parameters={**parameters, "frames": frames, "size": size, "seed": seed},
        mark="scenes.json",
        classes=MOTIONS,
        header=HEADER,
        progress=progress,
    )


def draw_motions(seed: int, objects: int) -> list[int]:
    """How each object of a scene moves: drawn evenly, apart from one another and from what the key frame shows."""
    draws = Draws(seed, 1)
    return [draws.below(len(MOTIONS)) for _ in range(objects)]
