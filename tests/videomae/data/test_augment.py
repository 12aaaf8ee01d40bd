"""Crops, resize and flip in uint8."""

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from videomae.data.augment import (
    Augment,
    Crop,
    crop_offsets,
    crop_resize,
    multi_scale_crop,
    random_resized_crop,
    resize_short,
)
from videomae.keys import Draws

SCALES = Augment().scales


def crops(height, width, size=(224, 224), n=3000):
    return [multi_scale_crop(height, width, size, SCALES, Draws(9, i)) for i in range(n)]


def test_draws_the_ten_pairs_of_sides_evenly():
    # base 256: 256, 224 (snapped from 224), 192, 168; 10 pairs whose ranks differ by at most 1
    sides = [256, 224, 192, 168]
    pairs = Counter((c.height, c.width) for c in crops(256, 340))
    assert set(pairs) == {(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1}
    assert len(pairs) == 10
    assert all(200 < n < 400 for n in pairs.values())


def test_draws_the_thirteen_places_evenly():
    places = Counter((c.left, c.top) for c in crops(256, 340, n=20000) if (c.height, c.width) == (192, 168))
    x, y = (340 - 168) // 4, (256 - 192) // 4
    quarters = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    assert set(places) == {(x * a, y * b) for a, b in quarters}
    assert all(90 < n < 220 for n in places.values())


@pytest.mark.parametrize(("height", "width"), [(240, 320), (226, 300), (223, 223), (50, 50), (81, 121), (3, 4)])
def test_stays_inside_and_snaps_to_the_size(height, width):
    for crop in crops(height, width, n=300):
        assert 0 <= crop.top <= height - crop.height
        assert 0 <= crop.left <= width - crop.width
        assert min(crop.height, crop.width) >= 1
    if height == 226:
        assert {224} == {c.height for c in crops(height, width, n=300) if c.height > 200}


def test_resizes_as_pil_does_within_rounding():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 61, 83, 3), dtype=np.uint8)
    for size in ((32, 48), (96, 96)):
        got = crop_resize(frames, Crop(5, 7, 40, 60), size)
        wanted = np.stack(
            [np.asarray(Image.fromarray(f[5:45, 7:67]).resize(size[::-1], Image.Resampling.BILINEAR)) for f in frames]
        )
        assert got.dtype == np.uint8
        assert np.abs(got.astype(int) - wanted).max() <= 2


def test_copies_when_no_resize_is_needed_and_flips():
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    got = crop_resize(frames, Crop(4, 10, 32, 32), (32, 32), flip=True)
    assert np.array_equal(got, frames[:, 4:36, 10:42][:, :, ::-1])
    assert got.flags.c_contiguous


def test_refuses_scales_out_of_range():
    with pytest.raises(ValueError, match="scales"):
        Augment(scales=(1.2,))


def bilinear(frames, height, width):
    """Of uint8 frames [T, h, w, 3], float64: every pixel from its four neighbours, whatever the scale."""
    for axis, size in ((1, height), (2, width)):
        old = frames.shape[axis]
        places = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        first = np.floor(places).astype(int)
        share = np.expand_dims(places - first, tuple(i for i in range(4) if i != axis))
        second = np.minimum(first + 1, old - 1)
        frames = (1 - share) * frames.take(first, axis) + share * frames.take(second, axis)
    return frames


@pytest.mark.parametrize("size", [(32, 32), (17, 50), (96, 120)])
def test_resizes_without_antialiasing_when_asked(size):
    frames = np.random.default_rng(0).integers(0, 256, (3, 61, 83, 3), dtype=np.uint8)
    for flip in (False, True):
        cut = frames[:, 2:59, 3:80][:, :, :: -1 if flip else 1]
        got = crop_resize(frames, Crop(2, 3, 57, 77), size, flip=flip, antialias=False)
        assert got.dtype == np.uint8
        assert got.shape == (3, *size, 3)
        assert got.flags.c_contiguous
        assert np.abs(got - bilinear(cut, *size)).max() <= 1
    # antialiasing matters where frames shrink
    same = np.array_equal(got, crop_resize(frames, Crop(2, 3, 57, 77), size, flip=True))
    assert same == (size == (96, 120))


def test_random_resized_crops_spread_over_areas_aspects_and_places():
    drawn = [random_resized_crop(600, 600, Draws(2, i)) for i in range(4000)]
    # too large an area does not fit at most aspects, so the first tries are even only up to 3 / 4
    shares = np.array([crop.height * crop.width / 600**2 for crop in drawn])
    assert 0.079 < shares.min() < 0.09
    assert shares.max() > 0.97
    counts = np.histogram(shares, bins=6, range=(0.08, 0.74))[0]
    assert np.abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())
    small = [crop for crop in drawn if crop.height * crop.width < 0.7 * 600**2]
    logs = np.log([crop.width / crop.height for crop in small])
    assert abs(logs).max() < math.log(4 / 3) + 0.01
    counts = np.histogram(logs, bins=6, range=(-math.log(4 / 3), math.log(4 / 3)))[0]
    assert np.abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())
    # places are even over the free way
    for place in ([c.top / (600 - c.height) for c in small], [c.left / (600 - c.width) for c in small]):
        assert np.abs(np.histogram(place, bins=5, range=(0, 1))[0] - len(small) / 5).max() < 5 * math.sqrt(
            len(small) / 5
        )


@pytest.mark.parametrize(("height", "width"), [(256, 340), (340, 256), (50, 400), (7, 5), (1, 1), (1, 30)])
def test_random_resized_crops_stay_inside(height, width):
    for i in range(500):
        crop = random_resized_crop(height, width, Draws(height, width, i))
        assert 0 <= crop.top <= height - crop.height
        assert 0 <= crop.left <= width - crop.width
        assert min(crop.height, crop.width) >= 1


def test_random_resized_crops_fall_back_to_the_middle():
    # no crop of the whole area has these aspects: the middle, at the nearest aspect that is allowed
    def fallback(height, width):
        return random_resized_crop(height, width, Draws(1), area=(1, 1), aspect=(3 / 4, 4 / 3))

    assert fallback(300, 1000) == Crop(0, 300, 300, 400)
    assert fallback(1000, 300) == Crop(300, 0, 400, 300)
    # inside the range, all of it
    assert random_resized_crop(100, 110, Draws(1), area=(2, 2)) == Crop(0, 0, 100, 110)


def test_resizes_the_short_side_and_keeps_the_aspect():
    frames = np.random.default_rng(0).integers(0, 256, (2, 61, 83, 3), dtype=np.uint8)
    for cut, size in ((frames, (40, 54)), (frames[:, :, :45], (54, 40)), (frames[:, :61, :61], (40, 40))):
        got = resize_short(cut, 40)
        # int(40 * 83 / 61) = 54, int(40 * 61 / 45) = 54
        assert got.shape == (2, *size, 3)
        assert np.abs(got - bilinear(cut, *size)).max() <= 1
    assert np.array_equal(resize_short(frames, 61), frames)


def test_spreads_test_crops_along_the_longer_side():
    # RECIPES F.4: int(j * (long - 224) / 2)
    assert crop_offsets(224, 301, 224, 3) == [(0, 0), (0, 38), (0, 77)]
    assert crop_offsets(301, 224, 224, 3) == [(0, 0), (38, 0), (77, 0)]
    assert crop_offsets(224, 300, 224, 4) == [(0, 0), (0, 25), (0, 50), (0, 76)]
    assert crop_offsets(224, 224, 224, 3) == [(0, 0)] * 3
    # a square counts as upright
    assert crop_offsets(256, 256, 224, 3) == [(0, 16), (16, 16), (32, 16)]


def test_one_test_crop_is_in_the_middle():
    assert crop_offsets(224, 301, 224, 1) == [(0, 38)]
    assert crop_offsets(301, 224, 224, 1) == [(38, 0)]
    # along the shorter side, each is
    assert crop_offsets(256, 300, 224, 3) == [(16, 0), (16, 38), (16, 76)]


def test_refuses_test_crops_that_do_not_fit():
    with pytest.raises(ValueError, match="a crop of 224 x 224 does not fit in 200 x 300"):
        crop_offsets(200, 300, 224, 3)
    with pytest.raises(ValueError, match="at least one crop; got 0"):
        crop_offsets(224, 300, 224, 0)
