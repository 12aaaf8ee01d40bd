"""Frame mAP, against loops over the protocol's text, the published case, and examples that can be done by hand."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from videomae.data.box_rows import BoxRows, read_rows
from videomae.metrics import AVA_GROUPS, frame_map

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PROTOCOLS = ("official", "mmaction2")
NAMES = ("video", "second", "x1", "y1", "x2", "y2", "class", "score")
LEFT, RIGHT, WIDE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 0.8, 1.0)


@pytest.fixture
def ava() -> Path:
    """mmaction2's evaluation case."""
    folder = Path(os.environ.get("VIDEOMAE_TEST_DATA", SHARED)) / "ava"
    if not folder.is_dir():
        pytest.skip(f"needs the annotations in {folder}; VIDEOMAE_TEST_DATA names another folder")
    return folder


def row(box, label=1, score=None, video="a", second=902):
    return (video, second, *box, label, *(() if score is None else (score,)))


def by_loops(truth, found, classes, iou, protocol, excluded):
    """(AP by class, mAP) by RECIPES H.6 and H.7, one box after another. Seconds are numbers."""
    classes = {r[6] for r in truth} if classes is None else set(classes)
    with_area = [[r for r in rows if r[2] < r[4] and r[3] < r[5] and r[6] in classes] for rows in (truth, found)]
    truth, found = ([r for r in rows if r[:2] not in excluded] for rows in with_area)
    counting = with_area[0] if protocol == "mmaction2" else truth
    if protocol == "mmaction2":
        frames = {r[:2] for r in truth}
        found = [r for r in found if r[:2] in frames]
    per_class = {}
    for label in sorted({r[6] for r in counting}):
        rows = [r for r in found if r[6] == label]
        if protocol == "mmaction2" and not rows:
            continue
        taken, curve, right = set(), [], 0
        total = sum(r[6] == label for r in counting)
        for place, r in enumerate(sorted(rows, key=lambda r: -r[7]), 1):
            best, chosen = 0.0, None
            for number, t in enumerate(truth):
                if t[:2] == r[:2] and t[6] == label and (overlap := overlap_of(t[2:6], r[2:6])) > best:
                    best, chosen = overlap, number
            if best >= iou and chosen not in taken:
                taken.add(chosen)
                right += 1
            curve.append((right / total, right / place))
        area, before = 0.0, 0.0
        for recall, _ in curve:
            if recall > before:
                area += (recall - before) * max(p for r, p in curve if r >= recall)
                before = recall
        per_class[label] = area
    return per_class, sum(per_class.values()) / len(per_class) if per_class else math.nan


def overlap_of(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def columns(rows, names):
    return {name: [r[place] for r in rows] for place, name in enumerate(names)}


def as_box_rows(rows):
    """By a loop, in the order in which videos come; float32 would move boxes over a threshold."""
    names = tuple(dict.fromkeys(r[0] for r in rows))
    video = np.array([names.index(r[0]) for r in rows], np.int32)
    box = np.array([r[2:6] for r in rows], float).reshape(-1, 4)
    score = np.array([r[7] for r in rows], float) if rows and len(rows[0]) == 8 else np.zeros(len(rows))
    label = np.array([r[6] for r in rows], np.int32)
    return BoxRows(names, video, np.array([r[1] for r in rows], float), box, label, score)


def problem(draw):
    """Few places for corners and few scores: many equal overlaps, equal scores, duplicates and boxes without area."""
    steps, videos = draw.choice((2, 4)), draw.choice((("a", "b"), (1, 2), ("a",)))
    seconds, labels = draw.choice(((902,), (902, 903, 904.5))), draw.choice(((1, 15), (1, 2, 15, 70)))

    def some(count, scored):
        corners = [sorted(draw.choices(range(steps + 1), k=2)) for _ in range(2 * count)]
        if draw.random() < 0.3:
            corners = [c[::-1] if draw.random() < 0.2 else c for c in corners]
        pairs = zip(corners[::2], corners[1::2], strict=True)
        boxes = [(x[0] / steps, y[0] / steps, x[1] / steps, y[1] / steps) for x, y in pairs]
        places = [(draw.choice(videos), draw.choice(seconds)) for _ in boxes]
        rows = [(*at, *box, draw.choice(labels)) for at, box in zip(places, boxes, strict=True)]
        return [(*r, draw.randrange(4) / 4) for r in rows] if scored else rows

    truth = some(draw.randrange(1, 15), scored=False)
    found = some(draw.randrange(0, 30), scored=True)
    classes = draw.choice((None, None, [1, 15], [70, 2, 5], [1]))
    excluded = draw.sample([(v, s) for v in videos for s in (902, 903, 904.5, 7)], draw.choice((0, 0, 0, 1, 3)))
    return truth, found, classes, excluded


def agree(seed):
    """How many of a problem's protocols and forms have a result, each as the loops have it."""
    draw, compared = random.Random(seed), 0
    truth, found, classes, excluded = problem(draw)
    thresholds = (0.2, 1 / 3, 0.5, 0.75, 1.0)
    form = (lambda rows, _: rows, columns, lambda rows, _: as_box_rows(rows))[seed % 3]
    rows = form(truth, NAMES[:-1]), form(found, NAMES)
    for protocol in PROTOCOLS:
        wanted = {t: by_loops(truth, found, classes, t, protocol, set(excluded)) for t in thresholds}
        counted = {r[6] for r in truth if r[2] < r[4] and r[3] < r[5] and r[:2] not in excluded}
        if not counted & set(counted if classes is None else classes):
            with pytest.raises(ValueError, match="ground truth"):
                frame_map(*rows, classes, thresholds, protocol, excluded)
            continue
        got = frame_map(*rows, classes, thresholds, protocol, excluded)
        for t, (per_class, mean) in wanted.items():
            assert got["per_class"][t] == pytest.approx(per_class, abs=1e-12)
            assert list(got["per_class"][t]) == sorted(per_class)
            assert got["mAP"][t] == pytest.approx(mean, abs=1e-12, nan_ok=True)
        assert frame_map(*rows, classes, 0.5, protocol, excluded)["per_class"] == got["per_class"][0.5]
        compared += 1
    return compared


def test_frame_map_is_that_of_loops():
    assert sum(agree(seed) for seed in range(200)) > 250


@pytest.mark.long
def test_frame_map_is_that_of_loops_for_many_problems(monkeypatch):
    monkeypatch.setattr("videomae.frame_map._MATCHED", 3)
    assert sum(agree(seed) for seed in range(1000, 2000)) > 1250


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_published_case_has_its_published_value(ava, protocol):
    truth, found = read_rows(ava / "gt.csv", score=False), read_rows(ava / "pred.csv", score=True)
    got = frame_map(truth, found, [1, 2, 3], protocol=protocol)
    assert got["mAP"] == pytest.approx(0.09385522, abs=5e-9)
    assert got["per_class"] == pytest.approx({1: 0.1704545, 2: 0, 3: 0.1111111}, abs=5e-8)
    assert got["per_group"] == {"person_movement": got["mAP"]}


def test_the_published_case_has_it_from_split_lines_too(ava):
    lines = {name: [line.split(",") for line in (ava / name).read_text().split()] for name in ("gt.csv", "pred.csv")}
    truth = [(r[0], r[1], *map(float, r[2:6]), int(r[6])) for r in lines["gt.csv"]]
    assert frame_map(truth, lines["pred.csv"])["mAP"] == pytest.approx(0.09385522, abs=5e-9)


def test_a_detection_takes_the_box_that_it_overlaps_most_and_no_second_choice():
    truth = [row(LEFT), row(WIDE)]
    # both overlap the wide box most; the second also overlaps the left one by more than a half, which stays free
    found = [row(WIDE, score=0.9), row((0.0, 0.0, 0.7, 1.0), score=0.8)]
    assert overlap_of(LEFT, found[1][2:6]) > 0.5
    assert frame_map(truth, found)["per_class"] == {1: 0.5}


def test_of_equal_overlaps_the_first_box_is_taken():
    # the same boxes in either order: in one of them the exact detection comes too late
    whole = (0.0, 0.0, 1.0, 1.0)
    found = [row(whole, score=0.9), row(LEFT, score=0.8)]
    assert frame_map([row(LEFT), row(RIGHT)], found)["mAP"] == 0.5
    assert frame_map([row(RIGHT), row(LEFT)], found)["mAP"] == 1.0


def test_an_overlap_of_the_threshold_is_enough():
    found = [row((0.0, 0.0, 1.0, 1.0), score=0.5)]
    assert frame_map([row(LEFT)], found, iou=0.5)["mAP"] == 1
    assert frame_map([row(LEFT)], found, iou=0.51)["mAP"] == 0


def test_of_equal_scores_the_earlier_row_is_first():
    right, wrong = row(LEFT, score=0.5), row(RIGHT, score=0.5)
    assert frame_map([row(LEFT)], [right, wrong])["mAP"] == 1
    assert frame_map([row(LEFT)], [wrong, right])["mAP"] == 0.5


def test_precision_is_the_best_at_this_recall_or_above():
    truth = [row(LEFT, second=s) for s in range(4)]
    found = [row(RIGHT, score=0.9), *(row(LEFT, score=0.8 - s / 10, second=s) for s in range(3))]
    # wrong, then three right ones of four: 3/4 is the best precision of all of them
    assert frame_map(truth, found)["mAP"] == pytest.approx(3 / 4 * 3 / 4)


def test_boxes_without_an_area_do_not_count_on_either_side():
    lines = [(0.5, 0.0, 0.5, 1.0), (0.5, 0.5, 0.2, 0.9), (0.0, 0.3, 1.0, 0.3)]
    truth = [row(LEFT), *(row(line) for line in lines)]
    found = [*(row(line, score=0.9) for line in lines), row(LEFT, score=0.1)]
    for protocol in PROTOCOLS:
        assert frame_map(truth, found, protocol=protocol)["mAP"] == 1


def test_boxes_of_a_tiny_area_have_no_overlap():
    tiny = (0.0, 0.0, 1e-200, 1e-200)
    assert frame_map([row(tiny)], [row(tiny, score=1.0)])["mAP"] == 0
    small = (0.1, 0.1, 0.1001, 0.1001)
    assert frame_map([row(small)], [row(small, score=1.0)])["mAP"] == 1


def test_a_class_without_ground_truth_is_ignored():
    for protocol in PROTOCOLS:
        found = [row(LEFT, score=0.5), row(LEFT, 2, 0.5)]
        assert frame_map([row(LEFT)], found, [1, 2, 3], protocol=protocol)["per_class"] == {1: 1}


def test_a_class_without_detections_is_0_officially_and_ignored_by_mmaction2():
    truth, found = [row(LEFT), row(LEFT, 2)], [row(LEFT, score=0.5)]
    assert frame_map(truth, found)["per_class"] == {1: 1, 2: 0}
    assert frame_map(truth, found)["mAP"] == 0.5
    assert frame_map(truth, found, protocol="mmaction2")["per_class"] == {1: 1}


def test_without_detections_it_is_0_officially_and_nothing_by_mmaction2():
    assert frame_map([row(LEFT)], []) == {"mAP": 0, "per_class": {1: 0}, "per_group": {"person_movement": 0}}
    got = frame_map([row(LEFT)], [], protocol="mmaction2")
    assert math.isnan(got["mAP"])
    assert got["per_class"] == got["per_group"] == {}


@pytest.mark.parametrize("frame", [{"second": 903}, {"video": "b"}])
def test_a_detection_in_a_frame_without_ground_truth_is_wrong_officially_and_skipped_by_mmaction2(frame):
    truth, found = [row(LEFT)], [row(LEFT, score=0.9, **frame), row(LEFT, score=0.5)]
    assert frame_map(truth, found)["mAP"] == 0.5
    assert frame_map(truth, found, protocol="mmaction2")["mAP"] == 1


def test_ground_truth_of_another_class_makes_a_frame_count_for_mmaction2_if_it_counts_itself():
    truth = [row(LEFT), row(LEFT, 2, second=903)]
    found = [row(LEFT, score=0.9, second=903), row(LEFT, score=0.5)]
    assert frame_map(truth, found, protocol="mmaction2")["per_class"][1] == 0.5
    assert frame_map(truth, found, [1], protocol="mmaction2")["per_class"][1] == 1
    assert frame_map(truth, found, [1])["per_class"][1] == 0.5


def test_excluded_frames_count_on_neither_side():
    truth = [row(LEFT), row(LEFT, second=903), row(LEFT, 2, second=903)]
    found = [row(RIGHT, score=0.9, second=903), row(LEFT, score=0.5), row(RIGHT, score=0.9, second=7)]
    got = frame_map(truth, found, excluded=[("a", "0903"), ("a", 7.0), ("b", 1)])
    assert got["per_class"] == {1: 1}


def test_excluded_ground_truth_is_still_missed_by_mmaction2():
    truth = [row(LEFT), row(LEFT, second=903), row(LEFT, 2, second=903)]
    found = [row(LEFT, score=0.5), row(LEFT, 2, 0.5)]
    got = frame_map(truth, found, protocol="mmaction2", excluded=[("a", 903)])
    assert got["per_class"] == {1: 0.5, 2: 0}


@pytest.mark.parametrize("second", ["0902", "902", 902.0, np.int16(902), "902.0"])
def test_equal_moments_are_equal(second):
    assert frame_map([row(LEFT, second=902)], [row(LEFT, score=1.0, second=second)])["mAP"] == 1
    assert frame_map([row(LEFT, second=second)], [row(LEFT, score=1.0, second=902)])["mAP"] == 1


def test_columns_may_be_arrays_lists_or_a_table():
    pandas = pytest.importorskip("pandas")
    truth = columns([row(LEFT), row(RIGHT, 2, video="b")], NAMES[:-1])
    found = columns([row(LEFT, score=0.5), row(LEFT, 2, 0.5, video="b")], NAMES)
    arrays = [{name: np.array(values) for name, values in one.items()} for one in (truth, found)]
    tables = [pandas.DataFrame(one) for one in (truth, found)]
    for one, other in ((truth, found), arrays, tables):
        assert frame_map(one, other)["per_class"] == {1: 1, 2: 0}
    # other columns are no harm
    assert frame_map(truth | {"person": [0, 1]}, found)["per_class"] == {1: 1, 2: 0}


def test_float32_boxes_are_compared_in_float64():
    truth, found = as_box_rows([row(LEFT)]), as_box_rows([row((0.1, 0.2, 0.35, 0.95), score=0.5)])
    narrow = BoxRows(found.names, found.video, found.second, found.box.astype("f4"), found.label, found.score)
    wide = BoxRows(found.names, found.video, found.second, narrow.box.astype("f8"), found.label, found.score)
    exact = overlap_of(LEFT, wide.box[0].tolist())
    for rows in (narrow, wide):
        assert frame_map(truth, rows, iou=exact)["mAP"] == 1
        assert frame_map(truth, rows, iou=math.nextafter(exact, 1))["mAP"] == 0


def test_groups_are_means_of_their_classes_that_count():
    truth = [row(LEFT, c) for c in (14, 15, 63, 64, 99)]
    found = [row(LEFT, c, 0.5) for c in (14, 15, 64)]
    per_group = {"person_movement": 1, "object_manipulation": 0.5, "person_interaction": 1}
    assert frame_map(truth, found)["per_group"] == per_group
    assert frame_map(truth, found, [99])["per_group"] == {}
    assert frame_map(truth, found, groups={"own": [15, 99], "none": [3]})["per_group"] == {"own": 0.5}
    assert [min(g) for g in AVA_GROUPS.values()] == [1, 15, 64]
    assert [max(g) for g in AVA_GROUPS.values()] == [14, 63, 80]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "coco"}, "protocol must be official or mmaction2; got 'coco'"),
        ({"iou": 0}, "iou must be above 0 and at most 1; got 0"),
        ({"iou": (0.5, 1.5)}, "got 1.5"),
        ({"iou": ()}, "got none"),
        ({"classes": []}, "classes names no class"),
        ({"classes": [1.5]}, "class must be a whole number; got 1.5"),
        ({"classes": [7]}, "no box of the ground truth"),
        ({"excluded": [("a", 902)]}, "all key frames of the ground truth are excluded"),
        ({"excluded": ["abc"]}, "must be pairs"),
        ({"excluded": [5]}, "must be pairs"),
        ({"excluded": [([], 902)]}, "must be pairs"),
        ({"excluded": [("a", "noon")]}, "excluded: second must be a number; got 'noon' in row 0"),
        ({"ground_truth": []}, "no box of the ground truth"),
        ({"ground_truth": [row(LEFT), row(LEFT, score=1.0)]}, r"ground truth: row 1 must be \(video, second, x1"),
        ({"detections": [row(LEFT)]}, r"detections: row 0 must be .*score\)"),
        ({"detections": [row(LEFT, score=math.nan)]}, "detections: score must be finite; got nan in row 0"),
        ({"detections": [row((0, 0, math.inf, 1), score=1.0)]}, "detections: x2 must be finite; got inf in row 0"),
        ({"detections": [row(LEFT, "run", 1.0)]}, "detections: class must be a number; got 'run' in row 0"),
        ({"detections": [row(LEFT, 1.5, 1.0)]}, "detections: class must be a whole number; got 1.5 in row 0"),
        (
            {"detections": [row(LEFT, score=1.0), row(LEFT, score=1.0, second=None)]},
            "second must be finite; got nan in row 1",
        ),
        ({"detections": [row(LEFT, score=1.0, video=[])]}, "a video must be a name or a number"),
        ({"detections": columns([row(LEFT)], NAMES[:-1])}, "it has no score"),
        ({"detections": columns([row(LEFT, score=1.0)], NAMES) | {"x1": [0, 0]}}, "columns must be of one length"),
        ({"detections": as_box_rows([row(LEFT, score=math.inf)])}, "score must be finite; got inf in row 0"),
        ({"detections": 5}, "detections must be rows"),
        ({"detections": "abc"}, "detections must be rows"),
        ({"detections": [5]}, "row 0 must be"),
    ],
)
def test_frame_map_refuses_what_cannot_be_measured(options, message):
    with pytest.raises(ValueError, match=message):
        frame_map(**{"ground_truth": [row(LEFT)], "detections": [row(LEFT, score=0.5)], **options})


@pytest.mark.long
def test_metrics_need_no_package_that_reads():
    code = "import sys, videomae.metrics; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"pandas", "av", "decord", "PIL", "tyro"}.isdisjoint(out.stdout.split())
