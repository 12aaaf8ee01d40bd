"""Pictures of a run: what the model makes of hidden cubes, and the curves of its metrics."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train.log import whole_lines
from videomae.clip import from_cubes, to_cubes
from videomae.masking import Mask
from videomae.model import Input

_LABEL_WIDTH, _CELL, _GAP, _FONT = 190, 64, 4, 13


class Reconstruction(NamedTuple):
    """Clips uint8 [B, T, H, W, 3]; visible cubes are the original's in all of them. Masked cubes that nobody predicted
    (a dual mask has such) are grey in all but the original."""

    original: Tensor
    masked: Tensor
    with_statistics: Tensor  # predictions times the original cube's own deviation, plus its mean
    without_statistics: Tensor  # with the visible cubes' mean and mean deviation instead: nothing hidden is used
    unpredicted: float  # share of the masked cubes


def reconstruct(pred: Tensor, frames: Tensor, mask: Mask, input: Input, *, normalized: bool) -> Reconstruction:
    """Put predictions [B, P, dt*dy*dx*C] into frames uint8 [B, T, H, W, C]. normalized: the prediction is of normalised
    pixels."""
    channels = len(input.mean)
    pixels = to_cubes(frames, input.cube).float() / 255
    cubes = pixels.unflatten(2, (-1, channels))  # [B, N, dt*dy*dx, C]
    means, deviations = cubes.mean(2, keepdim=True), cubes.std(2, keepdim=True) + 1e-6
    hidden = mask.to_bool()[:, :, None, None]
    seen = (~hidden).float()
    visible_mean, visible_deviation = (
        (x * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True) for x in (means, deviations)
    )
    guess = (
        torch.zeros_like(pixels)
        .scatter(1, mask.predicted[:, :, None].expand_as(pred), pred.float())
        .unflatten(2, (-1, channels))
    )
    predicted = torch.zeros_like(hidden).scatter(1, mask.predicted[:, :, None, None], True)
    masked = torch.where(hidden, 0.5, cubes)

    def clip(values: Tensor) -> Tensor:
        return from_cubes((values.flatten(2).clamp(0, 1) * 255).round().byte(), input.grid, input.cube)

    def with_guess(values: Tensor) -> Tensor:
        return clip(torch.where(predicted, values, masked))

    return Reconstruction(
        frames,
        clip(masked),
        with_guess(guess * deviations + means if normalized else guess),
        with_guess(guess * visible_deviation + visible_mean if normalized else guess),
        1 - mask.predicted.shape[1] / mask.masked.shape[1],
    )


def draw_reconstruction(
    made: Reconstruction, input: Input, ratio: float, *, normalized: bool, title: str
) -> Image.Image:
    """A sheet: for each clip a row of originals, masked, predicted; a column for each time slot. ratio: the share of
    the cubes that is masked."""
    rows = [("original", made.original), (f"masked ({ratio:.0%} hidden)", made.masked)]
    grey = f"\n(grey: {made.unpredicted:.0%} of the hidden,\nnot predicted)" if made.unpredicted else ""
    if normalized:
        rows += [
            ("predicted, with each cube's\nown mean and deviation" + grey, made.with_statistics),
            ("predicted, without them" + grey, made.without_statistics),
        ]
    else:
        rows += [("predicted" + grey, made.with_statistics)]
    font = ImageFont.load_default(_FONT)
    height, width = input.size
    scale = max(_CELL / min(height, width), 1.0)
    cell_width, cell_height = round(width * scale), round(height * scale)
    slots = range(0, input.frames, input.cube[0])
    clip_height = len(rows) * (cell_height + _GAP) + 3 * _GAP
    sheet_width = max(_LABEL_WIDTH + len(slots) * (cell_width + _GAP), 2 * _GAP + round(font.getlength(title)))
    sheet = Image.new("RGB", (sheet_width, 24 + len(made.original) * clip_height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, fill="black", font=font)
    for b in range(len(made.original)):
        for r, (label, clips) in enumerate(rows):
            top = 24 + b * clip_height + r * (cell_height + _GAP)
            pen.text((_GAP, top + cell_height // 2), label, fill="black", font=font, anchor="lm")
            for column, frame in enumerate(slots):
                image = Image.fromarray(clips[b, frame].cpu().numpy()).resize(
                    (cell_width, cell_height), Image.Resampling.NEAREST
                )
                sheet.paste(image, (_LABEL_WIDTH + column * (cell_width + _GAP), top))
    return sheet


def draw_curves(run: Path, out: Path) -> None:
    """Loss, learning rate, speed and data wait over the steps of a run folder's metrics.jsonl, and what its
    evaluations.jsonl tells of accuracy, as a PNG."""
    from matplotlib.figure import Figure

    lines = _read_lines(run / "metrics.jsonl")
    panels: Sequence[tuple[str, str, str]] = (
        ("loss", "loss", "tab:blue"),
        ("lr", "learning rate", "tab:orange"),
        ("clips_per_second", "clips per second", "tab:green"),
        ("data_wait", "share of time waiting for data", "tab:red"),
    )
    evaluated = _read_lines(run / "evaluations.jsonl")
    names = [name for name in dict.fromkeys(key for line in evaluated for key in line) if name in _ACCURACIES]
    figure = Figure(figsize=(15 if names else 10, 6.5), layout="constrained")
    grid = figure.subplots(2, 3 if names else 2)
    for axes, (name, label, colour) in zip(grid[:, :2].flat, panels, strict=True):
        points = [(line["step"], line[name]) for line in lines if line[name] is not None]
        axes.plot(*zip(*points, strict=True), color=colour) if points else None
        axes.set(xlabel="step", ylabel=label, ylim=(0, 1) if name == "data_wait" else None)
        axes.grid(alpha=0.3)
    if names:
        axes = grid[0, 2]
        for name in names:
            points = [(line["step"], line[name]) for line in evaluated if name in line]
            axes.plot(*zip(*points, strict=True), marker=".", label=_ACCURACIES[name])
        what = "mean average precision" if names == ["val_map"] else "accuracy"
        axes.set(xlabel="step", ylabel=f"{what}, %", ylim=(0, 102))
        axes.grid(alpha=0.3)
        axes.legend()
        grid[1, 2].axis("off")
    figure.savefig(out, dpi=110, format="png")


# what is drawn of evaluations.jsonl, in per cent
_ACCURACIES = {
    "val_top1": "validation, top-1",
    "val_top5": "validation, top-5",
    "val_map": "validation, frame mAP",
    "probe_knn": "probe: nearest neighbours",
    "probe_linear": "probe: linear",
}


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in whole_lines(path)]
