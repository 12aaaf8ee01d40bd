"""roi_align: its values against the definition, sample by sample in float64, and against torchvision; its gradient."""

import math

import pytest
import torch

from videomae.roi_align import roi_align


def interpolated(image, y, x):
    """Bilinear, of an image [h, w, D]; zero further than one place outside."""
    h, w = image.shape[:2]
    if not (-1 <= y <= h and -1 <= x <= w):
        return torch.zeros(image.shape[2], dtype=image.dtype)
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
    lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def slow(image, box, size, scale, aligned, ratio):
    """The bins [size, size, D] of one box."""
    down, across = scale if isinstance(scale, tuple) else (scale, scale)
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (v * s - shift for v, s in zip(box.tolist(), (across, down, across, down), strict=True))
    height, width = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
    tall, wide = (ratio, ratio) if ratio else (math.ceil(height / size), math.ceil(width / size))
    out = torch.zeros(size, size, image.shape[2], dtype=image.dtype)
    for i in range(size):
        for j in range(size):
            for a in range(tall):
                for b in range(wide):
                    y = y1 + height / size * (i + (a + 0.5) / tall)
                    x = x1 + width / size * (j + (b + 0.5) / wide)
                    out[i, j] += interpolated(image, y, x) / (tall * wide)
    return out


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# of features 5 high and 7 wide, 80 x 112 pixels
BOXES = {
    "inside": (17.3, 20.9, 64.2, 55.1),
    "all": (0, 0, 111, 79),
    "more than all": (-30, -25, 150, 131),
    "at the edges": (96, 64, 112, 80),
    "over the far edges": (100.5, 70.2, 130.7, 99.1),
    "outside": (150, 120, 190, 160),
    "before the first": (-40, -50, -17, -33),
    "a point": (40, 40, 40, 40),
    "inside out": (70, 60, 20, 10),
    "a line": (10, 30, 100, 30),
    "whole bins": (16, 0, 128, 112),
}
EACH = torch.tensor(list(BOXES.values()), dtype=torch.float64)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    ("size", "ratio", "scale"), [(7, 0, 1 / 16), (3, 0, (1 / 16, 1 / 8)), (2, 2, 1 / 16), (1, 0, 0.1)]
)
def test_it_is_the_mean_of_samples_interpolated_between_features(size, ratio, scale, aligned):
    features = draws(2, 5, 7, 3)
    boxes = torch.stack((EACH, EACH.flip(0)))
    wanted = torch.stack(
        [
            torch.stack([slow(image, box, size, scale, aligned, ratio) for box in row])
            for image, row in zip(features, boxes, strict=True)
        ]
    )
    options = {"size": size, "scale": scale, "aligned": aligned, "sampling_ratio": ratio}
    torch.testing.assert_close(roi_align(features, boxes, **options), wanted, rtol=1e-12, atol=1e-12)
    # more samples than any bin wants change nothing
    torch.testing.assert_close(roi_align(features, boxes, most=40, **options), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        roi_align(features.float(), boxes.float(), **options), wanted.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
def test_it_equals_torchvisions(ratio, aligned):
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    features = draws(2, 5, 7, 3)
    boxes = torch.stack((EACH, EACH.flip(0)))
    wanted = ops.roi_align(features.movedim(-1, 1), list(boxes), 7, 1 / 16, ratio, aligned)
    got = roi_align(features, boxes, aligned=aligned, sampling_ratio=ratio)
    torch.testing.assert_close(got.flatten(0, 1).movedim(-1, 1), wanted)


def test_its_gradient_is_that_of_the_features():
    features = draws(2, 3, 4, 2).requires_grad_()
    boxes = torch.tensor([[[3.0, 5.0, 50.0, 40.0], [0, 0, 63, 47]], [[20, 10, 30, 90], [-9, 4, 4, 4]]]).double()
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, size=3), (features,))
    boxes.requires_grad_()
    roi_align(features, boxes).backward(draws(2, 2, 7, 7, 2, seed=1))
    assert boxes.grad is None


def test_constant_features_stay_what_they_are():
    boxes = torch.tensor([[[0.0, 0.0, 351.0, 255.0], [13.7, 99.1, 270.3, 200.6]]])
    got = roi_align(torch.full((1, 16, 22, 2), 3.0), boxes, most=4)
    torch.testing.assert_close(got, torch.full((1, 2, 7, 7, 2), 3.0))


def test_a_box_that_wants_more_samples_than_it_may_have_is_no_number():
    boxes = torch.tensor([[[0.0, 0.0, 351.0, 10.0], [0.0, 0.0, 100.0, 10.0], [math.nan, 0.0, 100.0, 10.0]]])
    got = roi_align(draws(1, 16, 22, 2).float(), boxes, most=3)
    assert [row.isnan().all().item() for row in got[0]] == [True, False, True]
    assert not got[0, 1].isnan().any()


def test_weights_stay_float32_under_autocast():
    features = draws(1, 16, 22, 8).bfloat16()
    boxes = torch.tensor([[[13.7, 99.1, 270.3, 200.6]]])
    with torch.autocast("cpu", torch.bfloat16):
        got = roi_align(features, boxes)
    assert got.dtype == torch.float32
    assert torch.equal(got, roi_align(features.float(), boxes))


def test_no_box_gives_no_bins():
    assert roi_align(draws(2, 5, 7, 3), torch.zeros(2, 0, 4)).shape == (2, 0, 7, 7, 3)
    assert roi_align(draws(0, 5, 7, 3), torch.zeros(0, 4, 4)).shape == (0, 4, 7, 7, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features": torch.zeros(2, 5, 7)}, r"features must be \[B, h, w, D\]; got shape \(2, 5, 7\)"),
        ({"features": torch.zeros(2, 5, 7, 3, dtype=torch.int32)}, "features must be floating point"),
        ({"features": torch.zeros(2, 0, 7, 3)}, "features must have rows and columns"),
        ({"boxes": torch.zeros(3, 1, 4)}, r"boxes must be \[2, R, 4\]; got shape \(3, 1, 4\)"),
        ({"boxes": torch.zeros(2, 1, 5)}, r"boxes must be \[2, R, 4\]"),
        (
            {"boxes": torch.zeros(2, 1, 4, dtype=torch.int64)},
            "boxes must be floating point, in pixels; got torch.int64",
        ),
        ({"boxes": torch.zeros(2, 1, 4, device="meta")}, "boxes is on meta, features on cpu"),
        ({"boxes": torch.full((2, 1, 4), math.inf)}, "boxes must be finite"),
        ({"size": 0}, "size must be at least 1; got 0"),
        ({"sampling_ratio": -1}, "sampling_ratio must not be negative; got -1"),
        ({"most": 0}, "most must be at least 1; got 0"),
    ],
)
def test_it_refuses_what_does_not_fit(change, says):
    given = {"features": torch.zeros(2, 5, 7, 3), "boxes": torch.zeros(2, 1, 4)} | change
    with pytest.raises(ValueError, match=says):
        roi_align(given.pop("features"), given.pop("boxes"), **given)
