"""Scores of predictions, their tables and picture."""

import csv
import warnings

import numpy as np
import pytest
from PIL import Image

from train.predictions import Row
from train.scores import draw_confusion, score, write_tables


def rows(labels, predicted, num_classes, lost=()):
    """Videos whose first choice is given, and whose other classes follow in order."""
    out = {}
    for i, (label, first) in enumerate(zip(labels, predicted, strict=True)):
        vector = np.linspace(0.5, 0.1, num_classes, dtype=np.float32)
        vector[first] = 1.0
        out[i] = Row(i, f"/{i}.mp4", label, 0.1, *((None, "cut off") if i in lost else (vector,)))
    return out


def test_a_video_that_could_not_be_read_is_wrong_and_confused_with_nothing():
    made = score(rows([0, 0, 1, 1, 1, 6], [0, 1, 1, 0, 1, 6], 8, lost=(4, 5)), tuple("abcdefgh"))
    assert made.top1 == pytest.approx(100 * 2 / 6)
    assert made.top5 == pytest.approx(100 * 4 / 6)
    assert made.mean_class_top1 == pytest.approx(100 * (1 / 2 + 1 / 3 + 0) / 3)
    assert made.videos.tolist() == [2, 3, 0, 0, 0, 0, 1, 0]
    assert made.unreadable.tolist() == [0, 1, 0, 0, 0, 0, 1, 0]
    assert made.confusion[:2, :2].tolist() == [[1, 1], [1, 1]]
    assert made.confusion.sum() == 4


def test_top_5_is_not_top_8():
    # label 4 comes fifth, 5 sixth, 7 last
    made = score(rows([7, 5, 4, 3], [0, 0, 0, 0], 8), tuple("abcdefgh"))
    assert made.right5.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_the_worst_classes_come_first_and_perfect_ones_not_at_all():
    made = score(rows([0, 0, 1, 1, 2, 2], [0, 0, 2, 2, 2, 0], 4), tuple("abcd"))
    assert made.worst(5) == [(1, 0.0, 2), (2, 50.0, 0)]
    assert made.worst(1) == [(1, 0.0, 2)]
    nothing = score(rows([1], [0], 4, lost=(0,)), tuple("abcd"))
    assert nothing.worst(5) == [(1, 0.0, None)]


def test_names_with_commas_survive_in_the_tables(tmp_path):
    names = ("a, b", 'say "c"', "dé")
    write_tables(score(rows([0, 1, 1], [0, 1, 0], 3), names), tmp_path)
    table = list(csv.DictReader((tmp_path / "per_class.csv").open(encoding="utf-8")))
    assert [row["class"] for row in table] == list(names)
    assert [row["top1"] for row in table] == ["100.00", "50.00", ""]
    matrix = list(csv.reader((tmp_path / "confusion.csv").open(encoding="utf-8")))
    assert matrix[0][1:] == list(names)
    assert matrix[2] == ['say "c"', "1", "1", "0"]


@pytest.mark.parametrize(
    "count", [2, pytest.param(101, marks=pytest.mark.long), pytest.param(400, marks=pytest.mark.long)]
)
def test_a_picture_shows_where_the_counts_are(tmp_path, count):
    """With a name that is a formula to matplotlib, one that is long, and classes without a video."""
    names = ("$x_", "y^$", *(f"{'long ' * 9}{i}" for i in range(2, count)))
    labels = [i for i in range(count) if i % 5 != 4]
    draw_confusion(score(rows(labels, labels, count), names), tmp_path / "c.png", "all right")
    with Image.open(tmp_path / "c.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    # a dark diagonal on white
    assert pixels.shape[0] >= 3 * count
    assert (pixels < 40).mean() > 0.5 / count
    assert (pixels == 255).mean() > 0.3


def test_a_name_that_the_font_cannot_write_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(score(rows([0], [0], 2), ("日本", "no \udcff text")), tmp_path / "c.png", "")


def test_names_of_folders_that_are_no_text_keep_their_bytes_in_the_tables(tmp_path):
    write_tables(score(rows([0], [0], 1), ("b\udcff",)), tmp_path)
    assert b"0,b\xff,1," in (tmp_path / "per_class.csv").read_bytes()
    assert b"b\xff,1" in (tmp_path / "confusion.csv").read_bytes()
