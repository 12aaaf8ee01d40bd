"""Multi-scale crop, resize and flip in uint8."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from videomae.data.augment import Augment, Crop, crop_resize, multi_scale_crop
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
