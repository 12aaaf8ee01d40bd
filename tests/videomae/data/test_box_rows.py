"""Files of boxes, read and written."""

import csv
import io
import os
import random
from pathlib import Path

import numpy as np
import pytest

from videomae.data import box_rows
from videomae.data.box_rows import BoxRows, line_of, read_rows, write_rows

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
TRUTH = "a,0902,0.1,0.2,0.3,0.4,12,7\n"
FOUND = "a,0902,0.1,0.2,0.3,0.4,12,0.875\n"
OWN = "path,second,x1,y1,x2,y2,label\n"


@pytest.fixture
def ava() -> Path:
    folder = Path(os.environ.get("VIDEOMAE_TEST_DATA", SHARED)) / "ava"
    if not folder.is_dir():
        pytest.skip(f"needs the annotations in {folder}; VIDEOMAE_TEST_DATA names another folder")
    return folder


def read(folder, text, **options):
    path = folder / "rows.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_rows(path, **options)


def lists(rows):
    """Everything as Python values."""
    beside = [None if x is None else x.tolist() for x in (rows.score, rows.person)]
    videos = [rows.names[place] for place in rows.video]
    return videos, rows.second.tolist(), rows.box.tolist(), rows.label.tolist(), *beside


def test_official_annotations_have_persons(ava):
    rows = read_rows(ava / "ava_sample.csv", score=False)
    lines = [line.split(",") for line in (ava / "ava_sample.csv").read_text().split()]
    videos, second, box, label, score, person = lists(rows)
    assert [(v, s, *b, c, p) for v, s, b, c, p in zip(videos, second, box, label, person, strict=True)] == [
        (v, float(s), *map(float, b), int(c), int(p)) for v, s, *b, c, p in lines
    ]
    assert score is None
    assert rows.classes is None


def test_detections_have_scores(ava):
    rows = read_rows(ava / "pred.csv", score=True)
    lines = [line.split(",") for line in (ava / "pred.csv").read_text().split()]
    assert lists(rows)[4] == [float(line[7]) for line in lines]
    assert rows.person is None
    assert len(rows) == 30


def test_numbers_are_those_that_python_reads(tmp_path):
    draw = random.Random(0)
    texts = [f"{draw.random():.{draw.randrange(1, 18)}f}" for _ in range(2000)]
    rows = read(tmp_path, "".join(f"a,{draw.random()},0,0,{t},1,1,{t}\n" for t in texts), score=True)
    assert rows.score.tolist() == rows.box[:, 2].tolist() == [float(text) for text in texts]


def test_ones_own_columns_go_by_their_names(tmp_path):
    text = "label,score,second,x1,y1,x2,y2,path\n3,0.5,1.25,0,0.25,0.5,1,b c.mp4\n"
    assert lists(read(tmp_path, text)) == (["b c.mp4"], [1.25], [[0, 0.25, 0.5, 1]], [3], [0.5], None)
    assert lists(read(tmp_path, text.replace("score", "person").replace("0.5,", "5,", 1)))[4:] == (None, [5])


def test_names_of_classes_are_numbered_in_their_order(tmp_path):
    text = OWN + "a,0,0,0,1,1,walk\na,1,0,0,1,1, run\nb,1,0,0,1,1,walk\n"
    rows = read(tmp_path, text)
    assert rows.classes == ("run", "walk")
    assert rows.label.tolist() == [1, 0, 1]
    rows = read(tmp_path, text, classes=("walk", "sit", "run"))
    assert rows.classes == ("walk", "sit", "run")
    assert rows.label.tolist() == [0, 2, 0]
    rows = read(tmp_path, text, classes={"walk": 14, "run": 10})
    assert rows.label.tolist() == [14, 10, 14]


def test_names_of_classes_that_are_numbers_are_ids_unless_names_are_given(tmp_path):
    text = OWN + "a,0,0,0,1,1,2\na,0,0,0,1,1,07\n"
    assert read(tmp_path, text).label.tolist() == [2, 7]
    assert read(tmp_path, text).classes is None
    assert read(tmp_path, text, classes=("07", "2")).label.tolist() == [1, 0]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("first", ["", OWN, f"\n{OWN}"])
def test_line_ends_and_marks_of_encodings_make_no_difference(tmp_path, end, mark, first):
    lines = "a,0902,0.1,0.2,0.3,0.4,12\nNA,903,0.1,0.2,0.3,0.4,1\n001,903,0.1,0.2,0.3,0.4,1"
    rows = read(tmp_path, mark + (first + lines).replace("\n", end))
    assert rows.names == ("a", "NA", "001")
    assert rows.second.tolist() == [902, 903, 903]


def test_capitals_and_spaces_in_names_of_columns_make_no_difference(tmp_path):
    assert lists(read(tmp_path, "Path, Second,X1,Y1,X2,Y2,Label\na,1,0,0,1,1,run\n"))[0] == ["a"]


def test_rows_are_found_again_by_their_lines(tmp_path):
    for head, first in (("", 1), ("\ufeff\n", 2), ("\ufeffsecond,path,x1,y1,x2,y2,label\n", 2), ("\n \n" + OWN, 4)):
        path = tmp_path / "rows.csv"
        path.write_text(head + "1,1,0,0,1,1,1\n\n \n1,1,0,0,1,1,1\n")
        assert len(read_rows(path)) == 2
        assert [line_of(path, row) for row in (0, 1)] == [first, first + 3]


def test_names_may_be_quoted(tmp_path):
    rows = read(tmp_path, OWN + '"a, ""b"".mp4",0,0,0,1,1,"run, fast"\n')
    assert rows.names == ('a, "b".mp4',)
    assert rows.classes == ("run, fast",)


def test_a_large_file_is_read_in_blocks(tmp_path, monkeypatch):
    draw = random.Random(1)
    lines = [f"v{draw.randrange(9)},{n},0,0,1,1,{draw.choice(('run', 'sit', 'walk'))},{n}\n" for n in range(60)]
    text = OWN.replace("label", "label,person") + "".join(lines)
    whole = read(tmp_path, text)
    for size in (1, 50, 1000):
        monkeypatch.setattr(box_rows, "_BLOCK", size)
        rows = read(tmp_path, text.rstrip() if size == 50 else text)
        assert lists(rows) == lists(whole)
        assert rows.names == whole.names
        with pytest.raises(ValueError, match=r"rows\.csv:42: second must be a number; it is `late`"):
            read(tmp_path, text.replace(",40,", ",late,"))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "is empty"),
        ("\ufeff\n \n", {}, "is empty"),
        (OWN, {}, "has no rows"),
        (
            TRUTH,
            {},
            "csv:1 has 8 columns without names: begin with a line .* score or person; .* AVA's, give its folder",
        ),
        (OWN.replace(",", ";"), {}, "csv:1 must have 7 or 8 columns separated by commas.*it has 1"),
        ("a,0902,0.1,0.2,0.3,0.4,12\n", {"score": True}, "csv:1 must have a score"),
        (OWN + "a,0,0,0,1,1,1\n", {"score": True}, "csv:1 must name a column score"),
        (OWN.replace("y2", "y3"), {}, "csv:1 must name the columns path,second"),
        (OWN.replace("label", "label,scores"), {}, "csv:1 must name the columns"),
        (OWN.replace("label", "label,label"), {}, "csv:1 must name the columns"),
        ("a,0902,0.1,0.2,0.3\n", {}, "csv:1 must have 7 or 8 columns.*it has 5"),
        (TRUTH + "\n" + TRUTH[:-3] + "\n", {"score": False}, "csv:3 must have 8 columns separated by commas; it has 7"),
        (TRUTH + TRUTH[:-1] + ",1\n", {"score": False}, "csv:2 must have 8 columns separated by commas; it has 9"),
        (TRUTH + TRUTH[:-1] + ",1,2\n", {"score": False}, "csv:2 must have 8 columns separated by commas; it has 10"),
        (OWN + "a,0,0,0,1,1,run,5\n", {}, "csv:2 must have 7 columns separated by commas; it has 8"),
        (OWN + "a,0,0,0,1,1,run,5,6\n", {}, "csv:2 must have 7 columns separated by commas; it has 9"),
        (TRUTH + TRUTH.replace("0902", "noon"), {"score": False}, "csv:2: second must be a number; it is `noon`"),
        (TRUTH.replace("0902", "-1"), {"score": False}, "csv:1: there must be a finite second of 0 or above; got -1"),
        (TRUTH.replace("0.1", ""), {"score": False}, "csv:1: x1 must be a number; it is ``"),
        (TRUTH.replace("0.1", "nan"), {"score": False}, "csv:1: x1 must be a number; it is `nan`"),
        (
            TRUTH.replace("0.3", "3.5"),
            {"score": False},
            r"corners in \[0, 1\], fractions of the frame; got 0.1, 0.2, 3.5",
        ),
        (TRUTH.replace("0.1", "-0.01"), {"score": False}, r"corners in \[0, 1\]"),
        (TRUTH + TRUTH.replace("0.3", "0.1"), {"score": False}, "csv:2: there must be x2 above x1"),
        (TRUTH.replace(",12,", ",12.5,"), {"score": False}, "csv:1: there must be a whole number as label; got 12.5"),
        (
            TRUTH.replace(",12,", ",run,"),
            {"score": False},
            r"label must be a number; it is `run` \(the first line may name",
        ),
        (TRUTH.replace(",12,", ",-12,"), {"score": False}, "csv:1: there must be a whole number as label; got -12"),
        (
            TRUTH.replace(",12,", ",99999999999,"),
            {"score": False},
            "csv:1: there must be a whole number as label; got 9999",
        ),
        (TRUTH.replace(",7", ",0.7"), {"score": False}, "csv:1: there must be a whole number as person; got 0.7"),
        (TRUTH.replace("0902", "True"), {"score": False}, "csv:1: second must be a number; it is `True`"),
        (FOUND.replace("0.875", "1e999"), {"score": True}, "csv:1: there must be a finite score; got inf"),
        (FOUND.replace("0.875", "inf"), {"score": True}, "csv:1: (there must be a finite score|score must be)"),
        (TRUTH + TRUTH[1:], {"score": False}, "csv:2: there must be a video"),
        (OWN + "a,0,0,0,1,1,\n", {}, "csv:2: label must be a class; it is ``"),
        (
            OWN + "\na,0,0,0,1,1,run\na,0,0,0,1,1,sit\n",
            {"classes": ("run",)},
            "csv:4: label must be.*`sit`; the classes, .* are run$",
        ),
        (OWN + "a,0,0,0,1,1,1\n", {"classes": ("run",)}, "csv:2: label must be a class; it is `1`"),
        (TRUTH.encode() + b"\xff" + TRUTH.encode(), {"score": False}, "csv:2 is no line of boxes: not text"),
        (b"\xff\xfe,1,2\n", {}, "csv:1 is no line of boxes"),
        (OWN + "a" * 140_000 + ",0,0,0,1,1,1\n", {}, "csv:2 is no line of boxes: field larger"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_line(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, **options)


def test_corners_that_were_rounded_are_read_as_they_are(tmp_path):
    assert read(tmp_path, "a,1,-0.001,0,1.001,1,1\n").box.tolist() == [[-0.001, 0, 1.001, 1]]


def test_a_detection_may_have_no_area(tmp_path):
    assert read(tmp_path, "a,1,0.5,0.5,0.5,0.2,1,0.5\n", score=True).box.tolist() == [[0.5, 0.5, 0.5, 0.2]]


def some_rows(count, seed=0):
    draw = np.random.default_rng(seed)
    corners = np.sort(draw.integers(0, 100_001, (count, 2, 2)), 1).reshape(count, 4) / 100_000
    names, seconds = ("a", "B b", "c,d", '"e"', "\ufefff", "g é"), np.array([902, 0, 1.25, 12345, 1 / 3, 1e-7])
    score = draw.integers(0, 100_001, count) / 100_000
    video, second = draw.integers(0, 6, count, np.int32), seconds[draw.integers(0, 6, count)]
    return BoxRows(names, video, second, corners, draw.integers(0, 81, count, np.int32), score)


def same(a, b):
    assert lists(a) == lists(b)


@pytest.mark.parametrize("header", [False, True])
def test_what_is_written_is_read_back(tmp_path, header, monkeypatch):
    monkeypatch.setattr(box_rows, "_WRITTEN", 100)
    rows = some_rows(1001)
    write_rows(tmp_path / "new" / "rows.csv", rows, header=header)
    same(read_rows(tmp_path / "new" / "rows.csv", score=None if header else True), rows)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.csv"]


def test_a_line_is_avas(tmp_path):
    one = np.ones(2, np.int32)
    box = np.array([[0.1, 0, 1 / 3, 1], [-0.0004, 0.5, 1.0004, 0.999996]], np.float32)
    rows = BoxRows(("x", "y"), one, np.array([902, 1.25]), box, one * 80, np.array([0.5, 12.5]))
    write_rows(tmp_path / "rows.csv", rows)
    first, second = (tmp_path / "rows.csv").read_bytes().splitlines(keepends=True)
    assert first == b"y,0902,0.10000,0.00000,0.33333,1.00000,80,0.50000\n"
    assert second == b"y,1.25,-0.00040,0.50000,1.00040,1.00000,80,12.50000\n"


def test_annotations_and_names_of_classes_are_read_back(tmp_path):
    rows = some_rows(50)
    person, label = np.arange(50, dtype=np.int32) - 1, rows.label % 2
    box = np.stack([rows.box[:, 0] / 2, rows.box[:, 1] / 2, rows.box[:, 2] / 2 + 0.5, rows.box[:, 3] / 2 + 0.5], 1)
    rows = BoxRows(rows.names, rows.video, rows.second, box.round(5), label, None, person, ("run, fast", "sit"))
    write_rows(tmp_path / "own.csv", rows, header=True)
    back = read_rows(tmp_path / "own.csv")
    same(back, rows)
    assert back.classes == rows.classes
    write_rows(tmp_path / "ava.csv", rows)
    same(read_rows(tmp_path / "ava.csv", score=False), rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a\nb",)}, "no text of one line"),
        ({"names": (" ",)}, "no text of one line"),
        ({"second": np.array([np.nan])}, "seconds must be finite"),
        ({"box": np.array([[0, 0, 2, 1.0]])}, "corners must be in"),
        ({"label": np.array([-1])}, "labels must be 0 or above"),
        ({"score": np.array([np.nan])}, "scores must be finite"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, change, message):
    fields = {"names": ("a",), "video": np.array([0]), "second": np.array([1.0]), "box": np.array([[0, 0, 1, 1.0]])}
    rows = BoxRows(**{**fields, "label": np.array([1]), **change})
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "rows.csv", rows)
    assert not any(tmp_path.iterdir())


def test_columns_of_rows_fit_together():
    fields = {"names": ("a",), "video": np.array([0]), "second": np.array([1.0]), "label": np.array([1])}
    box = np.array([[0, 0, 1, 1.0]])
    with pytest.raises(ValueError, match=r"box must be \[1, 4\]; got \[1, 3\]"):
        BoxRows(**fields, box=box[:, :3])
    with pytest.raises(ValueError, match=r"score must be \[1\]"):
        BoxRows(**fields, box=box, score=np.ones(2))
    with pytest.raises(ValueError, match=r"video must be in \[0, 0\)"):
        BoxRows(**{**fields, "names": ()}, box=box)


def by_lines(text, kind):
    """What a file of AVA says, line by line, or None where a line says nothing."""
    rows = []
    for line in io.StringIO(text.removeprefix("\ufeff")):
        if not line.strip():
            continue
        fields = next(csv.reader([line]))
        if len(fields) != 8 or not fields[0].strip():
            return None
        rows.append((fields[0], *(kind(x) for x in fields[1:])))
    return rows


def spoiled(draw, text):
    """A file with one to three bytes, pieces or lines changed."""
    for _ in range(draw.randrange(1, 3)):
        place = draw.randrange(len(text) + 1)
        piece = draw.choice(
            [*'0159.,"\n\r\t -+eE#;x\0', "nan", "inf", "NA", "True", "1e999", ",,", "\ufeff", "é", "9" * 30]
        )
        text = text[:place] + piece + text[place + draw.choice((0, 1, 1, 5)) :]
    return text


def check_spoiled(folder, seeds):
    """A spoiled file is refused by ValueError, or says what its lines say."""
    outcomes = []
    for seed in seeds:
        draw = random.Random(seed)
        text = spoiled(
            draw, draw.choice((FOUND, OWN.replace("l\n", "l,score\n") + FOUND)) + FOUND * draw.choice((0, 3))
        )
        try:
            rows = read(folder, text, score=True)
        except ValueError as error:
            outcomes.append(str(error))
            continue
        videos, second, box, label, score, _ = lists(rows)
        outcomes.append(len(rows))
        if "second" not in text and "x1" not in text and "\r" not in text:
            said = by_lines(text, float)
            got = [(v, s, *b, c, p) for v, s, b, c, p in zip(videos, second, box, label, score, strict=True)]
            assert got == said
    refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert all("rows.csv" in message for message in refused)
    return len(refused) / len(outcomes)


def test_a_spoiled_file_is_refused_or_read_as_it_stands(tmp_path):
    assert 0.3 < check_spoiled(tmp_path, range(150)) < 0.95


@pytest.mark.long
def test_thousands_of_spoiled_files_are_refused_or_read_as_they_stand(tmp_path):
    check_spoiled(tmp_path, range(1000, 3000))


def test_counts_what_it_refuses(tmp_path):
    head = "path,second,x1,y1,x2,y2,label\n"
    outside = tmp_path / "outside.csv"
    outside.write_text(head + "a,1,0,0,1,1,0\na,1,0,0,2,1,0\na,2,0,0,2,1,0\na,3,0,3,1,4,0\n")
    with pytest.raises(ValueError, match=r":3: there must be corners in \[0, 1\].*\(2 more lines like that\)"):
        read_rows(outside)
    unknown = tmp_path / "unknown.csv"
    unknown.write_text(head + "a,1,0,0,1,1,walk\na,1,0,0,1,1,fly\na,2,0,0,1,1,swim\n")
    with pytest.raises(
        ValueError,
        match=r":3: label must be a class; it is `fly` \(1 more line like that\); .* 0, 1, 2, 3, walk and 2 more$",
    ):
        read_rows(unknown, classes=["0", "1", "2", "3", "walk", "5", "6"])
