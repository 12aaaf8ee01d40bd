"""What each box of a video's key frames does: `python -m train.predict VIDEO --detector W --boxes BOXES [--out DIR]`.

BOXES is a csv with a line of column names, `second,x1,y1,x2,y2` in any order, corners as fractions of the frame; with a
column `path` each video has its own boxes, and with a column `score` a class's score is multiplied by it.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels.launch import check
from train.box_picture import Boxed, draw_boxes
from train.detect_evaluation import clip_of, make_writable, read_detector
from train.detection import inference_of, score_boxes
from train.inference import Reading
from videomae.data.box_rows import BoxRows
from videomae.data.dataset import VideoList
from videomae.data.key_frame_reader import KeyFrameReader, key_frame_image
from videomae.data.key_frames import BoxTable, KeyFrames
from videomae.data.moments import Timing
from videomae.data.movies import Movie, look_at
from videomae.data.sampling import KeyFrameClip
from videomae.detector import Detector
from videomae.wording import counted

_NEEDED = ("second", "x1", "y1", "x2", "y2")
_READ = (*_NEEDED, "path", "video", "score")
_TOLERANCE = 1e-3  # corners that were rounded end a little outside of the frame


class _Line(NamedTuple):
    """path: None where the file does not say. where: the file and the line in it."""

    path: str | None
    second: float
    box: tuple[float, float, float, float]
    score: float
    where: str


# the lines of each key frame, a path and a second
_Moments = dict[tuple[str, float], list[_Line]]


def predict_boxes(paths: Sequence[str], options: argparse.Namespace, prog: str) -> int:
    """Say, and draw into options.out, what the detector makes of the boxes; 0 done, 1 a video could not be read. Raises
    ValueError for what the user can mend."""
    check(options.boxes is not None, "--detector needs --boxes: a csv with second,x1,y1,x2,y2")
    model, messages = read_detector(options.detector)
    for message in messages:
        print(f"note: {message}", file=sys.stderr)
    clip = clip_of(model, KeyFrameClip(), KeyFrameClip())
    own = _by_moment(paths, _read(Path(options.boxes).expanduser()))
    seconds = {path: lines[0].second for (path, _), lines in own.items()}
    movies, broken = look_at({path: path for path in seconds}, seconds, Timing())
    for why in broken.values():
        print(f"{prog}: {why}", file=sys.stderr)
    if not movies:
        return 1
    frames = key_frames_of({key: lines for key, lines in own.items() if key[0] in movies}, movies, model)
    reader = KeyFrameReader.for_test(frames, clip, model.input.frames)
    inference = inference_of(model, frames, clip.short_side, device=options.device, precision=options.precision)
    out = Path(options.out)
    make_writable(out)
    pictures, unread = _pictures(frames, out), len(broken)
    reading = Reading(0 if options.workers is None else options.workers)
    for scored, skips in score_boxes(inference, frames, reader, reading=reading, say=print):
        for skip in skips:
            print(f"{prog}: {skip.path}: {skip.reason}", file=sys.stderr)
        for one in sorted(scored, key=lambda each: each.index):
            _say(frames, one.index, one.scores, reader, pictures[one.index], options)
        unread += len(skips)
    return 1 if unread else 0


def _by_moment(paths: Sequence[str], lines: Sequence[_Line]) -> _Moments:
    """Of these videos, in their order and by second. ValueError for a video without any; others' lines are counted."""
    own: _Moments = {}
    for path in paths:
        of_path = [line for line in lines if line.path is None or _is_named(path, line.path)]
        check(len(of_path) > 0, f"{path} has no boxes: the column path has other names")
        for line in sorted(of_path, key=lambda line: line.second):
            own.setdefault((path, line.second), []).append(line)
    taken = {line.where for of_moment in own.values() for line in of_moment}
    if others := len(lines) - len(taken):
        print(f"note: {others:,} of {counted(len(lines), 'box')} are of videos that were not given", file=sys.stderr)
    return own


def key_frames_of(
    own: Mapping[tuple[str, float], list[_Line]], movies: Mapping[str, Movie], model: Detector
) -> KeyFrames:
    """The key frames that have boxes, in their order. ValueError for a second that its video does not have."""
    for (path, second), lines in own.items():
        has = bool(movies[path].has(np.array([second]))[0])
        check(has, f"{lines[0].where}: {path} has no second {second:g}{_range(movies[path])}")
    moments = list(own)
    flat = [line for moment in moments for line in own[moment]]
    counts = [len(own[moment]) for moment in moments]
    empty = np.empty(0)
    names = model.classes or tuple(map(str, range(model.head.out_features)))
    return KeyFrames(
        videos=VideoList(tuple(path for path, _ in moments)),
        names=tuple(path for path, _ in moments),
        seconds=np.array([second for _, second in moments]),
        sizes=np.array([movies[path].size for path, _ in moments], dtype=np.int32),
        table=BoxTable(
            np.cumsum([0, *counts]),
            np.array([line.box for line in flat], dtype=np.float32),
            np.array([line.score for line in flat], dtype=np.float32),
            np.zeros(len(flat) + 1, dtype=np.int64),
            np.empty(0, dtype=np.int32),
        ),
        classes=names,
        class_ids=model.class_ids or tuple(range(len(names))),
        evaluated=(),
        ground_truth=BoxRows((), empty.astype(np.int32), empty, empty.reshape(0, 4), empty.astype(np.int32)),
        excluded=(),
        boxes_from="as given",
        is_annotated=False,
        timing=Timing(),
    )


def _range(movie: Movie) -> str:
    """In words, where it is known."""
    if movie.seconds is None or movie.seconds[1] is None:
        return ""
    return f"; it has {movie.seconds[0]:g} to {movie.seconds[1]:g}"


def _is_named(path: str, name: str) -> bool:
    """Whether name is the path, or as much of its end as it says."""
    wanted, parts = Path(name).expanduser().parts, Path(path).parts
    return parts[-len(wanted) :] == wanted or Path(name).resolve() == Path(path)


def _read(path: Path) -> list[_Line]:
    """ValueError with the line that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.reader(file)
            rows = [(f"{path}:{table.line_num}", row) for row in table if any(cell.strip() for cell in row)]
    except OSError as error:
        raise ValueError(f"cannot read --boxes {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no csv file: {error}") from error
    check(len(rows) > 1, f"{path} has no boxes")
    where, first = rows.pop(0)
    names = [name.strip().lower() for name in first]
    check(set(_NEEDED) <= set(names), f"{where} must name the columns {','.join(_NEEDED)}; got {','.join(names)}")
    check(len(set(names)) == len(names), f"{where} names a column twice: {','.join(names)}")
    if unread := [name for name in names if name not in _READ]:
        print(f"note: columns that say nothing of a box are not read: {', '.join(unread)}", file=sys.stderr)
    for place, row in rows:
        check(
            len(row) == len(names), f"{place} should have {len(names)} columns, separated by commas; it has {len(row)}"
        )
    return [_line(dict(zip(names, row, strict=True)), place) for place, row in rows]


def _line(row: dict[str, str], where: str) -> _Line:
    def number(name: str) -> float:
        try:
            value = float(row[name])
        except ValueError:
            value = math.nan
        check(math.isfinite(value), f"{where}: {name} must be a number; it is `{row[name]}`")
        return value

    sides = [number(name) for name in _NEEDED[1:]]
    shown = ", ".join(map(str, sides))
    inside = all(-_TOLERANCE <= side <= 1 + _TOLERANCE for side in sides)
    check(inside, f"{where}: corners must be in [0, 1], fractions of the frame; got {shown}")
    x1, y1, x2, y2 = (min(max(side, 0.0), 1.0) for side in sides)
    check(x1 < x2 and y1 < y2, f"{where}: the box is empty: {shown}")
    score = number("score") if row.get("score", "").strip() else 1.0
    check(0 <= score <= 1, f"{where}: score must be in [0, 1]; got {score:g}")
    second = number("second")
    check(second >= 0, f"{where}: second must not be negative; got {second:g}")
    name = row.get("path", "").strip() or row.get("video", "").strip()
    return _Line(name or None, second, (x1, y1, x2, y2), score, where)


def _pictures(frames: KeyFrames, out: Path) -> list[Path]:
    """A file for each key frame; numbered where videos of one name have one moment, or seconds look the same."""
    names: list[str] = []
    for index, (path, second) in enumerate(zip(frames.videos.paths, frames.seconds, strict=True)):
        name = f"{Path(path).stem}-{second:g}"
        while name in names:
            name += f"-{index}"
        names.append(name)
    return [out / f"{name}.png" for name in names]


def _say(
    frames: KeyFrames,
    index: int,
    scores: np.ndarray,
    reader: KeyFrameReader,
    picture: Path,
    options: argparse.Namespace,
) -> None:
    """One key frame: what its boxes do, on the terminal and as a picture."""
    path, second, boxes = frames.videos.paths[index], float(frames.seconds[index]), frames.boxes_of(index)
    boxed = []
    for box, row in zip(boxes, scores, strict=True):
        order = np.argsort(-row, kind="stable")[: options.top]
        boxed.append(Boxed(box, [(frames.classes[c], float(row[c])) for c in order]))
    draw_boxes(key_frame_image(reader, path, index), boxed, f"{Path(path).name}, second {second:g}").save(picture)
    if options.json:
        known = {"video": path, "second": second, "picture": str(picture)}
        each = [
            {
                "box": [round(float(side), 5) for side in one.box],
                "top": [[name, round(score, 6)] for name, score in one.best],
            }
            for one in boxed
        ]
        print(json.dumps({**known, "boxes": each}), flush=True)
        return
    print(f"{path}, second {second:g}: {picture}")
    for number, one in enumerate(boxed, 1):
        print(f"  box {number}")
        for name, score in one.best:
            print(f"{100 * score:7.2f} %  {name}", flush=True)
