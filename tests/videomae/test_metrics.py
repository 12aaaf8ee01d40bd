"""Averages over views, top-k and confusion, against loops."""

import math

import pytest
import torch

from videomae.metrics import average_views, confusion, topk


def test_the_average_of_probabilities_is_the_mean_of_each_views_softmax():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 4
    for video, average in zip(logits.tolist(), average_views(logits).tolist(), strict=True):
        views = [[math.exp(x) / sum(map(math.exp, view)) for x in view] for view in video]
        assert average == pytest.approx([sum(column) / 5 for column in zip(*views, strict=True)], rel=1e-5)


def test_the_average_of_scores_is_the_softmax_of_their_mean():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 4
    for video, average in zip(logits.tolist(), average_views(logits, "score").tolist(), strict=True):
        means = [sum(column) / 5 for column in zip(*video, strict=True)]
        assert average == pytest.approx([math.exp(x) / sum(map(math.exp, means)) for x in means], rel=1e-5)


def test_one_sure_view_outvotes_by_score_and_not_by_probability():
    logits = torch.tensor([[[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]]])
    assert average_views(logits, "score").argmax(-1).tolist() == [0]
    assert average_views(logits, "prob").argmax(-1).tolist() == [1]


def test_views_of_float16_are_averaged_in_float32():
    logits = torch.full((1, 1000, 2), 8.0, dtype=torch.float16)
    assert average_views(logits).dtype == torch.float32
    assert average_views(logits).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_is_the_place_in_a_sorted_list(k):
    generator = torch.Generator().manual_seed(1)
    # few different values, so that many are equal
    probabilities = torch.randint(0, 4, (60, 6), generator=generator) / 4
    labels = torch.randint(0, 6, (60,), generator=generator)
    for row, label, found in zip(probabilities.tolist(), labels.tolist(), topk(probabilities, labels, k), strict=True):
        ranked = sorted(range(6), key=lambda c: (-row[c], c))
        assert bool(found) == (label in ranked[:k])


def test_top_k_refuses_what_cannot_be_ranked():
    rows = torch.tensor([[0.5, float("nan")]])
    with pytest.raises(ValueError, match="must be finite"):
        topk(rows, torch.tensor([1]), 1)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\); got 2 to 2"):
        topk(torch.ones(1, 2), torch.tensor([2]), 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        topk(torch.ones(1, 2), torch.tensor([1]), 0)


def test_confusion_counts_each_pair():
    labels, predictions = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 0])
    assert confusion(labels, predictions, 3).tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 2]]
    empty = torch.empty(0, dtype=torch.int64)
    assert confusion(empty, empty, 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("labels", "predictions"), [([3], [0]), ([0], [3]), ([0], [-1])])
def test_confusion_refuses_a_class_that_is_not_there(labels, predictions):
    with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
        confusion(torch.tensor(labels), torch.tensor(predictions), 3)


def test_average_refuses_another_rule_and_no_views():
    with pytest.raises(ValueError, match="prob or score; got 'mean'"):
        average_views(torch.ones(2, 3), "mean")
    with pytest.raises(ValueError, match="views, classes"):
        average_views(torch.ones(0, 3))
