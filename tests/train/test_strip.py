"""Pictures in rows and columns: where cells are, and what does not fit."""

import numpy as np
import pytest

from train.strip import Row, draw_strip, fitted


def cell(colour, height=20, width=30):
    return np.full((height, width, 3), colour, dtype=np.uint8)


def places(sheet, colour):
    """The (row, column) box of a colour's pixels."""
    found = np.argwhere((sheet == colour).all(axis=2))
    return (*found.min(axis=0), *(found.max(axis=0) + 1)) if len(found) else None


def test_cells_are_whole_and_in_columns_below_their_headers():
    colours = [[(10, 20, 30), (40, 50, 60)], [(70, 80, 90), (100, 110, 120)]]
    rows = [Row(f"row {i}\nof two", [cell(c) for c in row], ("1 %", "2 %")) for i, row in enumerate(colours)]
    sheet = draw_strip("title", ["a", "a wide header,\nof two lines"], rows, ["a note"])
    boxes = [[places(sheet, c) for c in row] for row in colours]
    assert all(b[2] - b[0] == 20 and b[3] - b[1] == 30 for row in boxes for b in row)
    assert boxes[0][0][1] == boxes[1][0][1] < boxes[0][1][1] == boxes[1][1][1]
    assert boxes[0][0][0] == boxes[0][1][0] < boxes[1][0][0]
    # captions and labels are written between them
    assert (sheet[boxes[0][0][2] : boxes[1][0][0]] < 255).any()


def test_no_word_is_cut_off_and_no_letter_is_missing():
    long = "a note that is wider than its sheet, " * 12
    sheet = draw_strip("title 日本 \u202e.mp4", ["h"], [Row("r", [cell((1, 2, 3))])], [long])
    assert sheet.shape[1] < 700
    assert (sheet[:, -3:] == 255).all()
    assert (sheet[-3:] == 255).all()


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((8, 10), (32, 40)), ((30, 30), (30, 30)), ((100, 200), (34, 67)), ((40, 400), (40, 400)), ((1, 1), (30, 30))],
)
def test_pictures_become_larger_or_smaller_a_whole_number_of_times(shape, wanted):
    image = np.arange(np.prod(shape) * 3, dtype=np.uint8).reshape(*shape, 3)
    made = fitted(image, 30, 70)
    assert made.shape == (*wanted, 3)
    times = wanted[0] // shape[0]
    if times > 1:
        assert (made[::times, ::times] == image).all()
        assert (made[times - 1 :: times, times - 1 :: times] == image).all()
