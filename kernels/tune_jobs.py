"""What `python -m kernels.tune` measures: every op at every shape in use, and the tiles worth trying there.

Nothing here needs a GPU: inputs are made on the device that is asked for, when they are asked for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.shapes import CHANNELS, CUBE, Shape
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
from kernels.cube_embed import fold_values
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
from kernels.split_heads import _join as join_heads
from kernels.split_heads import _join_tile as join_tile
from kernels.tiles import Target, Tile
from videomae.clip import sinusoid_positions

DTYPE = torch.bfloat16
# smallest and largest value of what is a power of two
RANGES = {
    "ROWS": (1, 512), "COLS": (16, 4096), "DEPTH": (16, 256), "OUTER": (16, 256), "num_warps": (1, 16),
}  # fmt: skip
STAGES = (1, 5)
# beside the default's neighbours: what no single step from it reaches
EXTRA: dict[str, tuple[Tile, ...]] = {
    "pixel_loss": ({"num_warps": 4},),
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
    """Of cube_embed, decoder_input and pixel_loss: op, key's sizes, default tile's function, make, run, bytes read.

    Weights are float32, as in training under autocast.
    """
    B, V, M, D, E = shape.clips, shape.num_visible, shape.num_masked, shape.width, shape.decoder_width
    K, item, wide = shape.cube_values, dtype.itemsize, torch.float32
    values = fold_values(_frames(shape, device, 0), IMAGENET_MEAN, IMAGENET_STD)

    def embed(seed: int) -> tuple:
        weight = _random((D, CHANNELS, *CUBE), wide, device, seed) * 0.03
        positions = sinusoid_positions(shape.num_cubes, D).to(device)
        index = shape.mask(seed, device).visible
        return _frames(shape, device, seed), weight, _random((D,), wide, device, seed), positions, index, values, dtype

    def embed_backward(seed: int) -> tuple:
        dy = _random((B, V, D), dtype, device, seed)
        return dy, _frames(shape, device, seed), shape.mask(seed, device).visible, values, CUBE, wide, wide

    def sequence(seed: int) -> tuple:
        mask, positions = shape.mask(seed, device), sinusoid_positions(shape.num_cubes, E).to(device, dtype)
        visible = _random((B, V, E), dtype, device, seed)
        return visible, _random((E,), wide, device, seed), positions, mask.visible, mask.masked

    def sequence_backward(seed: int) -> tuple:
        return _random((B, V + M, E), dtype, device, seed), V, wide

    def loss(seed: int) -> tuple:
        pred = _random((B, M, K), dtype, device, seed)
        constants = (None, None, None, CUBE, True, "mse", 1.0, True)
        return pred, _frames(shape, device, seed), shape.mask(seed, device).masked, *constants

    pixels = B * V * K
    yield "cube_embed.forward", {"D": D, "K": K}, cube_embed_forward_tile, embed, cube_embed_forward, pixels
    read = pixels + B * V * D * item
    yield "cube_embed.backward", {"D": D, "K": K}, cube_embed_backward_tile, embed_backward, cube_embed_backward, read
    read = B * V * E * item
    yield "decoder_input.forward", {"E": E}, decoder_input_forward_tile, sequence, decoder_input_forward, read
    read = B * (V + M) * E * item
    yield (
        "decoder_input.backward",
        {"E": E},
        decoder_input_backward_tile,
        sequence_backward,
        decoder_input_backward,
        read,
    )
    yield "pixel_loss", {"K": K}, pixel_loss_tile, loss, pixel_loss_forward, B * M * K * (item + 1)


def _norm_jobs(shape: Shape, tokens: int, D: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    R = shape.clips * tokens
    size = R * D * dtype.itemsize

    def forward(seed: int) -> tuple:
        x, residual = (_random((R, D), dtype, device, seed + i) for i in (0, 1000))
        weight, bias, x_bias = (_random((D,), torch.float32, device, seed + i) for i in (0, 1000, 2000))
        return x, residual, weight, bias, 1e-6, x_bias

    def backward(seed: int) -> tuple:
        dy, ds, s = (_random((R, D), dtype, device, seed + i) for i in (0, 1000, 2000))
        variance, mean = torch.var_mean(s.float(), dim=1, correction=0)
        return dy, ds, s, _random((D,), torch.float32, device, seed), mean, (variance + 1e-6).rsqrt(), 3

    yield "layer_norm.forward", {"D": D}, layer_norm_forward_tile, forward, layer_norm_forward, 2 * size
    yield "layer_norm.backward", {"D": D}, layer_norm_backward_tile, backward, layer_norm_backward, 3 * size


def _gelu_jobs(shape: Shape, tokens: int, D: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    R = shape.clips * tokens
    size = R * D * dtype.itemsize

    def forward(seed: int) -> tuple:
        return _random((R, D), dtype, device, seed), _random((D,), torch.float32, device, seed)

    def backward(seed: int) -> tuple:
        return _random((R, D), dtype, device, seed + 1000), *forward(seed)

    yield "bias_gelu.forward", {"D": D}, bias_gelu_forward_tile, forward, bias_gelu_forward, size
    yield "bias_gelu.backward", {"D": D}, bias_gelu_backward_tile, backward, bias_gelu_backward, 2 * size


def _join_jobs(shape: Shape, tokens: int, D: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    B, d = shape.clips, shape.head_width  # the decoder's heads are as wide as the encoder's
    heads = D // d

    def parts(seed: int) -> tuple:
        return tuple(_random((B, tokens, heads, d), dtype, device, seed + i) for i in (0, 1000, 2000))

    yield "split_heads.backward", {"D": D}, join_tile, parts, join_heads, 3 * B * tokens * D * dtype.itemsize


def _attention_jobs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    B, V, A, d = shape.clips, shape.num_visible, shape.heads, shape.head_width
    size = B * V * A * d * dtype.itemsize

    def forward(seed: int) -> tuple:
        return (_random((B, V, 3, A, d), dtype, device, seed),)

    def backward(seed: int) -> tuple:
        (qkv,) = forward(seed)
        out, lse = attention_forward(qkv)
        return _random((B, V, A * d), dtype, device, seed + 1000), qkv, out, lse

    key = {"V": V, "d": d}
    yield "attention.forward", key, attention_forward_tile, forward, attention_forward, 3 * size
    yield "attention.backward", key, attention_backward_tile, backward, attention_backward, 5 * size


def jobs(shape: Shape, target: Target, device: torch.device, dtype: torch.dtype = DTYPE) -> list[Job]:
    """Every op at that shape: encoder blocks see the visible tokens, decoder blocks all."""
    found = [*_pixel_jobs(shape, device, dtype)]
    for tokens, width in ((shape.num_visible, shape.width), (shape.num_cubes, shape.decoder_width)):
        found += [*_norm_jobs(shape, tokens, width, device, dtype)]
        found += [*_gelu_jobs(shape, tokens, 4 * width, device, dtype)]
        found += [*_join_jobs(shape, tokens, width, device, dtype)]
    found += [*_attention_jobs(shape, device, dtype)]
    return [
        Job(op, shape.size, sizes, default(target, dtype, **sizes), make, run, read, dtype)
        for op, sizes, default, make, run, read in found
    ]


def select(found: Iterable[Job], ops: Sequence[str]) -> list[Job]:
    """Those of the ops named, "layer_norm" meaning both passes; of several with one entry in the table the first.

    ValueError for a name that no job has.
    """
    found = list(found)
    names = {job.op for job in found} | {job.op.split(".")[0] for job in found}
    unknown = sorted(set(ops) - names)
    if unknown:
        raise ValueError(f"ops must be some of {', '.join(sorted(names))}; got {', '.join(unknown)}")
    wanted = [job for job in found if not ops or job.op in ops or job.op.split(".")[0] in ops]
    return list({(job.op, job.key): job for job in reversed(wanted)}.values())[::-1]
