"""Views for contrast: colours and blur against formulas of their own, and what a view depends on."""

import colorsys
import math

import numpy as np
import pytest

from tests.videos import moving_frames, write_video
from videomae.data.augment import Augment
from videomae.data.contrast import (
    Colours,
    ContrastAugment,
    ContrastReader,
    blurred,
    change_colours,
    draw_colours,
)
from videomae.data.dataset import Sample
from videomae.keys import Draws


def noise(*shape, low=0, high=256):
    return np.random.default_rng(0).integers(low, high, shape, dtype=np.uint8)


def greys(frames):
    return frames.astype(np.float64) @ (0.299, 0.587, 0.114)


def test_brightness_contrast_and_saturation_are_those_of_the_definition():
    frames = noise(2, 5, 6, 3, low=80, high=150)
    made = change_colours(frames, Colours(1.2, 0.7, 1.3))
    x = 1.2 * frames.astype(np.float64)
    x = 0.7 * x + 0.3 * greys(x).mean()
    x = 1.3 * x - 0.3 * greys(x)[..., None]
    assert x.min() > 0
    assert x.max() < 255
    np.testing.assert_allclose(made, x, atol=0.501)


def test_what_leaves_the_range_stops_at_its_ends():
    made = change_colours(noise(2, 5, 6, 3), Colours(brightness=1.4))
    np.testing.assert_allclose(made, np.minimum(1.4 * noise(2, 5, 6, 3), 255), atol=0.501)


@pytest.mark.parametrize("sixths", [1, 3, 5])
def test_a_hue_turns_in_the_plane_of_yiq(sixths):
    angle = math.pi / 3 * sixths
    frames = noise(1, 4, 4, 3, low=100, high=150)
    made = change_colours(frames, Colours(hue=angle))
    for pixel, found in zip(frames.reshape(-1, 3), made.reshape(-1, 3), strict=True):
        y, i, q = colorsys.rgb_to_yiq(*(pixel / 255))
        turned = i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle)
        # colorsys rounds its constants to two digits
        np.testing.assert_allclose(found, 255 * np.array(colorsys.yiq_to_rgb(y, *turned)), atol=2.5)
    np.testing.assert_allclose(greys(made), greys(frames), atol=1)


def test_without_saturation_all_is_grey_whatever_the_hue():
    frames = noise(2, 5, 6, 3)
    made = change_colours(frames, Colours(saturation=0, hue=2.0))
    np.testing.assert_allclose(made, greys(frames)[..., None].repeat(3, -1), atol=0.501)


def test_blurs_by_a_gaussian_with_edges_repeated():
    frames = noise(2, 9, 11, 3)
    made = blurred(frames, 0.8)
    places = np.arange(-3, 4)
    kernel = np.exp(-(places**2) / (2 * 0.8**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    padded = np.pad(frames.astype(np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))
    np.testing.assert_allclose(made, np.einsum("thwcij,ij->thwc", windows, kernel), atol=0.51)


def test_draws_within_the_asked_bounds_and_shares():
    config = ContrastAugment(brightness=0.3, contrast=0.2, saturation=0.1, hue=0.25, jitter=0.5, grey=0.25)
    drawn = [draw_colours(config, Draws(1, i)) for i in range(1500)]
    assert np.mean([x.hue != 0 for x in drawn]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([x.saturation == 0 for x in drawn]) == pytest.approx(0.25, abs=0.04)
    changed = np.array([x for x in drawn if x.hue and x.saturation])
    np.testing.assert_allclose(changed.min(0), (0.7, 0.8, 0.9, -math.pi / 2), atol=0.05)
    np.testing.assert_allclose(changed.max(0), (1.3, 1.2, 1.1, math.pi / 2), atol=0.05)


def reader(**changes):
    return ContrastReader(4, (32, 32), 2, Augment(), 5, views=2, windows=changes.pop("windows", 2), **changes)


def test_views_of_a_video_differ_and_depend_on_their_key_alone(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", moving_frames(30)))
    samples = [Sample(1, 3, view) for view in (0, 1)]
    both = reader().read(path, samples)
    assert not np.array_equal(*both)
    for sample, clip in zip(samples, both, strict=True):
        np.testing.assert_array_equal(reader().read(path, [sample])[0], clip)
    for other in (Sample(2, 3, 0), Sample(1, 4, 0)):
        assert not np.array_equal(reader().read(path, [other])[0], both[0])


@pytest.mark.parametrize(
    "augment",
    [ContrastAugment(jitter=0, grey=0, blur=0), ContrastAugment(area=(1, 1), aspect=(4 / 3, 4 / 3), jitter=1)],
    ids=["place", "colours"],
)
def test_views_of_the_same_frames_differ_in(augment, tmp_path):
    path = str(write_video(tmp_path / "a.mp4", moving_frames(30)))
    one, two = reader(windows=1, contrast=augment).read(path, [Sample(1, 3, view) for view in (0, 1)])
    assert not np.array_equal(one, two)


def test_a_window_more_gives_the_second_view_frames_of_its_own(tmp_path):
    # frame t has the grey level 8 t, whatever the crop
    frames = np.broadcast_to(8 * np.arange(30, dtype=np.uint8)[:, None, None, None], (30, 48, 64, 3))
    path = str(write_video(tmp_path / "a.mp4", frames))
    plain = ContrastAugment(jitter=0, grey=0, blur=0)

    def first_frames(windows, index):
        return [
            clip[0].mean()
            for clip in reader(windows=windows, contrast=plain).read(path, [Sample(0, index, v) for v in (0, 1)])
        ]

    assert all(a == b for a, b in (first_frames(1, i) for i in range(5)))
    assert any(abs(a - b) > 4 for a, b in (first_frames(2, i) for i in range(5)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"area": (0.5, 0.2)}, "augment.area must rise"),
        ({"aspect": (0, 1)}, "augment.aspect must rise"),
        ({"aspect": (1, float("inf"))}, "augment.aspect must rise"),
        ({"grey": 1.5}, r"augment.grey must be in \[0, 1\]; got 1.5"),
        ({"hue": 0.6}, r"augment.hue must be in \[0, 0.5\]"),
    ],
)
def test_refuses_what_no_view_can_be(changes, says):
    with pytest.raises(ValueError, match=says):
        ContrastAugment(**changes)
