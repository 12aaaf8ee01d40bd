"""What a pre-training model makes of one clip under several masks: predictions, their loss, sheets and films of them.

Predicted cubes are shown two ways. Of normalised pixels a model predicts neither a cube's mean nor its deviation: the
usual picture takes both from the original, which the model never saw; the other takes them from the visible cubes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.pixel_loss import pixel_target
from train.one_clip import Moments
from train.picture import Reconstruction, reconstruct
from train.strip import Row, draw_strip, fitted
from videomae import masking
from videomae.model import Input, VideoMAE

_MOST_COLUMNS = 8  # of a sheet: more are not seen on a screen
_SHEET, _FILM = (96, 128), (160, 384)  # pixels of a frame in them: its least and its most


class Guess(NamedTuple):
    """What a model makes of one clip under one mask. ratio: as it was asked for. loss: mean squared error on the hidden
    cubes, as in training; flat: what it would be with nothing but each hidden cube's own mean colour."""

    kind: str
    ratio: float
    mask: masking.Mask
    made: Reconstruction
    loss: float
    flat: float

    @property
    def counts(self) -> tuple[int, int]:
        """Hidden cubes, and all."""
        return self.mask.masked.shape[1], self.mask.num_cubes


def guess(
    model: VideoMAE,
    frames: Tensor,
    key: int,
    *,
    kind: str,
    ratio: float,
    normalized: bool,
    autocast: torch.dtype | None = None,
) -> Guess:
    """Hide cubes of a clip, uint8 [1, T, H, W, 3] on the host, by the mask of this key, and predict them. The model is
    in eval mode, where it is. Raises ValueError for a ratio that the grid does not allow."""
    input, device = model.input, model.decoder_positions.device
    mask = masking.make(kind, input.grid, ratio, torch.tensor([key]))
    there = mask.to(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        pred = model(frames.to(device), there).float().cpu()

    def loss_of(values: Tensor) -> float:
        return float(kernels.pixel_loss(values, frames, mask.predicted, normalized, cube=input.cube))

    made = reconstruct(pred, frames, mask, input, normalized=normalized)
    return Guess(kind, ratio, mask, made, loss_of(pred), loss_of(_flat(frames, mask, input, normalized=normalized)))


def _flat(frames: Tensor, mask: masking.Mask, input: Input, *, normalized: bool) -> Tensor:
    target = pixel_target(frames, mask.predicted, input.cube, normalize=normalized)
    if normalized:
        return torch.zeros_like(target)
    by_channel = target.unflatten(2, (-1, len(input.mean)))
    return by_channel.mean(dim=2, keepdim=True).expand_as(by_channel).flatten(2)


def draw_sheet(guesses: Sequence[Guess], input: Input, moments: Moments, *, normalized: bool, title: str) -> np.ndarray:
    """One clip as a sheet, uint8 [h, w, 3]: a column for each time slot, or eight of them; rows of the original and,
    for each mask, what is visible and what is predicted."""
    columns = chosen_slots(input)
    headers = [header_of(moments, column) for column in columns]

    def cells(clip: Tensor) -> list[np.ndarray]:
        return [fitted(clip[0, column].numpy(), *_SHEET) for column in columns]

    rows = [Row("original", cells(guesses[0].made.original))]
    for one in guesses:
        for name, (label, clip) in zip(["masked", *_ways(normalized)], _shown(one, normalized), strict=True):
            what = f"{_said(one)}\n\n{label}" if name == "masked" else label
            rows.append(Row(what, cells(clip), is_first=name == "masked"))
    return draw_strip(title, headers, rows, _notes(normalized))


def draw_film(guesses: Sequence[Guess], moments: Moments, *, normalized: bool, title: str) -> np.ndarray:
    """One clip as a film, uint8 [T, h, w, 3]: a row for each mask, columns of the original, of what is visible, and of
    what is predicted."""
    headers = ["original", *(label for label, _ in _shown(guesses[0], normalized))]
    images = []
    for at in range(len(moments.frames)):
        rows = [
            Row(
                _said(one),
                [
                    fitted(clip[0, at].numpy(), *_FILM)
                    for clip in (one.made.original, *(clip for _, clip in _shown(one, normalized)))
                ],
            )
            for one in guesses
        ]
        when = f"{at + 1} of {len(moments.frames)}: frame {moments.frames[at]}, {moments.seconds[at]:.2f} s"
        images.append(draw_strip(f"{title}\n{when}", headers, rows, _notes(normalized)))
    return np.stack(images)


def chosen_slots(input: Input) -> list[int]:
    """The first frames of all time slots, or of so many, evenly, as a sheet has columns."""
    slots = input.grid[0]
    columns = min(slots, _MOST_COLUMNS)
    return [column * slots // columns * input.cube[0] for column in range(columns)]


def header_of(moments: Moments, column: int) -> str:
    return f"frame {moments.frames[column]}\n{moments.seconds[column]:.2f} s"


def _ways(normalized: bool) -> dict[str, str]:
    """How predicted cubes are shown: the field of a Reconstruction, and what it is called."""
    if not normalized:
        return {"with_statistics": "predicted pixels"}
    return {
        "with_statistics": "predicted, WITH the hidden\ncubes' own mean and\ndeviation (original's)",
        "without_statistics": "predicted, WITHOUT them:\nthe visible cubes' average\nmean and deviation",
    }


def _shown(one: Guess, normalized: bool) -> list[tuple[str, Tensor]]:
    predicted = [(label, getattr(one.made, name)) for name, label in _ways(normalized).items()]
    return [("masked (hidden is grey)", one.made.masked), *predicted]


def _said(one: Guess) -> str:
    hidden, cubes = one.counts
    losses = f"loss {one.loss:.3f}\n(mean colours: {one.flat:.3f})"
    return f"{one.kind} mask, ratio {one.ratio:g}\n{hidden:,} of {cubes:,} hidden\n{losses}"


def _notes(normalized: bool) -> list[str]:
    notes = [
        "Visible cubes are the original's in every picture: only hidden ones are predicted.",
        "Loss: mean squared error on hidden cubes; (mean colours): by each hidden cube's own mean colour alone.",
    ]
    if normalized:
        notes.append("WITH uses what the model never saw (the usual picture, it flatters). WITHOUT does not.")
    return notes
