"""Where a data set's movies lie, and what is known of each before its frames are read: looked at once, in the main
process."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from videomae.data.dataset import SUFFIXES
from videomae.data.decode import UnreadableVideo
from videomae.data.facts import first_frame
from videomae.data.moments import FrameFolder, Timing, clip_path, clip_seconds

# folders beside annotations that may hold movies, best first
PLACES = ("clips/trainval", "clips", "videos", "frames", "movies")
_THREADS = 16  # which wait for storage more than they compute


@dataclass(frozen=True)
class Movie:
    """size: (height, width) of its upright frames. seconds: the first and the end of the last, None where nobody knows;
    clips: or the seconds that have one each."""

    path: str
    size: tuple[int, int]
    seconds: tuple[float, float | None] | None = None
    clips: frozenset[int] | None = None

    def has(self, seconds: np.ndarray) -> np.ndarray:
        """Which of these are in the movie: bool, of the same shape."""
        if self.clips is not None:
            return np.isin(seconds, np.fromiter(self.clips, dtype=np.float64))
        assert self.seconds is not None
        start, end = self.seconds
        return (seconds >= start) & (seconds < (np.inf if end is None else end))


def find_movies(home: Path, videos: str | Path | None, names: Iterable[str]) -> tuple[dict[str, str], list[Path]]:
    """Paths by name of the movies that are found, and where they were looked for.

    videos: the folder of the movies; None: `PLACES` in home, or beside it where it is called annotations. NAME.mp4, or
    another suffix of a video, comes before the folder NAME; of several, the first in alphabetical order.
    """
    if videos is not None:
        root = Path(videos).expanduser()
        places = [root, root / "trainval"]
    else:
        # annotations may have a folder to themselves
        near = [home, home.resolve().parent] if home.resolve().name == "annotations" else [home]
        places = [folder / below for folder in near for below in PLACES]
    places = [place.resolve() for place in places if place.is_dir()]
    wanted, found = set(names), dict[str, str]()
    for place in places:
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in SUFFIXES and stem in wanted and _is_better(found.get(stem), place, is_file=True):
                found[stem] = entry.path
            elif entry.name in wanted and _is_better(found.get(entry.name), place, is_file=False) and entry.is_dir():
                found[entry.name] = entry.path
    return found, places


def _is_better(known: str | None, place: Path, *, is_file: bool) -> bool:
    """Whether a path in place goes before the known one: an earlier place's stays, and a file in the same one."""
    return known is None or (is_file and os.path.dirname(known) == str(place) and os.path.isdir(known))


def look_at(
    paths: Mapping[str, str], seconds: Mapping[str, float], timing: Timing
) -> tuple[dict[str, Movie], dict[str, str]]:
    """Movies by name, and why some cannot be read. seconds: one of each movie's key frames, by name."""

    def look(name: str) -> Movie | str:
        try:
            return _look(paths[name], seconds[name], timing)
        except UnreadableVideo as error:
            return str(error)

    names: Sequence[str] = tuple(paths)
    with ThreadPoolExecutor(min(_THREADS, 2 * (os.cpu_count() or 1))) as pool:
        found = dict(zip(names, pool.map(look, names), strict=True))
    movies = {name: movie for name, movie in found.items() if isinstance(movie, Movie)}
    return movies, {name: why for name, why in found.items() if isinstance(why, str)}


def _look(path: str, second: float, timing: Timing) -> Movie:
    """Raises UnreadableVideo."""
    if not os.path.isdir(path):
        height, width, length = first_frame(path)
        end = None if length is None else timing.starts_at + length
        return Movie(path, (height, width), seconds=(timing.starts_at, end))
    if clips := clip_seconds(path):
        height, width, _ = first_frame(clip_path(path, int(second) if int(second) in clips else min(clips)))
        return Movie(path, (height, width), clips=clips)
    folder = FrameFolder(path, timing.frames_rate)
    return Movie(path, folder.size, seconds=(timing.starts_at, timing.starts_at + folder.duration))
