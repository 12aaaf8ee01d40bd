"""AVA's files: which classes there are and count, which moments are left out, and where people were detected (RECIPES
H.1)."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kernels.launch import check
from videomae.data.dataset import NoSplit

NUM_CLASSES = 80  # ids from 1 on
# those that AVA's evaluation counts: the others have fewer than 25 boxes in validation
EVALUATED = (
    *(1, *range(3, 16), 17, 20, 22, 24, *range(26, 31), 34, 36, 37, 38, 41, 43, *range(45, 50)),
    *(51, 52, 54, *range(56, 71), 72, 73, 74, *range(76, 81)),
)
_SECONDS = 10_000  # an image's id is its movie's number times this, plus its second


@dataclass(frozen=True)
class AvaFiles:
    """The files of one split; None for those that are not there. home: the folder that was asked for."""

    home: Path
    rows: Path
    excluded: Path | None
    classes: tuple[Path, ...]
    detections: Path | None
    images: Path | None
    movies: Path | None


def find_ava(folder: Path, split: str) -> AvaFiles | None:
    """AVA's files in a folder, or in `annotations` below it; None when it has no AVA files. Raises NoSplit when only
    this split is missing."""
    for place in (folder, folder / "annotations"):
        if not any((place / f"ava_{one}_v2.2.csv").is_file() for one in ("train", "val")):
            continue
        rows = place / f"ava_{split}_v2.2.csv"
        if not rows.is_file():
            raise NoSplit(f"no {rows.name} in {place}")

        def found(name: str, place: Path = place) -> Path | None:
            return path if (path := place / name).is_file() else None

        return AvaFiles(
            folder,
            rows,
            found(f"ava_{split}_excluded_timestamps_v2.2.csv"),
            tuple(sorted(place.glob("ava_action_list*.pbtxt"))),
            found(f"ava_{split}_det_person_bbox.json"),
            found(f"ava_{split}_v2.2_min.json"),
            found("ava_file_names_trainval_v2.1.txt"),
        )
    return None


def read_classes(path: str | Path) -> dict[int, str]:
    """Names by id, in a class list: lines `name: "..."` followed by `id: n` or `label_id: n`. Raises ValueError."""
    found: dict[int, str] = {}
    name: str | None = None
    for number, line in enumerate(_text(path).splitlines(), 1):
        if named := re.fullmatch(r"""\s*name:\s*["'](.*)["']\s*""", line):
            name = named[1]
        elif numbered := re.fullmatch(r"\s*(?:label_)?id:\s*(\d+)\s*", line):
            check(name is not None, f"{path}:{number}: an id without a name before it")
            assert name is not None
            check(int(numbered[1]) not in found, f"{path}:{number}: {numbered[1]} is also the id of another class")
            found[int(numbered[1])], name = name, None
    check(len(found) > 0, f'{path} names no class: there is no `name: "..."` with an `id: n` after it')
    return found


def ava_classes(lists: Sequence[Path]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names of all 80 classes by column, and the ids that count.

    `action 7` where no list has a name. The shortest list says which count, unless it has all.
    """
    tables = [read_classes(path) for path in lists]
    for path, table in zip(lists, tables, strict=True):
        strange = sorted(one for one in table if not 1 <= one <= NUM_CLASSES)
        check(not strange, f"{path} has ids that are not AVA's, 1 to {NUM_CLASSES}: {strange[:5]}")
    names = {one: name for table in tables for one, name in table.items()}
    listed = min(tables, key=len) if tables else {}
    counts = tuple(sorted(listed)) if 0 < len(listed) < NUM_CLASSES else EVALUATED
    return tuple(names.get(one, f"action {one}") for one in range(1, NUM_CLASSES + 1)), counts


def read_excluded(path: str | Path) -> tuple[tuple[str, float], ...]:
    """(video, second) of a list of moments to leave out, `video,second` a line."""
    found = []
    try:
        rows = list(csv.reader(_text(path).splitlines()))
    except csv.Error as error:
        raise ValueError(f"{path} is no list of moments: {error}") from error
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        try:
            found.append((row[0], float(row[1])))
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path}:{number} should be `video,second`; it is `{','.join(row)[:80]}`") from error
    return tuple(found)


class Images(NamedTuple):
    """Key frames by the ids of COCO-style files: movie, second, and (height, width) in pixels where it is known."""

    moments: Mapping[int, tuple[str, float, tuple[int, int] | None]]
    movies: tuple[str, ...] = ()

    def find(self, image: int) -> tuple[str, float, tuple[int, int] | None] | None:
        """None for an id that is of no key frame."""
        if self.moments:
            return self.moments.get(image)
        movie, second = divmod(image, _SECONDS)
        known = 0 <= movie < len(self.movies) and self.movies[movie] != ""
        return (self.movies[movie], float(second), None) if known else None


def read_images(files: AvaFiles) -> Images:
    """From the split's min.json, which also has sizes, or else from the list of movies, whose lines number them from 0
    on."""
    if files.images is not None:
        rows = _json(files.images, dict).get("images", [])
        try:
            table = {
                int(row["id"]): (str(row["movie"]), float(row["timestamp"]), (int(row["height"]), int(row["width"])))
                for row in rows
            }
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{files.images}: an image without id, movie, timestamp, width and height") from error
        check(len(table) > 0, f"{files.images} has no images")
        return Images(table)
    wanted = "ava_val_v2.2_min.json or ava_file_names_trainval_v2.1.txt"
    check(files.movies is not None, f"boxes by image_id need {wanted} in {files.rows.parent}, to say which those are")
    assert files.movies is not None
    # an empty line has a number too
    return Images({}, tuple(line.split(".")[0].strip() for line in _text(files.movies).splitlines()))


class Detected(NamedTuple):
    """Boxes that a detector found. pixels: float64 [n, 4], x1, y1, x2, y2 from edge to edge. sizes: int [n, 2], height
    and width of the frame that these are of, 0 where it is not known. rows: int64 [n], the place in the file."""

    videos: list[str]
    seconds: np.ndarray
    pixels: np.ndarray
    sizes: np.ndarray
    scores: np.ndarray
    rows: np.ndarray


def read_detected(path: str | Path, images: Images, least: float) -> Detected:
    """The boxes of a json list of {image_id, bbox, score}, bbox being x, y, width, height, whose score is at least
    `least`. Raises ValueError."""
    rows = _json(Path(path), list)
    try:
        scores = np.array([row["score"] for row in rows], dtype=np.float64)
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64)
        ids = np.array([row["image_id"] for row in rows], dtype=np.int64)
        count = len(rows)
        right = (scores.shape, boxes.size, ids.shape) == ((count,), 4 * count, (count,))
        check(right, "not one score, one id and four numbers each")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: an entry is no {{image_id, bbox, score}} of numbers: {error}") from error
    strange = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    what = "entries with a score that is not in [0, 1], the first"
    if len(strange):
        raise ValueError(f"{path}: {len(strange):,} {what} is number {strange[0] + 1}: {scores[strange[0]]:g}")
    # detectors' files say 0.8 in decimals
    kept = np.flatnonzero(scores >= least - 1e-9)
    found = [images.find(int(one)) for one in ids[kept]]
    unknown = sorted({int(one) for one, moment in zip(ids[kept], found, strict=True) if moment is None})
    check(not unknown, f"{path}: {len(unknown)} image ids are of no key frame: {unknown[:5]}")
    moments = [moment for moment in found if moment is not None]
    boxes = boxes.reshape(-1, 4)[kept]
    boxes[:, 2:] += boxes[:, :2]
    return Detected(
        [movie for movie, _, _ in moments],
        np.array([second for _, second, _ in moments], dtype=np.float64),
        boxes,
        np.array([size or (0, 0) for _, _, size in moments], dtype=np.int64).reshape(-1, 2),
        scores[kept],
        kept,
    )


def _json(path: Path, kind: type) -> Any:
    text = _text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    check(isinstance(value, kind), f"{path} holds no {'list' if kind is list else 'map'}")
    return value


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no file of AVA: not text ({error.reason})") from error
