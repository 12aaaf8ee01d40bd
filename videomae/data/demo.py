"""Demo videos in which the class is how one object moves; made once, then decoded like any other video.

A disc of two colours lies on a plain dark background. Its colours, place, size and angle in the middle of the video are
drawn from the seed alone; the motion only says how it comes there and goes on. So the middle
frame does not tell the class.
Files are lossless H.264 in RGB, so what decord reads is what `render` drew, and a plain background is exactly plain: a
cube without contrast has the target 0, and one grey level of coding noise would turn that into noise of unit variance.
"""

import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

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
_PARAMETERS = "demo.json"
_SPLITS = ("train", "test")
_CLASSES = "classes.txt"

# half widths of the picture per frame (the turn: radians); within 12 frames the disc's centre stays inside the picture
_STEP, _TURN, _GROWTH = (0.06, 0.09), (0.18, 0.30), (0.025, 0.035)
_RADIUS = (0.45, 0.70)
_CENTRE = 0.25
# grey levels of a channel: a dark background, and in each channel one half of the disc low and the other high
_DARK, _LOW, _HIGH = (10, 50), (85, 115), (210, 250)
# which half is high in red, green and blue: every choice but grey against white
_PAIRS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0))


@dataclass(frozen=True)
class _Look:
    """What a seed draws, the same for every motion: the middle of the video and how fast it changes."""

    colours: np.ndarray  # float64 [3, 3]: background, first half, second half; RGB
    centre: tuple[float, float]
    radius: float
    angle: float
    step: float
    turn: float
    growth: float


def render(seed: int, motion: int, *, frames: int, size: int) -> np.ndarray:
    """One video, uint8 [frames, size, size, 3] in RGB, the same on every machine.

    `motion` is an index into `MOTIONS`; `seed` counts modulo 2**64.
    The middle frame (odd `frames`) is the same for every motion.
    """
    if not 0 <= motion < len(MOTIONS):
        raise ValueError(f"motion must be in [0, {len(MOTIONS)}), got {motion}")
    if frames < 1 or size < 8:
        raise ValueError(f"frames must be at least 1 and size at least 8, got {frames} and {size}")
    look, name = _look(seed), MOTIONS[motion]
    time = np.arange(frames) - (frames - 1) / 2
    along = _DIRECTIONS.get(name, (0.0, 0.0))
    x = look.centre[0] + time * (look.step * along[0])
    y = look.centre[1] + time * (look.step * along[1])
    radius = np.maximum(look.radius + time * (look.growth * _GROWTHS.get(name, 0.0)), 0.0)
    angle = look.angle + time * (look.turn * _TURNS.get(name, 0.0))
    return _draw(look.colours, x=x, y=y, radius=radius, angle=angle, size=size)


def _look(seed: int) -> _Look:
    draws = Draws(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * (draws.below(2**32) / 2**32)

    first_high = np.array(_PAIRS[draws.below(len(_PAIRS))], dtype=bool)
    background, low, high = (np.array([round(between(*levels)) for _ in range(3)]) for levels in (_DARK, _LOW, _HIGH))
    first, second = np.where(first_high, high, low), np.where(first_high, low, high)
    return _Look(
        colours=np.array([background, first, second], dtype=np.float64),
        centre=(between(-_CENTRE, _CENTRE), between(-_CENTRE, _CENTRE)),
        radius=between(*_RADIUS),
        angle=between(0.0, 2 * math.pi),
        step=between(*_STEP),
        turn=between(*_TURN),
        growth=between(*_GROWTH),
    )


def _draw(
    colours: np.ndarray, *, x: np.ndarray, y: np.ndarray, radius: np.ndarray, angle: np.ndarray, size: int
) -> np.ndarray:
    """Smooth-edged two-coloured discs, one per frame; places and radii in half widths of the picture."""
    half = size / 2
    pixel = np.arange(size) + (0.5 - half)
    dx = pixel[None, None, :] - half * x[:, None, None]
    dy = pixel[None, :, None] - half * y[:, None, None]
    # rounded, because the last bit of a cosine differs between machines; +, -, * and sqrt do not
    cosine = np.array([round(math.cos(a) * 2**20) / 2**20 for a in angle])[:, None, None]
    sine = np.array([round(math.sin(a) * 2**20) / 2**20 for a in angle])[:, None, None]
    inside = np.clip(half * radius[:, None, None] - np.sqrt(dx * dx + dy * dy) + 0.5, 0.0, 1.0)[..., None]
    second = np.clip(dx * cosine + dy * sine + 0.5, 0.0, 1.0)[..., None]
    background, first, other = colours
    disc = first + (other - first) * second
    return np.floor(background + (disc - background) * inside + 0.5).astype(np.uint8)


# size is not 32, 48 or 96: decord2 3.4 cannot return videos of widths 16, 24, 32, 48, 96 and 144
def make_demo(
    folder: Path,
    *,
    train: int = 4800,
    test: int = 480,
    frames: int = 12,
    size: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The path of `train.csv` in a folder of demo videos, made there unless it is there already.

    `train` and `test` count videos, an equal number of each motion where they divide. The lists, `train.csv` and
    `test.csv`, hold lines `path label` with paths relative to the folder; `classes.txt` has the motions' names. The
    folder appears complete or not at all; one made with other parameters, or damaged, is made again. `progress` is
    called with the videos done and the videos to make. Several processes may call this at once: one makes the folder,
    the others wait. ValueError if the folder holds anything else.
    """
    counts = {"train": train, "test": test}
    if train < 1 or test < 0:
        raise ValueError(f"train must be at least 1 and test at least 0, got {train} and {test}")
    folder = Path(folder).absolute()
    parameters = {"format": _FORMAT, **counts, "frames": frames, "size": size, "seed": seed}
    if _is_complete(folder, parameters):
        return folder / "train.csv"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not _is_complete(folder, parameters):
            _refuse_others(folder)
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            _remove(unfinished)
            _write(unfinished, parameters, counts, progress)
            _publish(unfinished, folder)
    return folder / "train.csv"


def _write(
    folder: Path, parameters: dict[str, int], counts: dict[str, int], progress: Callable[[int, int], None] | None
) -> None:
    done, total = 0, sum(counts.values())
    for which, split in enumerate(_SPLITS):
        (folder / split).mkdir(parents=True)
        lines = []
        for index in range(counts[split]):
            motion = index % len(MOTIONS)
            path = f"{split}/{split}_{index:05d}.mp4"
            video = render(
                key(parameters["seed"], which, index), motion, frames=parameters["frames"], size=parameters["size"]
            )
            _encode(folder / path, video)
            lines.append(f"{path} {motion}\n")
            done += 1
            if progress is not None:
                progress(done, total)
        (folder / f"{split}.csv").write_text("".join(lines))
    (folder / _CLASSES).write_text("".join(f"{name}\n" for name in MOTIONS))
    (folder / _PARAMETERS).write_text(json.dumps(parameters, indent=1) + "\n")


def _encode(path: Path, video: np.ndarray) -> None:
    """Lossless RGB H.264, a key frame every fourth frame, so that a clip may start anywhere at little cost."""
    options = {"qp": "0", "g": "4", "preset": "ultrafast", "tune": "fastdecode"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=8, options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.thread_count = 1
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _is_complete(folder: Path, parameters: dict[str, int]) -> bool:
    try:
        if json.loads((folder / _PARAMETERS).read_text()) != parameters or not (folder / _CLASSES).is_file():
            return False
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return all(
        (folder / f"{split}.csv").is_file() and len(list((folder / split).glob("*.mp4"))) == parameters[split]
        for split in _SPLITS
    )


def _refuse_others(folder: Path) -> None:
    """ValueError unless everything in `folder` can be replaced: nothing, or what an earlier call put there."""
    if not folder.exists():
        return
    known = {_PARAMETERS, _CLASSES, *_SPLITS, *(f"{split}.csv" for split in _SPLITS)}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in known) if folder.is_dir() else ["it"]
    if foreign:
        raise ValueError(f"{folder} must be new, empty or a folder of demo videos, but it holds {foreign[0]}")


def _publish(unfinished: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    _remove(old)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the kernel frees it when the process ends, however it ends."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
