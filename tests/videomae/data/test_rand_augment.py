"""RandAugment against Pillow, operation by operation, and its draws."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from videomae.data import rand_augment
from videomae.data.rand_augment import OPERATIONS, RandAugment
from videomae.keys import Draws

CUBIC = {"resample": Image.Resampling.BICUBIC, "fillcolor": (128, 128, 128)}


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **CUBIC)


# RECIPES E.1, on one Pillow image at level m with sign s
PILLOW = {
    "auto_contrast": lambda i, m, s: ImageOps.autocontrast(i),
    "equalize": lambda i, m, s: ImageOps.equalize(i),
    "invert": lambda i, m, s: ImageOps.invert(i),
    "rotate": lambda i, m, s: i.rotate(s * 30 * m / 10, **CUBIC),
    # not ImageOps.posterize, which refuses 0 bits since Pillow 12
    "posterize": lambda i, m, s: i.point([v >> (4 + int(4 * m / 10)) << (4 + int(4 * m / 10)) for v in range(256)] * 3),
    "solarize": lambda i, m, s: ImageOps.solarize(i, 256 - int(25.6 * m)),
    "solarize_add": lambda i, m, s: i.point([min(v + int(11 * m), 255) if v < 128 else v for v in range(256)] * 3),
    "color": lambda i, m, s: ImageEnhance.Color(i).enhance(1 + s * 0.09 * m),
    "contrast": lambda i, m, s: ImageEnhance.Contrast(i).enhance(1 + s * 0.09 * m),
    "brightness": lambda i, m, s: ImageEnhance.Brightness(i).enhance(1 + s * 0.09 * m),
    "sharpness": lambda i, m, s: ImageEnhance.Sharpness(i).enhance(1 + s * 0.09 * m),
    "shear_x": lambda i, m, s: affine(i, 1, s * 0.03 * m, 0, 0, 1, 0),
    "shear_y": lambda i, m, s: affine(i, 1, 0, 0, s * 0.03 * m, 1, 0),
    "translate_x": lambda i, m, s: affine(i, 1, 0, s * 0.045 * m * i.width, 0, 1, 0),
    "translate_y": lambda i, m, s: affine(i, 1, 0, 0, 0, 1, s * 0.045 * m * i.height),
}
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
# 4 and 6.25 are whole steps of every table; 10 is the most
LEVELS = (0, 0.3, 4, 6.25, 7.13, 10)


def noise(num_frames=2, height=41, width=67):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def smooth():
    """Frames of gradual and clipped colours, of which one is flat and one has narrow histograms."""
    small = [Image.fromarray(frame).resize((67, 41), Image.Resampling.BICUBIC) for frame in noise(2, 4, 6)]
    first, second = (np.asarray(image) for image in small)
    return np.stack([first, second, np.full_like(first, 201), 90 + first // 8])


def through_pillow(name, frames, level, sign):
    return np.stack([np.asarray(PILLOW[name](Image.fromarray(frame), level, sign)) for frame in frames])


def test_names_the_fifteen_operations():
    assert [operation.__name__ for operation in OPERATIONS] == list(PILLOW)
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize(
    "frames", [noise(), smooth(), noise(1, 2, 3), noise(3, 1, 1)], ids=["noise", "smooth", "2x3", "1x1"]
)
def test_is_pillows(operation, frames):
    before = frames.copy()
    for level in LEVELS:
        for sign in (1, -1):
            got = operation(frames, level, sign)
            assert got.dtype == np.uint8
            assert got.flags.c_contiguous
            assert got.flags.writeable
            difference = np.abs(got.astype(int) - through_pillow(operation.__name__, frames, level, sign))
            if operation.__name__ in MOVES:
                # float32 sums against Pillow's float64, both rounded down
                assert difference.max() <= 1, (level, sign)
                assert (difference > 0).mean() < 0.004 or (difference > 0).sum() <= 1, (level, sign)
            else:
                assert difference.max() == 0, (level, sign)
    assert np.array_equal(frames, before)


def test_moves_keep_flat_frames_flat():
    # weights add up to one only to rounding: every level must still come out as itself
    flat = np.repeat(np.arange(256, dtype=np.uint8), 20 * 24 * 3).reshape(256, 20, 24, 3)
    moves = [operation for operation in OPERATIONS if operation.__name__ in MOVES]
    for move in moves:
        for level in (1.37, 7.13):
            assert np.array_equal(move(flat, level, -1), through_pillow(move.__name__, flat, level, -1))


def test_moves_more_than_fits_at_once(monkeypatch):
    frames = noise(3)
    whole = {name: getattr(rand_augment, name)(frames, 7, 1) for name in MOVES}
    monkeypatch.setattr(rand_augment, "_LINES", 6)
    monkeypatch.setattr(rand_augment, "_VALUES", frames.size // 2)
    for name in MOVES:
        assert np.array_equal(getattr(rand_augment, name)(frames, 7, 1), whole[name])


def recorded(monkeypatch):
    """Replaces the operations by ones that only list what they are called with."""
    calls = []
    named = [lambda frames, m, s, name=name: calls.append((name, m, s)) or frames for name in PILLOW]
    monkeypatch.setattr(rand_augment, "OPERATIONS", tuple(named))
    return calls


def test_draws_operations_strengths_and_signs(monkeypatch):
    calls, n = recorded(monkeypatch), 3000
    numbers = []
    for i in range(n):
        before = len(calls)
        RandAugment()(noise(1, 2, 2), Draws(3, i))
        numbers.append(len(calls) - before)
    # 4 trials of 0.5
    for count, wanted in zip(np.bincount(numbers, minlength=5), (1, 4, 6, 4, 1), strict=True):
        assert abs(count - n * wanted / 16) < 5 * np.sqrt(n * wanted / 16)
    names = Counter(name for name, _, _ in calls)
    assert set(names) == set(PILLOW)
    assert all(abs(count - len(calls) / 15) < 5 * np.sqrt(len(calls) / 15) for count in names.values())
    levels = np.array([level for _, level, _ in calls])
    assert abs(levels.mean() - 7) < 0.04
    assert abs(levels.std() - 0.5) < 0.03
    assert abs(sum(sign for _, _, sign in calls)) < 5 * np.sqrt(len(calls))
    assert {sign for _, _, sign in calls} == {1, -1}


def test_keeps_strengths_within_ten(monkeypatch):
    calls = recorded(monkeypatch)
    for magnitude in (0, 10):
        for i in range(40):
            RandAugment(magnitude, deviation=3, probability=1)(noise(1, 2, 2), Draws(i))
    levels = [level for _, level, _ in calls]
    assert (min(levels), max(levels)) == (0, 10)
    calls.clear()
    RandAugment(9, deviation=0, probability=1, ops=3)(noise(1, 2, 2), Draws(0))
    assert [level for _, level, _ in calls] == [9] * 3


def test_changes_all_frames_alike_and_repeats_itself():
    frames = np.repeat(noise(1), 3, axis=0)
    changed = 0
    for i in range(40):
        got = RandAugment()(frames, Draws(5, i))
        assert got.shape == frames.shape
        assert (got == got[:1]).all()
        assert np.array_equal(got, RandAugment()(frames, Draws(5, i)))
        changed += not np.array_equal(got, frames)
    assert 30 < changed <= 40


def test_takes_cut_and_mirrored_frames():
    frames = noise()[:, 3:30, 5:50][:, :, ::-1]
    augment = RandAugment(probability=1)
    for i in range(10):
        got = augment(frames, Draws(i))
        assert np.array_equal(got, augment(frames.copy(), Draws(i)))
        assert got.flags.c_contiguous
    assert RandAugment(ops=0)(frames, Draws(0)).flags.c_contiguous


def test_gives_the_frames_themselves_when_off():
    frames = noise()
    assert RandAugment(ops=0)(frames, Draws(1)) is frames
    assert RandAugment(probability=0)(frames, Draws(1)) is frames


def test_reads_timms_notation():
    assert RandAugment.parse("rand-m7-n4-mstd0.5-inc1") == RandAugment()
    assert RandAugment.parse("rand-inc1-n0-m9-p1") == RandAugment(9, 0, 0, 1)
    # timm's own defaults
    assert RandAugment.parse("rand-inc1") == RandAugment(10, 2, 0, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augmix-m3-inc1", "starts with rand"),
        ("", "starts with rand"),
        ("rand-m7-n4-mstd0.5", "lacks inc1"),
        ("rand-m7-inc0", "lacks inc1"),
        ("rand-m7-w0-inc1", "'w0' in .* is none of"),
        ("rand-mfive-inc1", "'mfive' in .* is none of"),
        ("rand-m11-inc1", r"magnitude must be in \[0, 10\]; got 11"),
        ("rand-m7-n2.5-inc1", "n in .* whole"),
        ("rand-m7-p2-inc1", "probability"),
        ("rand-m7-mstd100-inc1", "deviation"),
    ],
)
def test_refuses_other_notation(text, message):
    with pytest.raises(ValueError, match=message):
        RandAugment.parse(text)


def test_refuses_what_is_not_a_clip_in_bytes():
    with pytest.raises(ValueError, match=r"uint8 \[T, h, w, 3\]; got float32 \[2, 4, 4, 3\]"):
        RandAugment()(np.zeros((2, 4, 4, 3), np.float32), Draws(0))
    with pytest.raises(ValueError, match="ops"):
        RandAugment(ops=-1)
