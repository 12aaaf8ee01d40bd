"""RoIAlign (arXiv 1703.06870): features of boxes, as torchvision computes them, in two matrix products.

A bin's value is the mean of samples that are evenly spread in it, each interpolated bilinearly between features. Both
are separable, so a bin is a weighted sum over rows and then over columns: out = Y features X^T, with one row of Y for
each of a box's rows of bins. No row of weights needs more samples than a bin has along that axis.
"""

import math

import torch
from torch import Tensor

from kernels.launch import check, check_same_device


def roi_align(
    features: Tensor,
    boxes: Tensor,
    *,
    size: int = 7,
    scale: float | tuple[float, float] = 1 / 16,
    aligned: bool = False,
    sampling_ratio: int = 0,
    most: int | None = None,
) -> Tensor:
    """Values [B, R, size, size, D] of the boxes' bins, float32 or wider, differentiable in features.

    features: [B, h, w, D]. boxes: floating point [B, R, 4], (x1, y1, x2, y2) in pixels; fixed, and finite.
    scale: features per pixel, the same down and across or one of each. aligned: pixel centres are at halves (a shift by
    half a feature); without it a box is at least one feature wide and high.
    sampling_ratio: samples of a bin along each axis; 0: as many as the bin has features, rounded up.
    most: so many at most are given to a bin by a sampling_ratio of 0, and a box that wants more becomes NaN; None: the
    boxes are asked, which waits for a GPU. With it, or a sampling_ratio, no shape depends on what tensors hold.
    Raises ValueError for other shapes, dtypes and devices, and when asked boxes are not finite.
    """
    _check(features, boxes, size, sampling_ratio, most)
    down, across = scale if isinstance(scale, tuple) else (scale, scale)
    dtype = torch.promote_types(features.dtype, torch.float32)
    # where a box ends decides how many samples it has: half precision would move it
    x1, y1, x2, y2 = boxes.detach().to(torch.promote_types(boxes.dtype, dtype)).unbind(-1)
    shift = 0.5 if aligned else 0.0
    spans = [(start * s - shift, end * s - shift) for start, end, s in ((y1, y2, down), (x1, x2, across))]
    starts, extents = (torch.stack(parts) for parts in zip(*((a, b - a) for a, b in spans), strict=True))  # [2, B, R]
    extents = extents if aligned else extents.clamp(min=1)
    most = sampling_ratio or most or _most_samples(extents, size)
    rows, columns = (
        _weights(start, extent, length, size, sampling_ratio, most).to(dtype)
        for start, extent, length in zip(starts, extents, features.shape[1:3], strict=True)
    )
    with torch.autocast(features.device.type, enabled=False):
        return _contract(features.to(dtype), rows, columns)


def _contract(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, R, size, size, D] of features [B, h, w, D], rows [B, R, size, h] and columns [B, R, size, w]."""
    batch, boxes, size, _ = rows.shape
    width, channels = features.shape[2:]
    # the rows of all boxes of a clip at once: one large product, and the second is over what is left of them
    strips = rows.flatten(1, 2) @ features.flatten(2)
    return columns.unsqueeze(2) @ strips.view(batch, boxes, size, width, channels)


def _most_samples(extents: Tensor, size: int) -> int:
    """Of any bin along any axis, at least 1."""
    if extents.numel() == 0:
        return 1
    check(bool(extents.isfinite().all()), "boxes must be finite")
    return max(math.ceil(float(extents.max()) / size), 1)


def _weights(start: Tensor, extent: Tensor, length: int, size: int, ratio: int, most: int) -> Tensor:
    """What each bin takes of each place along one axis, [B, R, size, length]; start, extent: of boxes [B, R]."""
    bins = torch.arange(size, device=start.device, dtype=start.dtype)[:, None]
    number = torch.arange(most, device=start.device, dtype=start.dtype)
    start, extent = start[..., None, None], extent[..., None, None]
    wanted = torch.full_like(extent, ratio) if ratio else (extent / size).ceil()
    samples = wanted.clamp(min=1)
    step = extent / size
    places = start + bins * step + (number + 0.5) * step / samples  # [B, R, size, most]
    # a place counts up to one feature outside; from there on the samples of a bin are fewer, but divided as before
    counts = (number < wanted) & (places >= -1) & (places <= length)
    distances = places.clamp(0, length - 1)[..., None] - torch.arange(length, device=start.device, dtype=start.dtype)
    near = (1 - distances.abs()).clamp(min=0)
    weights = (near * counts[..., None]).sum(dim=-2) / samples
    return torch.where(wanted <= most, weights, math.nan)


def _check(features: Tensor, boxes: Tensor, size: int, sampling_ratio: int, most: int | None) -> None:
    shape, wanted = tuple(boxes.shape), features.shape[0] if features.ndim else 0
    check(features.ndim == 4, f"features must be [B, h, w, D]; got shape {tuple(features.shape)}")
    check(features.is_floating_point(), f"features must be floating point; got {features.dtype}")
    check(min(features.shape[1:3]) >= 1, f"features must have rows and columns; got shape {tuple(features.shape)}")
    fits = boxes.ndim == 3 and boxes.shape[0] == wanted and boxes.shape[2] == 4
    check(fits, f"boxes must be [{wanted}, R, 4]; got shape {shape}")
    check(boxes.is_floating_point(), f"boxes must be floating point, in pixels; got {boxes.dtype}")
    check_same_device(features=features, boxes=boxes)
    check(size >= 1, f"size must be at least 1; got {size}")
    check(sampling_ratio >= 0, f"sampling_ratio must not be negative; got {sampling_ratio}")
    check(most is None or most >= 1, f"most must be at least 1; got {most}")
