"""Cube embedding of the visible cubes only, straight from uint8 frames.

tokens[b, v] = W . normalise(cube[b, index[b, v]]) + bias + positions[index[b, v]]

normalise(x) = (x / 255 - mean) / std per channel for uint8 frames; float frames are taken as already normalised.
frames [B, T, H, W, C], index [B, V], W [D, C, dt, dy, dx] (the layout of a Conv3d, so of every published checkpoint),
positions [N, D]. At 90 % tube masking it reads a tenth of the pixels and makes a tenth of the tokens that embedding
every cube would.

In the kernel u = (x - 128) / 64 stands for a pixel: exact in bfloat16 and float16. The rest of the normalisation goes
into the weight, s = 64 / (255 std), and the bias, o = (128 - 255 mean) / 64: normalise(x) = s (u + o). A first, small
kernel folds them; then one matrix product gathers its own rows: 1536 bytes of pixels and 2D bytes of token for each
visible cube (in bfloat16), 2 * 1536 * D operations, nothing else. Backward gathers the pixels again:
dW = s (dY^T u + o sum(dY)).
"""

from collections.abc import Sequence
from math import gcd, prod

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from kernels.cubes import cut, pick
from kernels.launch import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    channel_values,
    check,
    check_contiguous,
    check_frames,
    check_index,
    check_kernel_dtypes,
    check_same_device,
    dot_precision,
    launch,
    runs_triton,
)
from kernels.tiles import Target, Tile, target_of, tile


def _forward_tile(target: Target, dtype: torch.dtype, D: int, K: int) -> Tile:
    """Wide in D, since every column of programs gathers and converts the same pixels again."""
    if dtype == torch.float32:
        return {"ROWS": 64, "COLS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "COLS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def _backward_tile(target: Target, dtype: torch.dtype, D: int, K: int) -> Tile:
    """OUTER columns of dY by COLS pixels of a cube, ROWS cubes at a time."""
    if dtype == torch.float32:
        return {"OUTER": 64, "COLS": 64, "ROWS": 16, "num_warps": 8, "num_stages": 2}
    # without wgmma or tcgen05 the operands take registers too: 128 columns spill on sm_120
    outer = 128 if target.capability in (90, 100, 103) else 64
    return {"OUTER": outer, "COLS": 128, "ROWS": 64, "num_warps": 8, "num_stages": 3}


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


@triton.jit
def _fold_kernel(weight, bias, values, folded, offset, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """One row of the weight, times s, reordered to channel fastest; bias + o . folded."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(C):
        for start in range(0, P, BLOCK):
            p = start + tl.arange(0, BLOCK)
            w = tl.load(weight + (row * C + c) * P + p, mask=p < P, other=0.0).to(tl.float32) * tl.load(values + c)
            w = w.to(folded.dtype.element_ty)
            tl.store(folded + (row * P + p) * C + c, w, mask=p < P)
            total += w.to(tl.float32) * tl.load(values + C + c)
    tl.store(offset + row, tl.load(bias + row).to(tl.float32) + tl.sum(total, axis=0))


@triton.jit
def _cube_starts(
    index, rows, R, V, N, T, H, W, GRID_H, GRID_W,
    C: tl.constexpr, DT: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """For each row of [B * V]: where its cube starts in frames, which cube it is, and whether there is one."""
    if index is None:
        cube = (rows % V).to(tl.int64)  # the type of the other branch
    else:
        cube = tl.load(index + rows, mask=rows < R, other=0).to(tl.int64)
    known = (rows < R) & (cube >= 0) & (cube < N)
    cube = tl.where(known, cube, 0).to(tl.int32)
    first = ((cube // (GRID_H * GRID_W)) * DT * H + (cube // GRID_W) % GRID_H * DY) * W + cube % GRID_W * DX
    starts = ((rows // V).to(tl.int64) * T * H * W + first) * C
    return tl.multiple_of(starts, ALIGN), cube, known


@triton.jit
def _pixel_offsets(k, H, W, C: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, ALIGN: tl.constexpr):
    """Where entry k of a cube, channel fastest, lies after the cube's start."""
    run = k // (DX * C)  # pixels of one row of the cube lie together
    offset = ((run // DY) * H + run % DY) * (W * C) + k % (DX * C)
    return tl.max_contiguous(tl.multiple_of(offset, ALIGN), ALIGN)


@triton.jit
def _pixels(frames, at, mask, dtype: tl.constexpr):
    """u = (x - 128) / 64 of uint8 frames, exact in every dtype; float frames as they are."""
    if frames.dtype.element_ty == tl.uint8:
        x = tl.load(frames + at, mask=mask, other=128)
        return ((x.to(tl.float32) - 128.0) * 0.015625).to(dtype)
    return tl.load(frames + at, mask=mask, other=0.0).to(dtype)


@triton.jit(do_not_specialize=["R", "V", "N", "T", "H", "W", "GRID_H", "GRID_W"])
def _forward_kernel(
    frames, index, folded, offset, positions, out, R, V, N, T, H, W, GRID_H, GRID_W, D,
    C: tl.constexpr, DT: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = DT * DY * DX * C
    # neighbouring programs share their pixels, which then come from the cache
    rows = tl.program_id(0) // tl.cdiv(D, COLS) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % tl.cdiv(D, COLS) * COLS + tl.arange(0, COLS)
    starts, cube, known = _cube_starts(index, rows, R, V, N, T, H, W, GRID_H, GRID_W, C, DT, DY, DX, ALIGN)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(0, K, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        at = starts[:, None] + _pixel_offsets(k, H, W, C, DY, DX, ALIGN)[None, :]
        u = _pixels(frames, at, known[:, None] & (k < K)[None, :], out.dtype.element_ty)
        w = tl.load(folded + cols[None, :] * K + k[:, None], mask=(k < K)[:, None] & (cols < D)[None, :], other=0.0)
        total = tl.dot(u, w, total, input_precision=PRECISION)
    total += tl.load(offset + cols, mask=cols < D, other=0.0)[None, :]
    # a cube number outside [0, N) must not pass unnoticed
    inside = (rows < R)[:, None] & (cols < D)[None, :]
    place = positions + cube[:, None] * D + cols[None, :]
    total += tl.load(place, mask=inside & known[:, None], other=float("nan")).to(tl.float32)
    tl.store(out + rows.to(tl.int64)[:, None] * D + cols[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["R", "V", "N", "T", "H", "W", "GRID_H", "GRID_W", "SPAN"])
def _backward_kernel(
    dy, frames, index, part, bias_part, R, V, N, T, H, W, GRID_H, GRID_W, D, SPAN,
    C: tl.constexpr, DT: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, OUTER: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """part[split] = dY^T u over SPAN of the rows; bias_part[split] = sum of dY over the same."""
    K: tl.constexpr = DT * DY * DX * C
    outer = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    k = tl.program_id(0) * COLS + tl.arange(0, COLS)
    split = tl.program_id(2)
    offsets = _pixel_offsets(k, H, W, C, DY, DX, ALIGN)
    total = tl.zeros([OUTER, COLS], tl.float32)
    bias_total = tl.zeros([OUTER], tl.float32)
    for begin in range(0, SPAN, ROWS):
        rows = split * SPAN + begin + tl.arange(0, ROWS)
        starts, _, known = _cube_starts(index, rows, R, V, N, T, H, W, GRID_H, GRID_W, C, DT, DY, DX, ALIGN)
        at = starts[:, None] + offsets[None, :]
        u = _pixels(frames, at, known[:, None] & (k < K)[None, :], dy.dtype.element_ty)
        source = dy + rows.to(tl.int64)[:, None] * D + outer[None, :]
        upstream = tl.load(source, mask=(rows < R)[:, None] & (outer < D)[None, :], other=0.0)
        total = tl.dot(tl.trans(upstream), u, total, input_precision=PRECISION)
        bias_total += tl.sum(upstream.to(tl.float32), axis=0)
    inside = (outer < D)[:, None] & (k < K)[None, :]
    tl.store(part + (split * D + outer[:, None]).to(tl.int64) * K + k[None, :], total, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(bias_part + split * D + outer, bias_total, mask=outer < D)


@triton.jit(do_not_specialize=["SPLITS"])
def _unfold_kernel(
    part, bias_part, values, dweight, dbias, SPLITS, D, C: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of the weight's gradient: the splits added up in order, then s (total + o * bias total)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    bias_total = 0.0
    for split in range(SPLITS):
        total += tl.load(part + (split * D + row) * (P * C) + k, mask=k < P * C, other=0.0)
        bias_total += tl.load(bias_part + split * D + row)
    scale, shift = tl.load(values + k % C), tl.load(values + C + k % C)
    tl.store(dweight + (row * C + k % C) * P + k // C, scale * (total + shift * bias_total), mask=k < P * C)
    if tl.program_id(1) == 0:
        tl.store(dbias + row, bias_total)


def fold_values(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """s and o of every channel, float32 [2C] on the device of frames; 1 and 0 for float frames."""
    if frames.dtype != torch.uint8:
        mean, std = [128 / 255] * len(mean), [64 / 255] * len(std)
    scales, shifts = (64 / (255 * s) for s in std), ((128 - 255 * m) / 64 for m in mean)
    return channel_values((*scales, *shifts), 1, torch.float32, frames.device)


def _splits(rows: int, values: int, tiles: int, block: int, dtype: torch.dtype, device: torch.device) -> int:
    """Into how many parts to cut the rows of backward's sum: the number that keeps the multiprocessors busiest.

    A program fills a multiprocessor, and takes at least four blocks of rows; all partial sums together take no more
    memory than the tokens.
    """
    processors = target_of(device).processors
    most = triton.cdiv(8 * processors, tiles)  # more parts than that even nothing out
    limit = max(1, min(rows * dtype.itemsize // (4 * values), rows // (4 * block), most))
    return max(range(1, limit + 1), key=lambda n: (n * tiles / triton.cdiv(n * tiles, processors), -n))


def _geometry(frames: Tensor, cube: Sequence[int], num_rows: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """The kernels' sizes, and their compile-time constants."""
    (B, T, H, W, C), (dt, dy, dx) = frames.shape, cube
    grid = (T // dt, H // dy, W // dx)
    sizes = (num_rows, num_rows // max(1, B), prod(grid), T, H, W, grid[1], grid[2])
    return sizes, {"C": C, "DT": dt, "DY": dy, "DX": dx, "ALIGN": gcd(16, dx * C, W * C)}


def _forward(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    index: Tensor | None,
    values: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens in dtype; values as `fold_values` gives them."""
    D, C, *cube = weight.shape
    P, V = prod(cube), len(positions) if index is None else index.shape[1]
    folded = torch.empty(D, P * C, dtype=dtype, device=frames.device)
    offset = torch.empty(D, dtype=torch.float32, device=frames.device)
    out = torch.empty(len(frames), V, D, dtype=dtype, device=frames.device)
    block = min(256, triton.next_power_of_2(P))
    launch(_fold_kernel, (D,), weight, bias, values, folded, offset, C=C, P=P, BLOCK=block)
    sizes, constants = _geometry(frames, cube, len(frames) * V)
    t = tile("cube_embed.forward", _forward_tile, frames.device, dtype, D=D, K=P * C)
    grid = (triton.cdiv(sizes[0], t["ROWS"]) * triton.cdiv(D, t["COLS"]),)
    tensors = (frames, index, folded, offset, positions, out)
    launch(_forward_kernel, grid, *tensors, *sizes, D, PRECISION=dot_precision(dtype), **constants, **t)
    return out


def _backward(
    dy: Tensor,
    frames: Tensor,
    index: Tensor | None,
    values: Tensor,
    cube: Sequence[int],
    dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, in these dtypes."""
    (B, V, D), C, P = dy.shape, frames.shape[-1], prod(cube)
    sizes, constants = _geometry(frames, cube, B * V)
    t = tile("cube_embed.backward", _backward_tile, frames.device, dy.dtype, D=D, K=P * C)
    tiles = triton.cdiv(P * C, t["COLS"]), triton.cdiv(D, t["OUTER"])
    rows_each = triton.cdiv(B * V, _splits(B * V, P * C, tiles[0] * tiles[1], t["ROWS"], dy.dtype, frames.device))
    span = max(1, triton.cdiv(rows_each, t["ROWS"])) * t["ROWS"]
    splits = triton.cdiv(B * V, span)
    part = torch.empty(splits, D, P * C, dtype=torch.float32, device=dy.device)
    bias_part = torch.empty(splits, D, dtype=torch.float32, device=dy.device)
    tensors = (dy, frames, index, part, bias_part)
    launch(
        _backward_kernel,
        (*tiles, splits),
        *tensors,
        *sizes,
        D,
        span,
        PRECISION=dot_precision(dy.dtype),
        **constants,
        **t,
    )
    dweight = torch.empty(D, C, *cube, dtype=dtype, device=dy.device)
    dbias = torch.empty(D, dtype=bias_dtype, device=dy.device)
    block = min(512, triton.next_power_of_2(P * C))
    grid = (D, triton.cdiv(P * C, block))
    launch(_unfold_kernel, grid, part, bias_part, values, dweight, dbias, splits, D, C=C, P=P, BLOCK=block)
    return dweight, dbias


def _setup(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    frames, weight, bias, _, index, values, _ = inputs
    ctx.constants = (tuple(weight.shape[2:]), weight.dtype, bias.dtype)  # type: ignore[attr-defined]
    ctx.save_for_backward(frames, index, values)


def _autograd(ctx: FunctionCtx, dy: Tensor) -> tuple:
    saved, constants = ctx.saved_tensors, ctx.constants  # type: ignore[attr-defined]
    return None, *backward_op(dy.contiguous(), *saved, *constants), *[None] * 4


forward_op = torch.library.custom_op("videomae::cube_embed", _forward, mutates_args=())
backward_op = torch.library.custom_op("videomae::cube_embed_backward", _backward, mutates_args=())
forward_op.register_fake(
    lambda frames, weight, bias, positions, index, values, dtype: frames.new_empty(
        frames.shape[0], len(positions) if index is None else index.shape[1], weight.shape[0], dtype=dtype
    )
)
backward_op.register_fake(
    lambda dy, frames, index, values, cube, dtype, bias_dtype: (
        dy.new_empty(dy.shape[2], frames.shape[4], *cube, dtype=dtype),
        dy.new_empty(dy.shape[2], dtype=bias_dtype),
    )
)
forward_op.register_autograd(_autograd, setup_context=_setup)


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

    frames: uint8 [B, T, H, W, C], or floating point and already normalised; fixed. index: integer [B, V], in [0, N);
    a cube number outside gives NaN on a GPU, and IndexError elsewhere. positions: [N, D], fixed.
    mean, std: per channel, on pixels scaled to [0, 1]; used for uint8 only.
    The result has the weight's dtype, or autocast's, where that is on; a kernel's gradients are float32 sums whichever.
    Raises ValueError when sizes are no multiples of the cube, or shapes, dtypes, devices or strides do not fit.
    """
    check(weight.ndim == 5, f"weight must be [D, C, dt, dy, dx]; got shape {tuple(weight.shape)}")
    grid = check_frames(frames, (weight.shape[2], weight.shape[3], weight.shape[4]))
    num_cubes, channels = grid[0] * grid[1] * grid[2], frames.shape[-1]
    check(weight.shape[1] == channels, f"weight must take {channels} channels; got {tuple(weight.shape)}")
    check(bias.shape == weight.shape[:1], f"bias must be {tuple(weight.shape[:1])}; got {tuple(bias.shape)}")
    wanted = (num_cubes, weight.shape[0])
    check(tuple(positions.shape) == wanted, f"positions must be {wanted}; got {tuple(positions.shape)}")
    check(len(mean) == len(std) == channels, f"mean and std must have {channels} channels; got {mean} and {std}")
    fixed = not frames.requires_grad and not positions.requires_grad
    check(fixed, "frames and positions are fixed: a gradient for them is not computed")
    if index is not None:
        check_index(index, "index", frames)
    check_contiguous(weight=weight, bias=bias, positions=positions)
    check_same_device(frames=frames, weight=weight, bias=bias, positions=positions)
    if not runs_triton(frames):
        return cube_embed_ref(frames, weight, bias, positions, index, mean, std)
    check_kernel_dtypes(
        weight=weight, bias=bias, positions=positions, frames=None if frames.dtype == torch.uint8 else frames
    )
    num_rows = len(frames) * (num_cubes if index is None else index.shape[1])
    small = max(positions.numel(), weight.numel(), num_rows) < 2**31
    check(small, "positions, weight and cubes must number fewer than 2^31 each: their offsets are 32 bits wide")
    device = frames.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return forward_op(frames, weight, bias, positions, index, fold_values(frames, mean, std), dtype)
