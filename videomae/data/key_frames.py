"""Key frames: moments of videos with boxes, and the classes of each; found, checked and counted before training.

Ragged things lie flat: 200,000 key frames are some ten arrays, which processes share or get as bytes.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels.launch import check
from videomae.data.annotated_boxes import Annotated, check_boxes, read_annotated, read_boxes, some
from videomae.data.ava import Detected
from videomae.data.box_rows import BoxRows, line_of
from videomae.data.dataset import Root, VideoList
from videomae.data.moments import Timing
from videomae.data.movies import Movie, find_movies, look_at


class BoxTable(NamedTuple):
    """The boxes of K key frames, M in all, with L labels. box: float32 [M, 4], fractions. score: float32 [M]. column:
    int32 [L]. Key frame i has boxes first[i] to first[i + 1], and box j the labels label_first[j] to
    label_first[j + 1]; both int64."""

    first: np.ndarray
    box: np.ndarray
    score: np.ndarray
    label_first: np.ndarray
    column: np.ndarray


@dataclass(frozen=True, eq=False)
class KeyFrames:
    """K moments of videos, each with boxes.

    videos: a path for each, a movie's file or folder. names: the video's id for each. seconds: float64 [K]. sizes:
    int32 [K, 2], height and width of the video's frames. classes: names by column; class_ids: ids by column; evaluated:
    ids that count in a test. ground_truth: all annotated rows of the split, those of moments that are not here too.
    excluded: (video, second) of moments that do not count. boxes_from: what the boxes are, in words; is_annotated:
    whether they are the annotated ones.
    """

    videos: VideoList
    names: tuple[str, ...]
    seconds: np.ndarray
    sizes: np.ndarray
    table: BoxTable
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    evaluated: tuple[int, ...]
    ground_truth: BoxRows
    excluded: tuple[tuple[str, float], ...]
    boxes_from: str
    is_annotated: bool
    timing: Timing

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_boxes(self) -> int:
        return len(self.table.box)

    @property
    def most_boxes(self) -> int:
        """Of one key frame."""
        return int(np.diff(self.table.first).max(initial=0))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, counted."""
        return self.videos.notes

    def boxes_of(self, index: int) -> np.ndarray:
        """float32 [n, 4], in fractions of the frame."""
        return self.table.box[self._rows(index)]

    def scores_of(self, index: int) -> np.ndarray:
        """float32 [n], how sure it is that there is something in each box; 1 where it is annotated without a score."""
        return self.table.score[self._rows(index)]

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of its frames."""
        height, width = self.sizes[index]
        return int(height), int(width)

    def labels_of(self, index: int) -> np.ndarray:
        """bool [n, classes], the classes of each box by column; none of a box that was only detected."""
        rows = self._rows(index)
        first = self.table.label_first[rows.start : rows.stop + 1]
        out = np.zeros((rows.stop - rows.start, len(self.classes)), dtype=bool)
        out[np.repeat(np.arange(len(out)), np.diff(first)), self.table.column[first[0] : first[-1]]] = True
        return out

    def annotated(self, index: int) -> list[tuple[str, ...]] | None:
        """The names of each box's classes; None where boxes are detected, so that nobody said."""
        if not self.is_annotated:
            return None
        return [tuple(self.classes[column] for column in np.flatnonzero(row)) for row in self.labels_of(index)]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any video's name, second, box, score, label or class, or their order; not
        where the set moves as a whole."""
        digest = hashlib.sha256("\n".join((*self.classes, "", *self.names)).encode("utf-8", "surrogateescape"))
        for array in (np.asarray(self.class_ids, dtype=np.int64), self.seconds, *self.table):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def _rows(self, index: int) -> slice:
        return slice(int(self.table.first[index]), int(self.table.first[index + 1]))


def find_key_frames(
    source: str | Path,
    split: str = "train",
    *,
    videos: str | Path | None = None,
    boxes: str | Path | None = None,
    score_at_least: float = 0.8,
    starts_at: float = 0.0,
    frames_rate: float = 30.0,
    classes: Sequence[str] | None = None,
    exclude: bool = True,
    allow_missing: bool = False,
) -> KeyFrames:
    """The key frames of one split: "train", "val", "test" or a name of one's own.

    source: a folder of AVA's files (RECIPES H.1), in it or in its `annotations`; a csv of one's own, see
    `box_rows.read_rows`, whose paths are relative to it; or a folder of train.csv and val.csv or test.csv of that kind,
    with the classes' names in classes.txt or else in alphabetical order.
    videos: the folder of the movies, see `movies.find_movies`; starts_at, frames_rate: see `moments.Timing`.
    boxes: those to be classified in a test, a json of AVA's or a csv (`video,second,x1,y1,x2,y2,...,score` or as a
    first line names them), of which those that score at least score_at_least count; else the annotated ones.
    classes: the training set's. exclude: leave out AVA's excluded moments. allow_missing: leave out, and note, key
    frames without a video, which are otherwise refused.

    Raises ValueError, which counts and names what is wrong: boxes outside of the frame, empty ones, unknown classes,
    videos that are not there or cannot be read, seconds that they do not have.
    """
    check(0 <= score_at_least <= 1, f"score_at_least must be in [0, 1]; got {score_at_least}")
    timing = Timing(starts_at, frames_rate)
    annotated = read_annotated(source, split, classes, exclude=exclude)
    notes = list(annotated.notes)
    file = None if boxes is None or split == "train" else Path(boxes)
    if file is None:
        rows = _annotated_rows(annotated)
        notes += [] if split == "train" else [_instead(annotated)]
    else:
        rows = _detected_rows(file, read_boxes(file, annotated, score_at_least))
        notes += _not_annotated(rows, annotated)
    rows, movies, dropped = _present(_not_excluded(rows, annotated, notes), annotated, videos, timing, allow_missing)
    notes += dropped if split == "train" else [f"{note}, their boxes count as missed" for note in dropped]
    if file is not None:
        rows = _in_fractions(rows, movies, notes)
        notes += _without_boxes(rows, annotated, score_at_least)
    paths, names, seconds, sizes, table = _assembled(rows, movies, len(annotated.classes))
    return KeyFrames(
        videos=VideoList(paths, notes=tuple(notes)),
        names=names,
        seconds=seconds,
        sizes=sizes,
        table=table,
        classes=annotated.classes,
        class_ids=annotated.class_ids,
        evaluated=annotated.evaluated,
        ground_truth=annotated.rows,
        excluded=annotated.excluded,
        boxes_from="as annotated" if file is None else f"of {file.name}, with a score of at least {score_at_least:g}",
        is_annotated=file is None,
        timing=timing,
    )


class _Rows(NamedTuple):
    """A box and one of its classes a row, as yet without order. file: where they stand, and place: as which row of it.
    box: fractions, or pixels of frames of size (height, width), 0 where nobody knows. column: -1 for no class."""

    file: Path
    names: tuple[str, ...]
    place: np.ndarray
    video: np.ndarray
    second: np.ndarray
    box: np.ndarray
    size: np.ndarray
    person: np.ndarray
    column: np.ndarray
    score: np.ndarray

    def take(self, kept: np.ndarray) -> "_Rows":
        return _Rows(self.file, self.names, *(column[kept] for column in self[2:]))

    def where(self, row: int) -> str:
        """The file, and the line or, in json, the number of the entry."""
        place = int(self.place[row])
        is_json = self.file.suffix.lower() == ".json"
        return f"{self.file}, entry {place + 1}" if is_json else f"{self.file}:{line_of(self.file, place)}"

    def moments(self) -> np.ndarray:
        """complex128, one number for a video and a second: numpy compares and sorts these exactly."""
        return self.video + 1j * self.second


def _annotated_rows(annotated: Annotated) -> _Rows:
    rows = annotated.rows
    count = len(rows)
    return _Rows(
        annotated.file,
        tuple(map(str, rows.names)),
        np.arange(count),
        rows.video,
        rows.second,
        rows.box.clip(0, 1),
        np.ones((count, 2), dtype=np.int64),
        np.zeros(count, dtype=np.int64) if rows.person is None else rows.person,
        # ids count on from the first one
        rows.label.astype(np.int64) - annotated.class_ids[0],
        np.ones(count) if rows.score is None else rows.score,
    )


def _detected_rows(file: Path, found: Detected) -> _Rows:
    names = tuple(dict.fromkeys(found.videos))
    code = {name: number for number, name in enumerate(names)}
    video = np.array([code[name] for name in found.videos], dtype=np.int64)
    nobody = np.zeros(len(video), dtype=np.int64)
    rest = (found.seconds, found.pixels, found.sizes, nobody, nobody - 1, found.scores)
    return _Rows(file.expanduser(), names, found.rows, video, *rest)


def _not_annotated(rows: _Rows, annotated: Annotated) -> list[str]:
    """A note where videos of detected boxes are not annotated. Raises ValueError where none is."""
    wanted = [str(name) for name in annotated.rows.names]
    others = sorted(set(rows.names) - set(wanted))
    total = f"{rows.file}: {len(others):,} of {len(rows.names):,} videos are not in {annotated.file}"
    named = f"{some(others)}; videos go by the same names in both, there {some(wanted)}"
    check(len(others) < len(rows.names), f"{total}: {named}")
    return [f"{total}: {some(others)}"] if others else []


def _instead(annotated: Annotated) -> str:
    note = "the boxes to be classified are the annotated ones: detected ones give lower results"
    detections = annotated.ava.detections if annotated.ava is not None else None
    return note if detections is None else f"{note}; {detections} has some (--data.boxes)"


def _not_excluded(rows: _Rows, annotated: Annotated, notes: list[str]) -> _Rows:
    code = {name: number for number, name in enumerate(rows.names)}
    out = np.array([code[name] + 1j * second for name, second in annotated.excluded if name in code], dtype=complex)
    moments = rows.moments()
    gone = np.isin(moments, out)
    if gone.any():
        notes.append(f"{len(np.unique(moments[gone])):,} key frames are among those that AVA excludes: left out")
    return rows.take(~gone)


def _present(
    rows: _Rows, annotated: Annotated, videos: str | Path | None, timing: Timing, allow_missing: bool
) -> tuple[_Rows, dict[str, Movie], list[str]]:
    """Rows whose movies are there and have their second, these movies, and what was left out. Raises ValueError when
    something would be that may not, or all."""
    check(videos is None or Path(videos).expanduser().is_dir(), f"no such folder of videos (--data.videos): {videos}")
    dropped: list[str] = []
    movies = _find_movies(rows, annotated, videos, timing, allow_missing, dropped)
    left = _inside(rows, movies, allow_missing, dropped)
    check(len(left.video) > 0, f"no key frame of {rows.file} is left")
    return left, movies, dropped


def _find_movies(
    rows: _Rows,
    annotated: Annotated,
    videos: str | Path | None,
    timing: Timing,
    allow_missing: bool,
    notes: list[str],
) -> dict[str, Movie]:
    """By name. Raises ValueError when some are not there or cannot be read, unless that is allowed."""
    numbers, first = np.unique(rows.video, return_index=True)
    seconds = {rows.names[number]: float(rows.second[row]) for number, row in zip(numbers, first, strict=True)}
    if annotated.ava is not None:
        paths, places = find_movies(annotated.home, videos, seconds)
    else:
        root = None if videos is None else Root.of(videos)
        home = annotated.home if root is None else Path(root.real)
        paths, places = _own_paths(home, root, rows, dict(zip(seconds, first, strict=True))), [home]
    missing = [name for name in seconds if name not in paths]
    where = " or ".join(map(str, places)) or f"folders of movies beside {annotated.file}"
    first_of = dict(zip(seconds, first, strict=True))
    total, wrong = f"of {len(seconds):,} videos", f"are not in {where}"
    _allow(rows, [first_of[name] for name in missing], f"{total} {wrong}: {some(missing)}", allow_missing, notes)
    movies, broken = look_at(paths, seconds, timing)
    wrong = f"cannot be read: {some(list(broken.values()))}"
    _allow(rows, [first_of[name] for name in broken], f"{total} {wrong}", allow_missing, notes)
    return movies


def _own_paths(home: Path, root: Root | None, rows: _Rows, first: Mapping[str, int]) -> dict[str, str]:
    """Of the videos that are there; `.mp4` is understood where a name has no dot, as in lists of videos. first: a row
    of each by name. Raises ValueError for one outside of the root."""
    found = {}
    for name, row in first.items():
        path = os.path.join(home, name) if root is None else root.place(name)
        if path is None:
            assert root is not None
            raise ValueError(f"{rows.where(row)}: {root.refusal(name)}")
        if "." not in os.path.basename(name) and not os.path.isdir(path):
            path += ".mp4"
        if "::" in path or os.path.exists(path):
            found[name] = path
    return found


def _allow(rows: _Rows, wrong: Sequence[int], what: str, allowed: bool, notes: list[str]) -> None:
    """wrong: a row of each thing that is, in the order in which they are named."""
    if not wrong:
        return
    said = f"{rows.where(wrong[0])}: {len(wrong):,} {what}"
    check(allowed, f"{said} (--data.allow-missing leaves them out)")
    notes.append(f"{said}: left out")


def _inside(rows: _Rows, movies: Mapping[str, Movie], allow_missing: bool, notes: list[str]) -> _Rows:
    """Those whose movie is there and has their second. Raises ValueError when one has not, unless that is allowed."""
    order = np.argsort(rows.video, kind="stable")
    starts = np.searchsorted(rows.video[order], np.arange(len(rows.names) + 1))
    there, has = np.zeros(len(order), dtype=bool), np.zeros(len(order), dtype=bool)
    for number, name in enumerate(rows.names):
        if (movie := movies.get(name)) is not None:
            own = order[starts[number] : starts[number + 1]]
            there[own], has[own] = True, movie.has(rows.second[own])
    moments = rows.moments()
    gone = np.flatnonzero(there & ~has)
    outside, first = np.unique(moments[gone], return_index=True)
    named = [_outside(rows.names[int(one.real)], one.imag, movies) for one in outside[:20]]
    shown = some([*named, *([""] * (len(outside) - len(named)))])
    what = f"of {len(np.unique(moments)):,} key frames are at seconds that their videos do not have: {shown}"
    _allow(rows, gone[first].tolist(), what, allow_missing, notes)
    return rows.take(has)


def _outside(name: str, second: float, movies: Mapping[str, Movie]) -> str:
    movie = movies[name]
    if movie.seconds is None:
        return f"{name} has no clip of {second:g}"
    start, end = movie.seconds
    to = "" if end is None else f" to {end:g}"
    return f"{name} at {second:g} (it has {start:g}{to}, see --data.starts-at)"


def _in_fractions(rows: _Rows, movies: Mapping[str, Movie], notes: list[str]) -> _Rows:
    """Boxes whose size nobody knew are of the movie's. Raises ValueError when they are not in the frame."""
    if not (rows.size > 0).all():
        taken = f"{rows.file.name}: boxes are taken as pixels of the videos as they are here"
        notes.append(f"{taken}, as no _min.json beside the annotations has other sizes")
    own = np.array([movies[name].size if name in movies else (1, 1) for name in rows.names])
    height, width = np.where(rows.size > 0, rows.size, own[rows.video]).T
    box = rows.box / np.stack((width, height, width, height), axis=-1)
    check_boxes(rows.file, rows.names, rows.video, rows.second, box)
    return rows._replace(box=box.clip(0, 1))


def _without_boxes(rows: _Rows, annotated: Annotated, least: float) -> list[str]:
    """A note where annotated key frames have no box to be classified."""
    truth = _not_excluded(_annotated_rows(annotated), annotated, [])
    code = {name: number for number, name in enumerate(rows.names)}
    numbers = np.array([code.get(name, -1) for name in truth.names])
    wanted = np.unique(numbers[truth.video] + 1j * truth.second)
    empty = int((~np.isin(wanted, rows.moments())).sum())
    what = f"annotated key frames have no box with a score of at least {least:g} of the same name and second"
    return [f"{rows.file}: {empty:,} of {len(wanted):,} {what}: they count as missed"] if empty else []


def _assembled(
    rows: _Rows, movies: Mapping[str, Movie], num_classes: int
) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray, np.ndarray, BoxTable]:
    """Paths, names, seconds, sizes and boxes of all key frames, by video and second; boxes in the order of the rows.

    Rows of one person and box at one moment are one box with several labels.
    """
    first, box_of = _boxes(rows)
    labelled = rows.column >= 0
    labels = np.unique(box_of[labelled] * num_classes + rows.column[labelled])
    score = np.zeros(len(first))
    np.maximum.at(score, box_of, rows.score)
    moments = rows.moments()[first]
    starts = np.flatnonzero(np.r_[True, moments[1:] != moments[:-1]])
    table = BoxTable(
        np.r_[starts, len(first)].astype(np.int64),
        rows.box[first].astype(np.float32),
        score.astype(np.float32),
        np.searchsorted(labels, num_classes * np.arange(len(first) + 1)).astype(np.int64),
        (labels % num_classes).astype(np.int32),
    )
    chosen = first[starts]
    names = tuple(rows.names[number] for number in rows.video[chosen])
    sizes = np.array([movies[name].size for name in names], dtype=np.int32).reshape(-1, 2)
    return tuple(movies[name].path for name in names), names, rows.second[chosen], sizes, table


def _boxes(rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each box, by video, second and place among the rows; and the number of each row's box."""
    columns = (*rows.box.T, rows.person, rows.second, rows.video)
    order = np.lexsort(columns)
    differ = np.zeros(len(order), dtype=bool)
    differ[0] = True
    for column in columns:
        differ[1:] |= np.diff(column[order]) != 0
    # lexsort is stable: the first of equal rows is the first in the file
    first = order[differ]
    by_moment = np.lexsort((first, rows.second[first], rows.video[first]))
    place = np.empty_like(by_moment)
    place[by_moment] = np.arange(len(first))
    box_of = np.empty_like(order)
    box_of[order] = place[np.cumsum(differ) - 1]
    return first[by_moment], box_of
