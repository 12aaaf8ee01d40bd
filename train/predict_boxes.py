"""What each box of a video's key frames does: `python -m train.predict VIDEO --detector W --boxes BOXES [--out DIR]`.

BOXES is a csv with a line of column names, `second,x1,y1,x2,y2` in any order, corners as fractions of the frame; with a
column `path` each video has its own boxes, and with a column `score` a class's score is multiplied by it.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels.launch import check
from train.box_picture import Boxed, draw_boxes
from train.detect_evaluation import read_detector
from train.detection import Detections, inference_of, score_boxes
from train.inference import Reading
from videomae.data.box_rows import BoxRows
from videomae.data.dataset import VideoList
from videomae.data.key_frame_reader import KeyFrameReader, key_frame_image
from videomae.data.key_frames import BoxTable, KeyFrames
from videomae.data.moments import Timing
from videomae.data.movies import look_at
from videomae.data.sampling import KeyFrameClip
from videomae.detector import Detector

_NEEDED = ("second", "x1", "y1", "x2", "y2")
_TOLERANCE = 1e-3  # corners that were rounded end a little outside of the frame


class _Line(NamedTuple):
    """path: None where the file does not say."""

    path: str | None
    second: float
    box: tuple[float, float, float, float]
    score: float


def predict_boxes(paths: Sequence[str], options: argparse.Namespace, prog: str) -> int:
    """Say, and draw into options.out, what the detector makes of the boxes; 0 done, 1 a key frame could not be read.
    Raises ValueError for what the user can mend."""
    check(options.boxes is not None, "--detector needs --boxes: a csv with second,x1,y1,x2,y2")
    model, messages = read_detector(options.detector)
    for message in messages:
        print(f"note: {message}", file=sys.stderr)
    clip = model.key_clip or KeyFrameClip()
    if model.key_clip is None:
        print("note: the weights do not say how clips were taken: as AVA's, 25 frames a second", file=sys.stderr)
    frames = key_frames_of(paths, _read(Path(options.boxes).expanduser()), model)
    reader = KeyFrameReader.for_test(frames, clip, model.input.frames)
    inference = inference_of(model, frames, clip.short_side, device=options.device, precision=options.precision)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    found, unread = Detections(frames), 0
    reading = Reading(0 if options.workers is None else options.workers)
    for scored, skips in score_boxes(inference, frames, reader, reading=reading, say=print):
        found.add(scored)
        for skip in skips:
            print(f"{prog}: {skip.path}: {skip.reason}", file=sys.stderr)
        for one in sorted(scored, key=lambda each: each.index):
            _say(frames, one.index, one.scores, reader, out, options)
        unread += len(skips)
    return 1 if unread else 0


def key_frames_of(paths: Sequence[str], lines: Sequence[_Line], model: Detector) -> KeyFrames:
    """The key frames of these videos that have boxes. ValueError for a video without any, one that cannot be read, and
    a second that it does not have."""
    timing, seconds = Timing(), {}
    own: dict[tuple[str, float], list[_Line]] = {}
    for path in paths:
        for line in lines:
            if line.path is None or _is_named(path, line.path):
                own.setdefault((path, line.second), []).append(line)
                seconds[path] = line.second
        check(path in seconds, f"{path} has no boxes: the column path has other names")
    movies, broken = look_at({path: path for path in paths}, seconds, timing)
    check(not broken, "; ".join(broken.values()))
    for path, second in own:
        check(bool(movies[path].has(np.array([second]))[0]), f"{path} has no second {second:g}")
    moments = sorted(own, key=lambda key: (paths.index(key[0]), key[1]))
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
            np.empty(0, dtype=np.int16),
        ),
        classes=names,
        class_ids=model.class_ids or tuple(range(len(names))),
        evaluated=(),
        ground_truth=BoxRows((), empty.astype(np.int32), empty, empty.reshape(0, 4), empty.astype(np.int32)),
        excluded=(),
        boxes_from="as given",
        is_annotated=False,
        timing=timing,
    )


def _is_named(path: str, name: str) -> bool:
    """Whether name is the path, or as much of its end as it says."""
    wanted, parts = Path(name).expanduser().parts, Path(path).parts
    return parts[-len(wanted) :] == wanted or Path(name).resolve() == Path(path)


def _read(path: Path) -> list[_Line]:
    """ValueError with the line that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restkey="more")
            names = [name.strip() for name in rows.fieldnames or ()]
            check(set(_NEEDED) <= set(names), f"{path}:1 must name the columns {','.join(_NEEDED)}; got {names}")
            rows.fieldnames = names
            lines = [_line(row, f"{path}:{rows.line_num}") for row in rows]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no csv file: {error}") from error
    check(len(lines) > 0, f"{path} has no boxes")
    return lines


def _line(row: dict[str, str | None], where: str) -> _Line:
    def number(name: str) -> float:
        try:
            value = float(row[name] or "")
        except ValueError:
            value = math.nan
        check(math.isfinite(value), f"{where}: {name} must be a number; it is `{row[name]}`")
        return value

    x1, y1, x2, y2 = box = tuple(number(name) for name in _NEEDED[1:])
    inside = all(-_TOLERANCE <= side <= 1 + _TOLERANCE for side in box)
    check(inside, f"{where}: corners must be in [0, 1], fractions of the frame; got {', '.join(map(str, box))}")
    check(x1 < x2 and y1 < y2, f"{where}: the box is empty: {', '.join(map(str, box))}")
    score = number("score") if row.get("score") else 1.0
    second = number("second")
    check(second >= 0, f"{where}: second must not be negative; got {second:g}")
    return _Line(row.get("path") or row.get("video") or None, second, (x1, y1, x2, y2), score)


def _say(
    frames: KeyFrames, index: int, scores: np.ndarray, reader: KeyFrameReader, out: Path, options: argparse.Namespace
) -> None:
    """One key frame: what its boxes do, on the terminal and as a picture."""
    path, second, boxes = frames.videos.paths[index], float(frames.seconds[index]), frames.boxes_of(index)
    boxed = []
    for box, row in zip(boxes, scores, strict=True):
        order = np.argsort(-row, kind="stable")[: options.top]
        boxed.append(Boxed(box, [(frames.classes[c], float(row[c])) for c in order]))
    picture = out / f"{Path(path).stem}-{second:g}.png"
    picture = picture if not _is_taken(frames, index) else out / f"{Path(path).stem}-{second:g}-{index}.png"
    draw_boxes(key_frame_image(reader, path, index), boxed, f"{Path(path).name}, second {second:g}").save(picture)
    if options.json:
        known = {"video": path, "second": second, "picture": str(picture)}
        each = [
            {"box": [round(float(side), 5) for side in one.box], "top": [list(best) for best in one.best]}
            for one in boxed
        ]
        print(json.dumps({**known, "boxes": each}), flush=True)
        return
    print(f"{path}, second {second:g}: {picture}")
    for number, one in enumerate(boxed, 1):
        print(f"  box {number}")
        for name, score in one.best:
            print(f"{100 * score:7.2f} %  {name}", flush=True)


def _is_taken(frames: KeyFrames, index: int) -> bool:
    """Whether another video of the same name has a key frame at that second."""
    stem, second = Path(frames.videos.paths[index]).stem, frames.seconds[index]
    return any(
        Path(path).stem == stem and frames.seconds[i] == second
        for i, path in enumerate(frames.videos.paths)
        if i < index
    )
