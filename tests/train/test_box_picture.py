"""Pictures of key frames with their boxes."""

import numpy as np
import pytest

from train.box_picture import Boxed, draw_boxes

GREY = np.full((60, 80, 3), 90, np.uint8)


def frame_of(sheet, image):
    """What the picture shows of the key frame, as an array, and its magnification."""
    scale = sheet.width / image.shape[1]
    top = np.flatnonzero((np.asarray(sheet)[:, 0] == 90).all(axis=1))[0]
    return np.asarray(sheet)[top : top + round(image.shape[0] * scale)], scale


def test_a_box_is_drawn_where_it_is():
    sheet = draw_boxes(GREY, [Boxed(np.array([0.25, 0.5, 0.75, 0.9]), [("walk", 0.91)])], "a title")
    frame, scale = frame_of(sheet, GREY)
    # the lower edge, which no label hides
    changed = np.argwhere((frame[round(45 * scale) :] != 90).any(axis=2))
    left, right = changed[:, 1].min(), changed[:, 1].max()
    bottom = changed[:, 0].max() + round(45 * scale)
    assert (left, right + 1) == pytest.approx((20 * scale, 60 * scale), abs=1)
    assert bottom + 1 == pytest.approx(54 * scale, abs=1)


def test_has_lines_for_every_box_and_what_was_annotated():
    plain = draw_boxes(GREY, [], "nobody")
    boxed = [Boxed(np.array([0, 0, 0.5, 0.5]), [("walk", 0.9), ("talk", 0.4)]) for _ in range(3)]
    known = [one._replace(annotated=["walk"]) for one in boxed]
    heights = [draw_boxes(GREY, boxes, "title").height - plain.height for boxes in (boxed, known)]
    assert heights[1] == 2 * heights[0] > 0


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.99, 0.99, 1, 1), (0, 0, 0.001, 0.001), (0.5, 0.5, 0.5, 0.5)])
def test_boxes_at_the_edges_and_long_names_stay_in_the_picture(box):
    names = ["carry/hold (an object) " * 20, "\u767b\u308b $x_1$", "bytes \udcff"]
    for name in names:
        sheet = draw_boxes(GREY, [Boxed(np.array(box, float), [(name, 1.0)], [name])], name)
        assert sheet.width == 448


@pytest.mark.parametrize(("box", "hides"), [((0.3, 0, 0.7, 0.04), False), ((0.3, 0, 0.7, 0.9), True)])
def test_the_label_lies_beside_a_flat_box_at_the_upper_edge_and_in_a_large_one(box, hides):
    frame, scale = frame_of(draw_boxes(GREY, [Boxed(np.array(box), [("walk", 0.9)])], "t"), GREY)
    # the upper line of the box, the label's colour otherwise; and what is between it and the lower one
    inside = frame[2 : round(60 * scale * 0.04) - 2, round(27 * scale) : round(45 * scale)]
    assert bool((inside != 90).any()) == hides


def test_letters_that_the_font_has_are_drawn_and_others_asked_for():
    sheets = [draw_boxes(GREY, [], title) for title in ("\u00e9t\u00e9", "\u767bt\u767b", "?t?")]
    pixels = [np.asarray(sheet).tolist() for sheet in sheets]
    assert pixels[1] == pixels[2] != pixels[0]
    accent = [np.asarray(draw_boxes(GREY, [], title))[:20] for title in ("\u0159", "\u0161")]
    assert not np.array_equal(*accent)


def test_a_large_frame_is_not_enlarged():
    image = np.zeros((500, 900, 3), np.uint8)
    assert draw_boxes(image, [], "movie").width == 900
