"""Reconstruction pictures: what was seen, what was predicted, and what nobody predicted."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from PIL import ImageChops

from kernels.pixel_loss import pixel_target
from train.picture import draw_curves, draw_reconstruction, reconstruct
from videomae import masking
from videomae.clip import to_cubes
from videomae.model import Input

INPUT = Input(8, 32, (2, 8, 8))
GREY = 128


def perfect(mask, frames, normalized):
    pred = pixel_target(frames, mask.predicted, INPUT.cube, normalize=normalized)
    return reconstruct(pred, frames, mask, INPUT, normalized=normalized)


def rows(clips, index):
    return [cubes[i] for cubes, i in zip(to_cubes(clips, INPUT.cube).int(), index, strict=True)]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("decoder", ["none", "running-cell"])
def test_shows_predictions_where_there_are_any_and_grey_elsewhere(decoder, normalized):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (3, 8, 32, 32, 3), dtype=torch.uint8)
    mask = masking.make("tube", INPUT.grid, 0.75, torch.arange(3), decoder)
    made = perfect(mask, frames, normalized)
    assert torch.equal(made.original, frames)
    assert made.unpredicted == (0 if decoder == "none" else 0.5)
    for b in range(3):
        left = sorted(set(mask.masked[b].tolist()) - set(mask.predicted[b].tolist()))
        assert len(left) == made.unpredicted * 48
        for clips in (made.masked, made.with_statistics, made.without_statistics):
            assert torch.equal(rows(clips, mask.visible)[b], rows(frames, mask.visible)[b])
            assert (to_cubes(clips, INPUT.cube)[b, left] == GREY).all()
        assert (rows(made.masked, mask.masked)[b] == GREY).all()
        # the perfect prediction, up to rounding
        assert (rows(made.with_statistics, mask.predicted)[b] - rows(frames, mask.predicted)[b]).abs().max() <= 1
        assert rows(made.without_statistics, mask.predicted)[b].float().std() > 30


@pytest.mark.parametrize("normalized", [True, False])
def test_says_what_the_grey_is(normalized):
    frames = torch.randint(0, 256, (1, 8, 32, 32, 3), dtype=torch.uint8)
    mask = masking.make("tube", INPUT.grid, 0.75, torch.arange(1), "running-cell")
    made = perfect(mask, frames, normalized)
    sheets = [
        draw_reconstruction(x, INPUT, 0.75, normalized=normalized, title="t")
        for x in (made, made._replace(unpredicted=0.0))
    ]
    _, top, right, _ = ImageChops.difference(*sheets).getbbox()
    # in the labels, beside the predictions: below the originals and the masked
    assert right < 190
    assert top >= 24 + 2 * 68


@pytest.mark.parametrize(("measure", "says"), [("val_map", "mean average precision, %"), ("val_top1", "accuracy, %")])
def test_the_curves_axis_says_what_is_measured(measure, says, tmp_path, monkeypatch):
    # a full disk took half a line
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 1, measure: 50.0}) + '\n{"step": 2, "va')
    drawn = []
    # the picture itself is not looked at
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_curves(tmp_path, tmp_path / "curves.png")
    assert says in [axes.get_ylabel() for axes in drawn[0].axes]
