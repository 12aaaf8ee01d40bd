"""Measure tiles on this GPU and write the table that the ops read, `kernels/tiles.json`. Training never tunes.

    python -m kernels.tune                                            # ViT-S, B, L and H, all ops
    python -m kernels.tune --ops attention.backward cube_embed --sizes vit_base vit_large --minutes 5
    python -m kernels.tune --dry-run                                  # measure and print, write nothing

Run it in the repository's root: it measures as the benches do. For every op and shape the default tile and its
neighbours run on the same inputs. An entry is written when a candidate gives the default's values within rounding and
beats its time twice by more than 2 % and more than the spread; otherwise the shape's old entry goes. Entries of other
GPUs, ops and shapes stay.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from bench.shapes import CHANNELS, CUBE, GPU_CLIPS, Shape, shape_of
from bench.timing import Timing, measure, num_sets
from kernels import tiles
from kernels.attention import _backward as attention_backward
from kernels.attention import _backward_tile as attention_backward_tile
from kernels.attention import _forward as attention_forward
from kernels.attention import _forward_tile as attention_forward_tile
from kernels.bias_gelu import _backward as bias_gelu_backward
from kernels.bias_gelu import _backward_tile as bias_gelu_backward_tile
from kernels.bias_gelu import _forward as bias_gelu_forward
from kernels.bias_gelu import _forward_tile as bias_gelu_forward_tile
from kernels.cube_embed import _backward as cube_embed_backward
from kernels.cube_embed import _backward_tile as cube_embed_backward_tile
from kernels.cube_embed import _forward as cube_embed_forward
from kernels.cube_embed import _forward_tile as cube_embed_forward_tile
from kernels.decoder_input import _backward as decoder_input_backward
from kernels.decoder_input import _backward_tile as decoder_input_backward_tile
from kernels.decoder_input import _forward as decoder_input_forward
from kernels.decoder_input import _forward_tile as decoder_input_forward_tile
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from kernels.layer_norm import _backward as layer_norm_backward
from kernels.layer_norm import _backward_tile as layer_norm_backward_tile
from kernels.layer_norm import _forward as layer_norm_forward
from kernels.layer_norm import _forward_tile as layer_norm_forward_tile
from kernels.pixel_loss import _forward as pixel_loss_forward
from kernels.pixel_loss import _loss_tile as pixel_loss_tile
from kernels.tiles import Target, Tile
from videomae.clip import sinusoid_positions

PUBLISHED = ("vit_small", "vit_base", "vit_large", "vit_huge")
DTYPE = torch.bfloat16
# a candidate must be faster by more than this, and by more than the spread
LEAST_GAIN = 0.02
# smallest and largest value of what is a power of two
RANGES = {
    "ROWS": (1, 512), "COLS": (16, 4096), "DEPTH": (16, 256), "OUTER": (16, 256), "num_warps": (1, 16),
}  # fmt: skip
STAGES = (1, 5)
# beside the default's neighbours: known good starting points elsewhere
EXTRA: dict[str, tuple[Tile, ...]] = {
    "cube_embed.forward": (
        {"ROWS": 128, "COLS": 256, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 64, "COLS": 256, "DEPTH": 64, "num_warps": 4, "num_stages": 3},
        {"ROWS": 64, "COLS": 128, "DEPTH": 128, "num_warps": 4, "num_stages": 3},
    ),
    "cube_embed.backward": (
        {"OUTER": 128, "COLS": 256, "ROWS": 64, "num_warps": 8, "num_stages": 3},
        {"OUTER": 64, "COLS": 128, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    ),
    "attention.forward": (
        {"ROWS": 128, "COLS": 32, "num_warps": 8, "num_stages": 2},
        {"ROWS": 128, "COLS": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 64, "COLS": 32, "num_warps": 4, "num_stages": 3},
    ),
    "attention.backward": (
        {"ROWS": 256, "COLS": 16, "num_warps": 4, "num_stages": 1},
        {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 1},
        {"ROWS": 64, "COLS": 32, "num_warps": 4, "num_stages": 2},
        {"ROWS": 32, "COLS": 64, "num_warps": 4, "num_stages": 1},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One op at one shape: its entry in the table, and how it is called."""

    op: str
    size: str
    sizes: dict[str, int]  # what the entry's key is made of
    default: Tile
    make: Callable[[int], tuple]  # a set of inputs from a seed
    run: Callable[..., Any]
    read_bytes: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return tiles.shape_key(self.dtype, **self.sizes)


@dataclass(frozen=True)
class Trial:
    """A tile's time, or why it has none."""

    tile: Tile
    timing: Timing | None
    failure: str = ""


def candidates(op: str, default: Tile) -> list[Tile]:
    """The default first, then every tile with one entry halved or doubled (stages: one less or more), then extras."""
    found = [dict(default)]
    for name, value in default.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [default | {name: step} for step in steps if is_valid(default | {name: step})]
    found += [dict(extra) for extra in EXTRA.get(op, ()) if set(extra) == set(default)]
    return [tile for i, tile in enumerate(found) if tile not in found[:i]]


def is_valid(tile: Tile) -> bool:
    """Whether every entry is one that a kernel can take: powers of two in range, PROGRAMS any positive number."""
    for name, value in tile.items():
        if name == "num_stages":
            good = STAGES[0] <= value <= STAGES[1]
        elif name == "PROGRAMS":
            good = value >= 1
        else:
            low, high = RANGES[name]
            good = low <= value <= high and value & (value - 1) == 0
        if not good:
            return False
    return True


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def _frames(shape: Shape, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    sizes = (shape.clips, shape.frames, shape.side, shape.side, CHANNELS)
    return torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator, device=device)


def _pixel_jobs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    """Of cube_embed, decoder_input and pixel_loss: op, sizes of the key, default tile's function, make, run, bytes read.

    Weights are float32, as in training under autocast.
    """
    B, V, M, D, E, K = shape.clips, shape.num_visible, shape.num_masked, shape.width, shape.decoder_width, 0
    K, item, norm = shape.cube_values, dtype.itemsize, (IMAGENET_MEAN, IMAGENET_STD)
    wide = torch.float32

    def embed(seed: int) -> tuple:
        weight = _random((D, CHANNELS, *CUBE), wide, device, seed) * 0.03
        positions = sinusoid_positions(shape.num_cubes, D).to(device)
        index = shape.mask(seed, device).visible
        return _frames(shape, device, seed), weight, _random((D,), wide, device, seed), positions, index, *norm, dtype

    def embed_backward(seed: int) -> tuple:
        dy = _random((B, V, D), dtype, device, seed)
        return dy, _frames(shape, device, seed), shape.mask(seed, device).visible, CUBE, *norm, wide, wide

    def sequence(seed: int) -> tuple:
        mask, positions = shape.mask(seed, device), sinusoid_positions(shape.num_cubes, E).to(device)
        visible = _random((B, V, E), dtype, device, seed)
        return visible, _random((E,), wide, device, seed), positions, mask.visible, mask.masked

    def loss(seed: int) -> tuple:
        pred = _random((B, M, K), dtype, device, seed)
        constants = (None, None, CUBE, True, 1 / pred.numel(), *norm, True)
        return pred, _frames(shape, device, seed), shape.mask(seed, device).masked, *constants

    pixels = B * V * K
    yield "cube_embed.forward", {"D": D, "K": K}, cube_embed_forward_tile, embed, cube_embed_forward, pixels
    read = pixels + B * V * D * item
    yield "cube_embed.backward", {"D": D, "K": K}, cube_embed_backward_tile, embed_backward, cube_embed_backward, read
    read = B * V * E * item
    yield "decoder_input.forward", {"E": E}, decoder_input_forward_tile, sequence, decoder_input_forward, read
    dout = lambda seed: (_random((B, V + M, E), dtype, device, seed), V, wide)  # noqa: E731
    read = B * (V + M) * E * item
    yield "decoder_input.backward", {"E": E}, decoder_input_backward_tile, dout, decoder_input_backward, read
    yield "pixel_loss", {"K": K}, pixel_loss_tile, loss, pixel_loss_forward, B * M * K * (item + 1)
