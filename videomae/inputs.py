"""What a model's Input takes over from the weights that it is given: normalisation, sampling and the position table."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from kernels.launch import check
from videomae.clip import grid_of
from videomae.model import Encoder, Input, VideoMAE
from videomae.weight_files import Stated

# Where weights are of another grid: the new grid's own table, as version 1 does, or the old grid's, interpolated
Positions = Literal["fresh", "interpolate"]
POSITIONS: tuple[Positions, ...] = ("fresh", "interpolate")
_ASSUMED_FRAMES, _ASSUMED_SIZE = 16, (224, 224)


def set_normalization(model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Make mean and std, on pixels scaled to [0, 1], those of the model and of the encoder in it."""
    for module in model.modules():
        if isinstance(module, VideoMAE | Encoder):
            channels = len(module.input.mean)
            check(
                len(mean) == len(std) == channels, f"mean and std must have {channels} channels; got {mean} and {std}"
            )
    _set(model, mean=mean, std=std)


def set_positions(model: nn.Module, of: tuple[int, int, int] | None) -> None:
    """Give the model that grid's position table, interpolated to its own grid; None: its own."""
    _set(model, positions_of=of)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Encoder):
                module.positions.copy_(module.input.positions(module.size.width))
            if isinstance(module, VideoMAE):
                table = module.input.positions(module.encoder.size.decoder_width)
                module.decoder_positions.copy_(table)


def _set(model: nn.Module, **changes: Any) -> None:
    for module in model.modules():
        if isinstance(module, VideoMAE | Encoder):
            module.input = replace(module.input, **changes)


def choose_positions(
    input: Input, stated: Stated, positions: Positions, source: str
) -> tuple[tuple[int, int, int] | None, list[str]]:
    """The grid whose table a model of this input is to have with those weights (None: its own), and what to say of it.

    Weights of the same grid bring their own table. 16 frames of 224 x 224 pixels are assumed where nothing is stated.
    """
    is_stated = stated.frames is not None and stated.image_size is not None
    if positions == "fresh" and not is_stated:
        return None, []
    size = stated.image_size or _ASSUMED_SIZE
    theirs = grid_of(stated.frames or _ASSUMED_FRAMES, *size, input.cube)
    if theirs != input.grid and positions == "fresh":
        return None, [f"positions: the model's own, of {_by(input.grid)} cubes; the weights know {_by(theirs)}"]
    origin = stated.positions_of or theirs
    if origin == input.grid:
        return None, []
    said = f"positions: those of {_by(origin)} cubes, interpolated to {_by(input.grid)}"
    assumed = "" if is_stated else f" (clips of 16x224x224 are assumed, as {source} does not say)"
    return origin, [said + assumed]


def adopt(model: VideoMAE | Encoder, stated: Stated) -> list[str]:
    """Take over the normalisation, and the sampling where the model's is not known; messages about both."""
    messages = []
    if stated.mean is not None and stated.std is not None and (stated.mean, stated.std) != _normalization(model):
        set_normalization(model, stated.mean, stated.std)
        messages.append(f"frames are normalised with the file's mean {stated.mean} and std {stated.std}")
    ours, theirs = model.input.sampling, stated.sampling
    if ours is None and theirs is not None:
        _set(model, sampling=theirs)
    elif theirs not in (None, ours):
        messages.append(f"the file's sampling: {theirs}, the model's, which stays: {ours}")
    return messages


def _normalization(model: VideoMAE | Encoder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return model.input.mean, model.input.std


def _by(grid: tuple[int, int, int]) -> str:
    return "x".join(map(str, grid))
