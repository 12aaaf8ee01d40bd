"""What a prediction is worth: averages over views, top-k, confusion; boxes of actions, in videomae/frame_map.py."""

from typing import Literal

import torch
from torch import Tensor

from kernels.launch import check
from videomae.frame_map import AVA_GROUPS, frame_map

__all__ = ["AVA_GROUPS", "AVERAGES", "Average", "average_views", "confusion", "frame_map", "topk"]

# prob: softmax of each view, then the mean, the published rule; score: the mean of the logits, then softmax
Average = Literal["prob", "score"]
AVERAGES: tuple[Average, ...] = ("prob", "score")


def average_views(logits: Tensor, how: Average = "prob") -> Tensor:
    """Class probabilities, float32 [..., C], of logits [..., V, C] of a video's views (RECIPES G)."""
    check(how in AVERAGES, f"views are averaged by {' or '.join(AVERAGES)}; got {how!r}")
    check(logits.ndim >= 2 and logits.shape[-2] >= 1, f"logits must be [..., views, classes]; got {[*logits.shape]}")
    logits = logits.float()
    return logits.softmax(-1).mean(-2) if how == "prob" else logits.mean(-2).softmax(-1)


def topk(probabilities: Tensor, labels: Tensor, k: int) -> Tensor:
    """Which of the labels, int [N], are among the k largest of their row of probabilities [N, C]: bool [N].

    Of equal probabilities the lower class is the larger one. ValueError for a label without a class, or a probability
    that is not finite: it would compare as the smallest or the largest.
    """
    check(k >= 1, f"k must be at least 1; got {k}")
    _check_classes(labels, probabilities.shape[1], "labels")
    check(bool(probabilities.isfinite().all()), "probabilities must be finite")
    own = probabilities.gather(1, labels[:, None])
    before = torch.arange(probabilities.shape[1], device=labels.device) < labels[:, None]
    better = (probabilities > own) | ((probabilities == own) & before)
    return better.sum(1) < k


def confusion(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """How often each class was taken for each: int64 [C, C], a row for each label, a column for each prediction."""
    check(labels.shape == predictions.shape, f"{len(labels)} labels of {len(predictions)} predictions")
    _check_classes(labels, num_classes, "labels")
    _check_classes(predictions, num_classes, "predictions")
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def _check_classes(numbers: Tensor, num_classes: int, what: str) -> None:
    if numbers.numel():
        low, high = int(numbers.min()), int(numbers.max())
        check(low >= 0 and high < num_classes, f"{what} must be in [0, {num_classes}); got {low} to {high}")
