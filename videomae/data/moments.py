"""What a movie shows around a moment, whichever way it is stored.

A movie is a file that `Video` reads, a folder of one-second clips, SECOND.mp4, or a folder of its frames as JPEG files,
in the order of their names.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg

from kernels.launch import check
from videomae.data.decode import Decoder, UnreadableVideo, Video
from videomae.data.sampling import KeyFrameClip

JPEG = (".jpg", ".jpeg")
# of a frame: what a time may be off by, as a sum of fractions that binary numbers cannot hold
_EPSILON = 1e-6


@dataclass(frozen=True)
class Timing:
    """Which second a movie's file, or folder of frames, begins at, and how many frames a second such a folder has.
    Clips of a second have its number for a name."""

    starts_at: float = 0.0
    frames_rate: float = 30.0

    def __post_init__(self) -> None:
        check(0 < self.frames_rate <= 1000, f"frames must come at a rate in (0, 1000]; got {self.frames_rate}")
        check(math.isfinite(self.starts_at), f"a movie must start at some second; got {self.starts_at}")


class _Movie(Protocol):
    """Frames that go by number, and a time for each. `Video` is one."""

    @property
    def duration(self) -> float: ...

    def __len__(self) -> int: ...

    def at(self, seconds: float) -> int: ...

    def read(self, indices: Sequence[int]) -> np.ndarray: ...


class Moment(NamedTuple):
    """The frames of a clip, not yet decoded: numbers of each movie, each once, in order; rows: which of all these are
    the clip's."""

    path: str
    parts: tuple[tuple[_Movie, list[int]], ...]
    rows: list[int]

    def read(self) -> np.ndarray:
        """uint8 [K, h, w, 3], those of all parts. Raises UnreadableVideo."""
        found = [movie.read(numbers) for movie, numbers in self.parts]
        if len(shapes := {frames.shape[1:3] for frames in found}) > 1:
            raise UnreadableVideo(self.path, f"its clips have different sizes: {sorted(shapes)}")
        return found[0] if len(found) == 1 else np.concatenate(found)


def open_moment(path: str, second: float, clip: KeyFrameClip, length: int, timing: Timing, decoder: Decoder) -> Moment:
    """The clip around a second of a movie (RECIPES H.2). Raises UnreadableVideo."""
    if _clip_path(path, int(second)) is not None:
        return _in_clips(path, int(second), clip, length, decoder)
    movie = _open(path, timing, decoder)
    numbers = _around(movie, second - timing.starts_at, clip, length, path)
    distinct = sorted(set(numbers))
    return Moment(path, ((movie, distinct),), np.searchsorted(distinct, numbers).tolist())


def frame_at(path: str, second: float, timing: Timing, decoder: Decoder) -> np.ndarray:
    """The frame of a movie at a second, uint8 [h, w, 3]. Raises UnreadableVideo."""
    if (clip := _clip_path(path, int(second))) is not None:
        return Video(clip, decoder).read([0])[0]
    movie = _open(path, timing, decoder)
    _check_inside(movie, second - timing.starts_at, path)
    return movie.read([movie.at(second - timing.starts_at)])[0]


def clip_seconds(folder: str | Path) -> frozenset[int]:
    """The seconds of which a folder has clips."""
    names = (os.path.splitext(entry.name) for entry in os.scandir(folder))
    return frozenset(int(stem) for stem, suffix in names if suffix == ".mp4" and stem.isdecimal())


def clip_path(folder: str | Path, second: int) -> str:
    """The clip of a second. Raises UnreadableVideo."""
    found = _clip_path(str(folder), second)
    if found is None:
        raise UnreadableVideo(folder, f"no clip {second}.mp4 in it")
    return found


def _clip_path(path: str, second: int) -> str | None:
    """None where path is no folder, or without a clip of that second."""
    paths = (os.path.join(path, f"{name}.mp4") for name in (second, f"{second:04d}"))
    return next((one for one in paths if os.path.isfile(one)), None)


def _open(path: str, timing: Timing, decoder: Decoder) -> _Movie:
    return FrameFolder(path, timing.frames_rate) if os.path.isdir(path) else Video(path, decoder)


def _check_inside(movie: _Movie, seconds: float, path: str) -> None:
    if not 0 <= seconds + _EPSILON < movie.duration:
        raise UnreadableVideo(path, f"it is {movie.duration:g} seconds long; the key frame would be at {seconds:g}")


def _around(movie: _Movie, seconds: float, clip: KeyFrameClip, length: int, path: str) -> list[int]:
    """Frame numbers of the clip around a time of the movie, seen at the clip's rate."""
    _check_inside(movie, seconds, path)
    if clip.rate is None:
        middle = movie.at(seconds)
        return [middle + offset for offset in clip.offsets(middle, len(movie) - middle, length)]
    before = max(math.floor(seconds * clip.rate + _EPSILON), 0)
    after = max(math.ceil((movie.duration - seconds) * clip.rate - _EPSILON), 1)
    return [movie.at(seconds + offset / clip.rate) for offset in clip.offsets(before, after, length)]


def _in_clips(folder: str, second: int, clip: KeyFrameClip, length: int, decoder: Decoder) -> Moment:
    """The clip around the first frame of a second: whole seconds on each side, until there are enough frames or one is
    not there."""

    def collect(step: int, first: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while 2 * len(found) < clip.span(length) and (path := _clip_path(folder, first)) is not None:
            movies[first] = Video(path, decoder)
            found += [(first, number) for number in _seen(movies[first], clip.rate)][::step]
            first += step
        return found

    movies: dict[int, Video] = {}
    after, before = collect(1, second), collect(-1, second - 1)
    shown = before[::-1] + after
    chosen = [shown[len(before) + offset] for offset in clip.offsets(len(before), len(after), length)]
    distinct = sorted(set(chosen))
    seconds = sorted({which for which, _ in distinct})
    parts = tuple((movies[which], [number for one, number in distinct if one == which]) for which in seconds)
    place = {frame: row for row, frame in enumerate(distinct)}
    return Moment(folder, parts, [place[frame] for frame in chosen])


def _seen(movie: _Movie, rate: float | None) -> list[int]:
    """All frames of a movie, seen at that rate."""
    if rate is None:
        return list(range(len(movie)))
    count = max(math.ceil(movie.duration * rate - _EPSILON), 1)
    return [movie.at(number / rate) for number in range(count)]


class FrameFolder:
    """A folder of a movie's frames, JPEG files in the order of their names; `len` is their number."""

    def __init__(self, path: str, rate: float) -> None:
        """Raises UnreadableVideo when there is none."""
        self.path, self._rate = path, rate
        try:
            self._names = _frame_names(path, os.stat(path).st_mtime_ns)
        except OSError as error:
            raise UnreadableVideo(path, error.strerror or str(error)) from error
        if not len(self):
            raise UnreadableVideo(path, "neither a clip of the second nor a JPEG file in it")

    def __len__(self) -> int:
        return len(self._names)

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self) / self._rate

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the first frame."""
        path, data = self._data(0)
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise UnreadableVideo(path, f"damaged: {error}") from error
        return height, width

    def at(self, seconds: float) -> int:
        """The number of the frame nearest to that time; of two, the earlier."""
        return min(max(math.ceil(seconds * self._rate - 0.5 - _EPSILON), 0), len(self) - 1)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames with these numbers, uint8 [K, h, w, 3]. Raises UnreadableVideo."""
        found = []
        for index in indices:
            path, data = self._data(index)
            try:
                found.append(simplejpeg.decode_jpeg(data, "RGB"))
            except ValueError as error:
                raise UnreadableVideo(path, f"damaged: {error}") from error
            if found[-1].shape != found[0].shape:
                raise UnreadableVideo(path, f"its size {found[-1].shape[:2]} is not the others', {found[0].shape[:2]}")
        return np.stack(found)

    def _data(self, index: int) -> tuple[str, bytes]:
        path = os.path.join(self.path, self._names[index])
        try:
            return path, Path(path).read_bytes()
        except OSError as error:
            raise UnreadableVideo(path, error.strerror or str(error)) from error


@dataclass(frozen=True)
class _Counted:
    """Names that count on from a number, which a movie's 27,000 frames usually have: held as their rule."""

    start: str
    digits: int
    suffix: str
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        return f"{self.start}{self.first + index:0{self.digits}d}{self.suffix}"


# a listing takes some 10 ms, and a movie has hundreds of key frames
@lru_cache(maxsize=1024)
def _frame_names(folder: str, changed: int) -> "_Counted | tuple[str, ...]":
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(JPEG))
    found = re.fullmatch(r"(.*?)(\d+)(\.\w+)", names[0]) if names else None
    if found is None:
        return tuple(names)
    rule = _Counted(found[1], len(found[2]), found[3], int(found[2]), len(names))
    return rule if all(rule[index] == name for index, name in enumerate(names)) else tuple(names)
