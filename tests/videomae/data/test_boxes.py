"""Boxes through resizing, cropping, mirroring and the moves of training and testing: values worked out by hand."""

import numpy as np
import pytest

from videomae.data.boxes import cropped, enlarged, jittered, mirrored, scaled, to_fractions, to_pixels
from videomae.keys import Draws


def same(got, *rows):
    np.testing.assert_allclose(got, np.array(rows, dtype=np.float64).reshape(-1, 4), rtol=0, atol=1e-9)
    assert got.dtype == np.float64


def test_pixels_are_inclusive():
    # of 200 pixels across, a quarter to three quarters are 50 to 149
    fractions = np.array([[0.25, 0.5, 0.75, 1.0], [0, 0, 1, 1]], dtype=np.float32)
    same(to_pixels(fractions, 100, 200), (50, 50, 149, 99), (0, 0, 199, 99))


def test_fractions_come_back_and_stay_in_the_frame():
    fractions = np.array([[0.25, 0.5, 0.75, 1.0], [0.1, 0.2, 0.3, 0.4]])
    same(to_fractions(to_pixels(fractions, 90, 160), 90, 160), *fractions)
    same(to_fractions(np.array([[-3.0, 10, 170, 89]]), 90, 160), (0, 10 / 90, 1, 1))


def test_resizing_multiplies_all_four_sides():
    boxes = np.array([[10.0, 20, 29, 59]])
    same(scaled(boxes, (100, 200), (50, 100)), (5, 10, 14.5, 29.5))
    # 853 x 480 becomes 454 x 256: the sides' ratios differ a little
    same(scaled(boxes, (480, 853), (256, 454)), (4540 / 853, 5120 / 480, 29 * 454 / 853, 59 * 256 / 480))


def test_a_crop_shifts_clamps_and_keeps_what_is_outside():
    boxes = np.array([[30.0, 40, 49, 59], [0, 0, 39, 99], [0, 0, 5, 5], [90, 95, 99, 99]])
    # 50 wide and 40 high from (left 20, top 30) on
    same(cropped(boxes, 30, 20, (40, 50)), (10, 10, 29, 29), (0, 0, 19, 39), (0, 0, 0, 0), (49, 39, 49, 39))


def test_mirrored_boxes_change_sides():
    boxes = np.array([[10.0, 5, 29, 8], [0, 0, 99, 1]])
    same(mirrored(boxes, 100), (70, 5, 89, 8), (0, 0, 99, 1))
    same(mirrored(mirrored(boxes, 100), 100), *boxes)


def test_a_test_enlarges_by_a_tenth_and_a_twentieth():
    boxes = np.array([[100.0, 50, 199, 149], [0, 0, 19, 19], [380, 180, 399, 199]])
    # 100 wide: 5 on each side; 100 high: 2.5 on each; 20: 1 and a half
    same(enlarged(boxes, 200, 400), (95, 47.5, 204, 151.5), (0, 0, 20, 19.5), (379, 179.5, 399, 199))


def test_jitter_moves_each_side_by_its_own_draw():
    boxes = np.array([[40.0, 30, 79, 49], [100, 100, 109, 139]])
    draws = Draws(3)
    wanted = []
    for x1, y1, x2, y2 in boxes:
        width, height = x2 - x1 + 1, y2 - y1 + 1
        a, b, c, d = (draws.uniform() for _ in range(4))
        low = (x1 + width * (-0.2 + 0.3 * a), y1 + height * (-0.1 + 0.15 * b))
        wanted.append((*low, x2 + width * (-0.1 + 0.3 * c), y2 + height * (-0.05 + 0.15 * d)))
    same(jittered(boxes, 200, 300, Draws(3)), *wanted)
    same(jittered(boxes[:1], 200, 300, Draws(3)), wanted[0])


def test_jitter_reaches_its_ends_and_no_further():
    boxes = np.repeat([[100.0, 100, 199, 199]], 4000, axis=0)
    moved = (jittered(boxes, 400, 400, Draws(0)) - boxes) / 100
    for side, (low, high) in enumerate(((-0.2, 0.1), (-0.1, 0.05), (-0.1, 0.2), (-0.05, 0.1))):
        assert low <= moved[:, side].min() < low + 0.002
        assert high - 0.002 < moved[:, side].max() <= high
        assert moved[:, side].mean() == pytest.approx((low + high) / 2, abs=0.01)
    assert abs(np.corrcoef(moved.T) - np.eye(4)).max() < 0.06


def test_jittered_boxes_are_inside_and_at_least_a_pixel():
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 31, (2000, 2, 2))
    boxes = np.concatenate((corners.min(1), corners.max(1)), axis=1)
    boxes[:500, 2:] = boxes[:500, :2]  # points
    boxes[500:600] = (31, 23, 31, 23)  # outside of a crop, in its corner
    x1, y1, x2, y2 = jittered(boxes.clip(0, (31, 23, 31, 23)), 24, 32, Draws(4)).T
    assert x1.min() >= 0
    assert y1.min() >= 0
    assert x2.max() <= 31
    assert y2.max() <= 23
    assert (x2 - x1).min() > 1 - 1e-9
    assert (y2 - y1).min() > 1 - 1e-9


def test_no_boxes_are_no_trouble():
    none = np.zeros((0, 4))
    results = (to_pixels(none, 2, 2), jittered(none, 9, 9, Draws(0)), enlarged(none, 9, 9), mirrored(none, 9))
    assert all(result.shape == (0, 4) for result in results)
