"""Cube embedding of the visible cubes only, straight from uint8 frames.

tokens[b, v] = W . normalise(cube[b, index[b, v]]) + bias + positions[index[b, v]]

normalise(x) = (x / 255 - mean) / std per channel for uint8 frames; float frames are taken as already normalised.
frames [B, T, H, W, C], index [B, V], W [D, C, dt, dy, dx] (the layout of a Conv3d, so of every published checkpoint),
positions [N, D]. At 90 % tube masking it reads a tenth of the pixels and makes a tenth of the tokens that embedding
every cube would.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from kernels.cubes import cut, pick
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD, channel_values, check, check_frames, check_index


def cube_embed_ref(
    frames: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, index: Tensor | None, mean: tuple, std: tuple
) -> Tensor:
    """What the kernel must equal: cut, pick, normalise, project, add positions, in plain PyTorch."""
    cubes = cut(frames, (weight.shape[2], weight.shape[3], weight.shape[4]))
    if index is not None:
        cubes = pick(cubes, index)
    pixels = cubes.flatten(2).to(weight.dtype)  # [B, V, dt*dy*dx*C], channel fastest
    if frames.dtype == torch.uint8:
        repeats = pixels.shape[-1] // frames.shape[-1]
        scales, shifts = tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
        scale, shift = (channel_values(v, repeats, pixels.dtype, pixels.device) for v in (scales, shifts))
        pixels = torch.addcmul(shift, pixels, scale)
    tokens = functional.linear(pixels, rearrange(weight, "d c dt dy dx -> d (dt dy dx c)"), bias)
    rows = positions if index is None else positions[index.long()]
    return tokens + rows.to(tokens.dtype)


def cube_embed(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    index: Tensor | None = None,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """Tokens [B, V, D] of the cubes that index names (None: of all N), differentiable in weight and bias.

    frames: uint8 [B, T, H, W, C], or floating point and already normalised. index: integer [B, V], in [0, N).
    mean, std: per channel, on pixels scaled to [0, 1]; used for uint8 only.
    Raises ValueError when sizes are no multiples of the cube, or shapes and devices do not fit together.
    """
    check(weight.ndim == 5, f"weight must be [D, C, dt, dy, dx]; got shape {tuple(weight.shape)}")
    grid = check_frames(frames, (weight.shape[2], weight.shape[3], weight.shape[4]))
    num_cubes, channels = grid[0] * grid[1] * grid[2], frames.shape[-1]
    check(weight.shape[1] == channels, f"weight must take {channels} channels; got {tuple(weight.shape)}")
    check(bias.shape == weight.shape[:1], f"bias must be {tuple(weight.shape[:1])}; got {tuple(bias.shape)}")
    wanted = (num_cubes, weight.shape[0])
    check(tuple(positions.shape) == wanted, f"positions must be {wanted}; got {tuple(positions.shape)}")
    check(len(mean) == len(std) == channels, f"mean and std must have {channels} channels; got {mean} and {std}")
    if index is not None:
        check_index(index, "index", len(frames), frames)
    return cube_embed_ref(frames, weight, bias, positions, index, mean, std)
