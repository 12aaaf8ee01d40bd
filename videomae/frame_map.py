"""Frame mAP, the measure of action detection on AVA, in numpy (RECIPES H.6, H.7).

A detection is right if, of the ground truth of its key frame and class, the box that it overlaps most (intersection
over union, IoU) does so enough, and no detection with a higher score has that box already. Which box that is depends
on no other detection, so that all rows are matched at once; only then they are ranked.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kernels.launch import check
from videomae.data.box_rows import BoxRows

Protocol = Literal["official", "mmaction2"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "mmaction2")
Rows = BoxRows | Mapping[str, Any] | Sequence[Sequence[Any]]

# ids of AVA's classes by kind
AVA_GROUPS: Mapping[str, Collection[int]] = {
    "person_movement": range(1, 15),
    "object_manipulation": range(15, 64),
    "person_interaction": range(64, 81),
}

_COLUMNS = ("video", "second", "x1", "y1", "x2", "y2", "class", "score")
_MATCHED = 1 << 18  # detections whose overlaps are held at once


def frame_map(
    ground_truth: Rows,
    detections: Rows,
    classes: Iterable[int] | None = None,
    iou: float | Sequence[float] = 0.5,
    protocol: Protocol = "official",
    excluded: Iterable[tuple[Hashable, Any]] = (),
    groups: Mapping[str, Collection[int]] = AVA_GROUPS,
) -> dict[str, Any]:
    """{"mAP": float, "per_class": {id: AP}, "per_group": {name: mean AP of its classes}} of boxes with classes.

    Rows are (video, second, x1, y1, x2, y2, class), of detections with a score after it: tuples, or columns by these
    names (others are ignored), or BoxRows. A second may be a text, "0902" is 902. classes: the ids that count, all
    of the ground truth for None. excluded: (video, second) that do not count on either side. groups: ids by name; those
    of which no class counts are left out. With several thresholds of iou each value is a dict by threshold: "mAP" is
    {0.5: float, ...}.

    official: a class counts that has ground truth, and is 0 without a detection; a detection in a key frame without
    any is wrong. mmaction2: a class counts that has a detection as well; detections in key frames without ground
    truth of a class that counts are skipped; boxes of excluded key frames are still missed. There is no mAP, nan, when
    no class has both. In both, boxes without an area are ignored, and of equal scores the earlier row comes first, as
    do earlier boxes of equal overlap.

    ValueError for rows that are not such, with the row; for ground truth that has no box of a class that counts.
    """
    check(protocol in PROTOCOLS, f"protocol must be {' or '.join(PROTOCOLS)}; got {protocol!r}")
    thresholds = _thresholds(iou)
    truth, found = _rows(ground_truth, "ground truth", False), _rows(detections, "detections", True)
    ids = np.unique(truth.label) if classes is None else _ids(classes)
    problem = _problem(truth, found, ids, excluded, protocol)
    ranking = _ranking(found, problem)
    counted = [column for column, count in enumerate(problem.num_boxes) if count]
    if protocol == "mmaction2":
        counted = [column for column in counted if ranking.starts[column + 1] > ranking.starts[column]]
    results = {t: _result(_precisions(ranking, problem, t), ids, counted, groups) for t in thresholds}
    if not isinstance(iou, Iterable):
        return results[thresholds[0]]
    return {key: {t: result[key] for t, result in results.items()} for key in ("mAP", "per_class", "per_group")}


def _thresholds(iou: float | Sequence[float]) -> list[float]:
    several = list(iou) if isinstance(iou, Iterable) else [iou]
    check(len(several) > 0, "iou must be a threshold or several; got none")
    for threshold in several:
        real = isinstance(threshold, (int, float, np.number)) and not isinstance(threshold, bool)
        check(real and 0 < threshold <= 1, f"iou must be above 0 and at most 1; got {threshold!r}")
    return [float(threshold) for threshold in several]


def _ids(classes: Iterable[int]) -> np.ndarray:
    ids = _labels(_numbers(list(classes), "classes", "id"), "classes")
    check(len(ids) > 0, "classes names no class")
    return np.unique(ids)


class _Frames(NamedTuple):
    """How key frames are numbered: those of the ground truth, and those that are excluded."""

    places: Mapping[Hashable, int]  # of videos
    moments: np.ndarray  # sorted, the seconds of all videos
    excluded: np.ndarray  # sorted numbers

    def of(self, rows: BoxRows) -> np.ndarray:
        """[N], -1 for one that is none of these."""
        video = np.array([self.places.get(name, -1) for name in rows.names], np.int64)[rows.video]
        moment = _find(self.moments, rows.second)
        return np.where((video >= 0) & (moment >= 0), video * len(self.moments) + moment, -1)


class _Problem(NamedTuple):
    """What counts: boxes are sorted by key (key frame, class), equal keys in their order; rows are detections."""

    boxes: np.ndarray  # [G, 4]
    keys: np.ndarray  # [G]
    num_boxes: np.ndarray  # [C], of each class
    rows: np.ndarray  # [M], detections that count
    row_keys: np.ndarray  # [M], -1 in a key frame without ground truth
    columns: np.ndarray  # [M], the place of the class among the C


class _Ranking(NamedTuple):
    """Detections that count by class, best first: class c has the ranks starts[c] to starts[c + 1]. Of H of them, in
    this order, that have ground truth of their key frame and class: rank, best box, and its IoU."""

    starts: np.ndarray  # [C + 1]
    ranks: np.ndarray  # [H]
    box: np.ndarray  # [H]
    iou: np.ndarray  # [H]


def _problem(
    truth: BoxRows, found: BoxRows, ids: np.ndarray, excluded: Iterable[tuple[Hashable, Any]], protocol: Protocol
) -> _Problem:
    frames = _numbered(truth, excluded)
    frame, column = frames.of(truth), _find(ids, truth.label)
    counts = _has_area(truth.box) & (column >= 0)
    check(bool(counts.any()), "no box of the ground truth has an area and a class that counts")
    inside = counts & (_find(frames.excluded, frame) < 0)
    check(bool(inside.any()), "all key frames of the ground truth are excluded")
    used = np.unique(frame[inside])
    keys = _find(used, frame[inside]) * len(ids) + column[inside]
    order = np.argsort(keys, kind="stable")
    num_boxes = np.bincount(column[counts if protocol == "mmaction2" else inside], minlength=len(ids))
    rows, place, columns = _counting(found, frames, used, ids, protocol)
    row_keys = np.where(place >= 0, place * len(ids) + columns, -1)
    return _Problem(truth.box[inside][order].astype(np.float64), keys[order], num_boxes, rows, row_keys, columns)


def _numbered(truth: BoxRows, excluded: Iterable[tuple[Hashable, Any]]) -> _Frames:
    try:
        pairs = [(video, second) for video, second in excluded]
        videos, texts = [video for video, _ in pairs], [second for _, second in pairs]
        places = {name: place for place, name in enumerate(dict.fromkeys((*truth.names, *videos)))}
    except (TypeError, ValueError) as error:
        raise ValueError(f"excluded must be pairs (video, second): {error}") from error
    seconds = _numbers(texts, "excluded", "second")
    moments = np.unique(np.concatenate((truth.second, seconds)))
    video = np.array([places[name] for name in videos], np.int64)
    return _Frames(places, moments, np.unique(video * len(moments) + np.searchsorted(moments, seconds)))


def _counting(
    found: BoxRows, frames: _Frames, used: np.ndarray, ids: np.ndarray, protocol: Protocol
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections that count: their rows, the places of their key frames in used, -1 for none, and of their classes."""
    frame, column = frames.of(found), _find(ids, found.label)
    keep = _has_area(found.box) & (column >= 0)
    if len(frames.excluded):
        keep &= _find(frames.excluded, frame) < 0
    place = _find(used, frame)
    if protocol == "mmaction2":
        keep &= place >= 0
    rows = np.flatnonzero(keep)
    return rows, place[rows], column[rows]


def _find(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each in sorted values, -1 where it is not among them."""
    if not len(values):
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    place[values[place] != wanted] = -1
    return place


def _has_area(box: np.ndarray) -> np.ndarray:
    return (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])


def _ranking(found: BoxRows, problem: _Problem) -> _Ranking:
    assert found.score is not None
    order = np.argsort(-found.score[problem.rows].astype(np.float64, copy=False), kind="stable")
    # of small numbers a stable sort takes no comparisons
    small = problem.columns.astype(np.uint16) if len(problem.num_boxes) < 1 << 16 else problem.columns
    order = order[np.argsort(small[order], kind="stable")]
    starts = np.searchsorted(problem.columns[order], np.arange(len(problem.num_boxes) + 1))
    keys, first = np.unique(problem.keys, return_index=True)
    first = np.append(first, len(problem.keys))
    group = _find(keys, problem.row_keys)[order]
    ranks = np.flatnonzero(group >= 0)
    group, boxes = group[ranks], found.box[problem.rows[order[ranks]]].astype(np.float64)
    parts = [slice(start, start + _MATCHED) for start in range(0, len(ranks), _MATCHED)]
    best = [_best(boxes[part], problem.boxes, first[group[part]], first[group[part] + 1]) for part in parts]
    none: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty(0))
    box, iou = (np.concatenate(column) for column in zip(none, *best, strict=True))
    return _Ranking(starts, ranks, box, iou)


def _best(boxes: np.ndarray, truth: np.ndarray, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the boxes of truth from first to end of each row the first that it overlaps most, and their IoU."""
    counts = end - first
    starts = np.cumsum(counts) - counts
    pair = np.arange(counts.sum()) + np.repeat(first - starts, counts)
    iou = _iou(np.repeat(boxes, counts, axis=0), truth[pair])
    most = np.maximum.reduceat(iou, starts)
    chosen = np.where(iou == np.repeat(most, counts), pair, len(truth))
    return np.minimum.reduceat(chosen, starts), most


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [P, 4] that have an area; 0 where it is too small for a number."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    both = np.maximum(sides, 0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def _precisions(ranking: _Ranking, problem: _Problem, threshold: float) -> np.ndarray:
    """AP of each class [C]: the area under precision over recall, each the best precision at this recall or above."""
    enough = np.flatnonzero(ranking.iou >= threshold)
    _, first = np.unique(ranking.box[enough], return_index=True)
    right = np.sort(ranking.ranks[enough[first]])
    ends = np.searchsorted(right, ranking.starts)
    precisions = np.zeros(len(problem.num_boxes))
    for column, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        place = right[start:end] - ranking.starts[column] + 1
        precision = np.arange(1, len(place) + 1) / place
        best = np.maximum.accumulate(precision[::-1])
        # each right detection is a step of recall, all of the same width
        precisions[column] = best.sum() / max(problem.num_boxes[column], 1)
    return precisions


def _result(
    precisions: np.ndarray, ids: np.ndarray, counted: Sequence[int], groups: Mapping[str, Collection[int]]
) -> dict[str, Any]:
    per_class = {int(ids[column]): float(precisions[column]) for column in counted}
    members = {name: [per_class[i] for i in per_class if i in group] for name, group in groups.items()}
    per_group = {name: float(np.mean(values)) for name, values in members.items() if values}
    mean = float(np.mean(list(per_class.values()))) if per_class else float("nan")
    return {"mAP": mean, "per_class": per_class, "per_group": per_group}


def _rows(rows: Rows, what: str, scored: bool) -> BoxRows:
    """Rows of any form as BoxRows; ValueError with the first that is wrong."""
    if not isinstance(rows, BoxRows):
        columns = _COLUMNS if scored else _COLUMNS[:-1]
        rows = _from_columns(_columns(rows, columns, what), what)
    check(not scored or rows.score is not None, f"{what} must have a score in each row")
    for name in ("second", "box", "score") if scored else ("second", "box"):
        values = np.asarray(getattr(rows, name))
        check(values.dtype.kind in "iuf", f"{what}: {name} must be numbers; got {values.dtype}")
        finite = np.isfinite(values) if values.ndim == 1 else np.isfinite(values).all(1)
        _check_each(finite, values, f"{what}: {name} must be finite")
    return rows


def _columns(rows: Any, names: Sequence[str], what: str) -> dict[str, Any]:
    """Columns by name; ValueError for a row that has more or less than these."""
    if hasattr(rows, "keys"):
        lacking = [name for name in names if name not in rows]
        check(not lacking, f"{what} must have the columns {', '.join(names)}; it has no {', '.join(lacking)}")
        return {name: _column(rows[name], what, name) for name in names}
    check(isinstance(rows, Iterable) and not isinstance(rows, (str, bytes)), f"{what} must be rows of boxes")
    rows = list(rows)
    for number, row in enumerate(rows):
        right = hasattr(row, "__len__") and not isinstance(row, (str, bytes)) and len(row) == len(names)
        check(right, f"{what}: row {number} must be ({', '.join(names)}); it is {str(row)[:80]}")
    columns: Iterable[Sequence[Any]] = zip(*rows, strict=True) if rows else [()] * len(names)
    return dict(zip(names, columns, strict=True))


def _column(values: Any, what: str, name: str) -> Any:
    values = values if isinstance(values, (list, tuple)) else np.asarray(values)
    check(not isinstance(values, np.ndarray) or values.ndim == 1, f"{what}: {name} must have one value a row")
    return values


def _from_columns(columns: Mapping[str, Any], what: str) -> BoxRows:
    counts = {name: len(values) for name, values in columns.items()}
    check(len(set(counts.values())) == 1, f"{what}: columns must be of one length; got {counts}")
    names, video = _codes(columns["video"], what)
    numbers = {name: _numbers(columns[name], what, name) for name in columns if name != "video"}
    box = np.stack([numbers[name] for name in ("x1", "y1", "x2", "y2")], 1)
    return BoxRows(names, video, numbers["second"], box, _labels(numbers["class"], what), numbers.get("score"))


def _codes(videos: Any, what: str) -> tuple[tuple[Hashable, ...], np.ndarray]:
    """The different videos, and the place of each row's among them."""
    if isinstance(videos, np.ndarray) and videos.dtype.kind in "iuUS":
        different, place = np.unique(videos, return_inverse=True)
        return tuple(different.tolist()), place
    places: dict[Hashable, int] = {}
    try:
        codes = [places.setdefault(video, len(places)) for video in videos]
    except TypeError as error:
        raise ValueError(f"{what}: a video must be a name or a number: {error}") from error
    return tuple(places), np.array(codes, np.int64)


def _numbers(values: Any, what: str, name: str) -> np.ndarray:
    """float64 [N] of numbers, or of texts of them; ValueError with the first that is none."""
    try:
        column = np.asarray(values).astype(np.float64)
        check(column.ndim == 1, "one value a row")
    except (TypeError, ValueError, OverflowError) as error:
        row = next((row for row, value in enumerate(values) if not _is_number(value)), None)
        where = "" if row is None else f"; got {str(values[row])[:80]!r} in row {row}"
        raise ValueError(f"{what}: {name} must be a number{where}") from error
    _check_each(np.isfinite(column), column, f"{what}: {name} must be finite")
    return column


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _labels(column: np.ndarray, what: str) -> np.ndarray:
    """int64 [N], a class's ids."""
    right = (column == np.rint(column)) & (np.abs(column) < 1 << 53)
    _check_each(right, column, f"{what}: class must be a whole number")
    return column.astype(np.int64)


def _check_each(right: np.ndarray, values: np.ndarray, message: str) -> None:
    """ValueError with the first row that is not right."""
    if not right.all():
        row = int(right.argmin())
        raise ValueError(f"{message}; got {values[row].tolist()} in row {row}")
