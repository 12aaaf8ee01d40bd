"""Where boxes come from: annotated ones from AVA's files or a list of one's own, and detected ones to be classified."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels.launch import check
from videomae.data import storage
from videomae.data.ava import AvaFiles, Detected, ava_classes, find_ava, read_detected, read_excluded, read_images
from videomae.data.box_rows import BoxRows, csv_lines, names_columns, read_rows
from videomae.data.dataset import NoSplit
from videomae.data.labelled import CLASSES, read_classes

# the lists that serve as a split, best first: many data sets have one of val and test
_SERVES = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}
_TOLERANCE = 1e-3  # of the frame: what a box may lie outside of it, as files round
_NAMED = 5  # of many, in a message
_MOST_CLASSES = 1 << 20  # that numbers may make: one that is no class's, as 2147483647, would fill the memory
_OF_A_BOX = ("video", "second", "x1", "y1", "x2", "y2", "score")


class Annotated(NamedTuple):
    """The rows of one split. file: where they stand. home: the folder that videos are named from. classes: by column;
    class_ids: what rows call them; evaluated: the ids that count. excluded: moments that are left out."""

    file: Path
    home: Path
    rows: BoxRows
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    evaluated: tuple[int, ...]
    excluded: tuple[tuple[str, float], ...]
    ava: AvaFiles | None
    notes: tuple[str, ...]


def some(names: Sequence[object]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more


def read_annotated(
    source: str | Path, split: str, classes: Sequence[str] | None = None, *, exclude: bool = True
) -> Annotated:
    """The annotated boxes of a split. classes: the training set's, which must be this one's. Raises ValueError."""
    check(str(source) != "", "no path to look for boxes in")
    check(not storage.is_url(str(source)), f"boxes are read from files here, not from {source}")
    path = Path(source).expanduser()
    check(path.exists(), f"no such file or folder: {path}")
    names = None if classes is None else tuple(classes)
    if path.is_dir() and (files := find_ava(path, split)) is not None:
        found = _of_ava(files, names, exclude)
    else:
        found = _of_list(path, split, names)
    _check_labels(found)
    # of rows with scores, as detections have, only this looks for empty ones
    rows = found.rows
    check_boxes(found.file, rows.names, rows.video, rows.second, rows.box)
    return found


def _of_ava(files: AvaFiles, names: tuple[str, ...] | None, exclude: bool) -> Annotated:
    own, evaluated = ava_classes(files.classes)
    if names is not None and names != own:
        here = f"{files.rows.parent} has {len(own)} classes, {own[0]}, ..."
        check(_may_be(names, own), f"{here}; the training set or the weights have {len(names)} others")
        own = names
    excluded = read_excluded(files.excluded) if exclude and files.excluded is not None else ()
    rows = read_rows(files.rows, score=False)
    ids = tuple(range(1, len(own) + 1))
    return Annotated(files.rows, files.home, rows, own, ids, evaluated, excluded, files, ())


def _may_be(names: tuple[str, ...], own: tuple[str, ...]) -> bool:
    """Whether these are AVA's classes, of which either side may lack names."""
    unnamed = ava_classes(())[0]
    return len(names) == len(own) and all(a == b or c in (a, b) for a, b, c in zip(names, own, unnamed, strict=True))


def _of_list(path: Path, split: str, names: tuple[str, ...] | None) -> Annotated:
    file, notes = _list_of(path, split)
    own = read_classes(beside) if (beside := file.parent / CLASSES).is_file() else None
    if own is not None and names is not None and own != names:
        raise ValueError(
            f"{beside} names other classes than the training set or the weights: {some(own)}; there {some(names)}"
        )
    rows = read_rows(file, classes=own or names)
    known = own or names or rows.classes
    if known is None:
        known, more = _numbered(file, rows)
        notes += more
    ids = tuple(range(len(known)))
    return Annotated(file, file.parent.resolve(), rows, known, ids, ids, (), None, notes)


def _numbered(file: Path, rows: BoxRows) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes of a list that has only their numbers, and what is to be noted of them."""
    count, used = int(rows.label.max()) + 1, len(np.unique(rows.label))
    remedy = f"number them from 0 on, or name them in {file.parent / CLASSES}"
    check(count <= _MOST_CLASSES, f"{file}: a label is {count - 1}, which would make {count:,} classes: {remedy}")
    note = f"{file}: {count:,} classes, {used:,} of them with boxes: {remedy}"
    return tuple(map(str, range(count))), (note,) if 2 * used < count else ()


def _list_of(path: Path, split: str) -> tuple[Path, tuple[str, ...]]:
    """The csv of a split, and what is to be noted of it."""
    if path.is_file():
        if split != "train" and path.stem == "train":
            raise NoSplit(
                f"{path} is the training list; give its folder if that has {split}.csv, or the list of {split}"
            )
        return path, ()
    for name in _SERVES.get(split, (split,)):
        if (file := path / f"{name}.csv").is_file():
            return file, () if name == split else (f"no {split} boxes in {path}: those of {name} serve",)
    raise NoSplit(f"no boxes of {split} in {path}: neither {split}.csv nor ava_{split}_v2.2.csv is there")


def read_boxes(path: str | Path, annotated: Annotated, least: float) -> Detected:
    """Detected boxes whose score is at least `least`: of AVA's json, or of a csv. Raises ValueError."""
    path = Path(path).expanduser()
    check(path.is_file(), f"no such file of boxes: {path}")
    if path.suffix.lower() == ".json":
        check(annotated.ava is not None, f"{path} goes with AVA's files; boxes of {annotated.file} need a csv")
        assert annotated.ava is not None
        found = read_detected(path, read_images(annotated.ava), least)
    else:
        found = _from_csv(path, least)
    check(len(found.scores) > 0, f"{path} has no box with a score of at least {least:g}")
    return found


def _from_csv(path: Path, least: float) -> Detected:
    """`video,second,x1,y1,x2,y2`, anything, and the score at last, a line; or in any order, with what else there is,
    where a first line names the columns. Corners are fractions."""
    try:
        lines = list(csv_lines(1, path.read_text(encoding="utf-8-sig").encode()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no list of boxes: {error}") from error
    places = [*range(len(_OF_A_BOX) - 1), -1]
    if lines and names_columns(lines[0][1]):
        number, first = lines.pop(0)
        places = _places(f"{path}:{number}", first)
    found = [_detected(f"{path}:{number}", fields, places) for number, fields in lines]
    kept = [(row, *one) for row, one in enumerate(found) if one[-1] >= least]
    table = np.array([(row, *numbers) for row, _, *numbers in kept], dtype=np.float64).reshape(-1, 7)
    sizes, rows = np.ones((len(kept), 2), dtype=np.int64), table[:, 0].astype(np.int64)
    return Detected([video for _, video, *_ in kept], table[:, 1], table[:, 2:6], sizes, table[:, 6], rows)


def _places(where: str, first: list[str]) -> list[int]:
    """Where the columns of a box are, by their names."""
    names = [{"path": "video"}.get(name := text.strip().lower(), name) for text in first]
    wanted = ",".join(("path", *_OF_A_BOX[1:]))
    right = all(names.count(name) == 1 for name in _OF_A_BOX)
    check(right, f"{where} must name the columns {wanted}, each once; it is `{','.join(first)[:80]}`")
    return [names.index(name) for name in _OF_A_BOX]


def _detected(
    where: str, fields: list[str], places: Sequence[int]
) -> tuple[str, float, float, float, float, float, float]:
    """Video, second, corners and score of a line. Raises ValueError."""
    shown = f"it is `{','.join(fields)[:80]}`"
    try:
        check(len(fields) > max(places) + (-1 in places), "")
        video, second, x1, y1, x2, y2, score = (fields[place].strip() for place in places)
        found = (video, float(second), float(x1), float(y1), float(x2), float(y2), float(score))
    except ValueError as error:
        wanted = "video,second,x1,y1,x2,y2,...,score"
        raise ValueError(f"{where} should be `{wanted}`, or in the order that a first line names; {shown}") from error
    check(video != "", f"{where} has no video; {shown}")
    check(0 <= found[1] < np.inf, f"{where}: second must be a finite number of 0 or above; {shown}")
    check(bool(np.isfinite(found[2:6]).all()), f"{where}: corners must be in [0, 1], fractions of the frame; {shown}")
    check(0 <= found[6] <= 1, f"{where}: the score, {score}, must be in [0, 1]; {shown}")
    return found


def check_boxes(file: Path, names: Sequence[object], video: np.ndarray, second: np.ndarray, box: np.ndarray) -> None:
    """ValueError when a box is not in the frame, or is empty there."""
    outside = ~((box >= -_TOLERANCE) & (box <= 1 + _TOLERANCE)).all(axis=1)
    inside = box.clip(0, 1)
    empty = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    for wrong, what in ((outside, "boxes reach out of the frame, 0 to 1"), (empty, "boxes are empty")):
        rows = np.flatnonzero(wrong)
        if len(rows):
            shown = [_box_text(names[video[row]], second[row], box[row]) for row in rows[:_NAMED]]
            more = f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else ""
            raise ValueError(f"{file}: {len(rows):,} of {len(box):,} {what}: {'; '.join(shown)}{more}")


def _box_text(name: object, second: float, box: np.ndarray) -> str:
    corners = ", ".join(f"{side:.5g}" for side in box)
    return f"{name} second {second:g} ({corners})"


def _check_labels(found: Annotated) -> None:
    ids, counts = np.unique(found.rows.label, return_counts=True)
    unknown = ~np.isin(ids, found.class_ids)
    if unknown.any():
        shown = [f"{one} ({count:,})" for one, count in zip(ids[unknown], counts[unknown], strict=True)]
        known = f"there are {len(found.class_ids)}, {found.class_ids[0]} to {found.class_ids[-1]}"
        total = int(counts[unknown].sum())
        raise ValueError(f"{found.file}: {total:,} rows have a class that is none: {some(shown)}; {known}")
