"""Shifts of hue, saturation and value, against Python's own conversion pixel by pixel."""

import colorsys

import numpy as np
import pytest

from videomae.data.hsv import HsvShift, draw_shift, shift_hsv
from videomae.keys import Draws

SHIFTS = [HsvShift(7.3, 21.0, -13.0), HsvShift(-10, -26, 26), HsvShift(10, 26, -26), HsvShift(0, 0, 0)]


def pixels():
    """Random ones, greys, and the corners of the cube: uint8 [1, 1, n, 3]."""
    rng = np.random.default_rng(0)
    greys = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[:, None], 3, axis=1)
    corners = np.array([[r, g, b] for r in (0, 1, 255) for g in (0, 254, 255) for b in (0, 255)], dtype=np.uint8)
    return np.concatenate((rng.integers(0, 256, (1500, 3), dtype=np.uint8), greys, corners))[None, None]


@pytest.mark.parametrize("shift", SHIFTS, ids=str)
def test_every_pixel_is_what_python_makes_of_it(shift):
    given = pixels()
    before = given.copy()
    ours = shift_hsv(given, shift)
    assert np.array_equal(given, before)
    for pixel, got in zip(given[0, 0].tolist(), ours[0, 0].tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(colour / 255 for colour in pixel))
        hue = (hue + shift.hue / 180) % 1
        saturation = min(max(saturation + shift.saturation / 255, 0), 1)
        value = min(max(value + shift.value / 255, 0), 1)
        wanted = [255 * colour for colour in colorsys.hsv_to_rgb(hue, saturation, value)]
        assert got == pytest.approx(wanted, abs=0.51)


def test_no_shift_changes_nothing():
    assert np.array_equal(shift_hsv(pixels(), HsvShift(0, 0, 0)), pixels())


def test_all_frames_of_a_clip_get_the_same():
    rng = np.random.default_rng(1)
    clip = rng.integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    whole = shift_hsv(clip, SHIFTS[0])
    assert whole.shape == clip.shape
    for frame, image in zip(clip, whole, strict=True):
        assert np.array_equal(shift_hsv(frame[None], SHIFTS[0])[0], image)
    # a crop, whose rows do not lie side by side
    assert np.array_equal(shift_hsv(clip[:, 1:4, 2:6], SHIFTS[0]), whole[:, 1:4, 2:6])


def test_draws_are_even_and_within_their_ranges():
    drawn = np.array([(s.hue, s.saturation, s.value) for s in (draw_shift(Draws(n)) for n in range(3000))])
    for part, most in zip(drawn.T, (10, 26, 26), strict=True):
        assert -most <= part.min() < -0.99 * most
        assert 0.99 * most < part.max() <= most
        assert abs(part.mean()) < 0.05 * most
    assert abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.06
    assert draw_shift(Draws(5)) == draw_shift(Draws(5))
