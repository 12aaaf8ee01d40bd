"""The decoder's input sequence: visible tokens, then mask tokens, each with the position of its own cube.

out[b, :V] = visible[b] + positions[visible_index[b]]
out[b, V:] = mask_token + positions[masked_index[b]]

The order is not undone: positions travel with the tokens, and the masked ones stand last, where the decoder's head
takes them. Forward writes B(V+M)E elements and reads BVE of them; positions stay in the cache. Backward reads
B(V+M)E and writes BVE: the visible rows are copied, the masked rows summed into the mask token's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.launch import (
    check,
    check_contiguous,
    check_index,
    check_kernel_dtypes,
    check_same_device,
    launch,
    runs_triton,
)
from kernels.tiles import Target, Tile, tile


def _forward_tile(target: Target, dtype: torch.dtype, E: int) -> Tile:
    """16 bytes per thread along a token, and as many tokens as make four such stores per thread."""
    block = triton.next_power_of_2(E)
    return {"ROWS": max(1, 4096 // block), "num_warps": 4}


def _backward_tile(target: Target, dtype: torch.dtype, E: int) -> Tile:
    return _forward_tile(target, dtype, E) | {"PROGRAMS": 4 * target.processors}


def decoder_input_ref(
    visible: Tensor, mask_token: Tensor, positions: Tensor, visible_index: Tensor, masked_index: Tensor
) -> Tensor:
    """What the kernel must equal: two gathers, two sums and a concatenation."""
    rows = positions.to(visible.dtype)
    seen = visible + rows[visible_index.long()]
    hidden = mask_token.to(visible.dtype) + rows[masked_index.long()]
    return torch.cat((seen, hidden), dim=1)


@triton.jit
def _place(V, M, ROWS: tl.constexpr):
    """Of this program: its clip, whether its tokens are visible ones, and their numbers among these or the masked."""
    seen = tl.cdiv(V, ROWS)
    per_clip = seen + tl.cdiv(M, ROWS)
    clip, block = tl.program_id(0) // per_clip, tl.program_id(0) % per_clip
    visible = block < seen
    return clip.to(tl.int64), visible, tl.where(visible, block, block - seen) * ROWS + tl.arange(0, ROWS)


@triton.jit
def _position(positions, cube, inside, cols, N, E):
    """Rows of positions as float32; NaN for a cube number outside [0, N), which must not pass unnoticed."""
    known = inside & ((cube >= 0) & (cube < N))[:, None]
    rows = positions + tl.where((cube >= 0) & (cube < N), cube, 0).to(tl.int32)[:, None] * E + cols[None, :]
    return tl.load(rows, mask=known, other=float("nan")).to(tl.float32)


@triton.jit(do_not_specialize=["V", "M", "N"])
def _forward_kernel(
    visible,
    mask_token,
    positions,
    visible_index,
    masked_index,
    out,
    V,
    M,
    N,
    E,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    clip, is_visible, rows = _place(V, M, ROWS)
    cols = tl.arange(0, BLOCK)
    if is_visible:
        inside = (rows < V)[:, None] & (cols < E)[None, :]
        cube = tl.load(visible_index + clip * V + rows, mask=rows < V, other=0).to(tl.int64)
        at = rows[:, None] * E + cols[None, :]
        value = tl.load(visible + clip * V * E + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + clip * (V + M) * E + at, value + _position(positions, cube, inside, cols, N, E), mask=inside)
    else:
        inside = (rows < M)[:, None] & (cols < E)[None, :]
        cube = tl.load(masked_index + clip * M + rows, mask=rows < M, other=0).to(tl.int64)
        token = tl.load(mask_token + cols, mask=cols < E, other=0.0).to(tl.float32)[None, :]
        at = rows[:, None] * E + cols[None, :]
        value = token + _position(positions, cube, inside, cols, N, E)
        tl.store(out + (clip * (V + M) + V) * E + at, value, mask=inside)


@triton.jit(do_not_specialize=["CLIPS", "V", "M", "PROGRAMS"])
def _backward_kernel(dout, dvisible, part, CLIPS, V, M, E, PROGRAMS, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    if program < PROGRAMS:  # these sum the masked rows
        per_clip = tl.cdiv(M, ROWS)
        total = tl.zeros([BLOCK], tl.float32)
        for block in range(program, CLIPS * per_clip, PROGRAMS):
            rows = block % per_clip * ROWS + tl.arange(0, ROWS)
            inside = (rows < M)[:, None] & (cols < E)[None, :]
            base = dout + (tl.full((), V + M, tl.int64) * (block // per_clip) + V) * E
            value = tl.load(base + rows[:, None] * E + cols[None, :], mask=inside, other=0.0)
            total += tl.sum(value.to(tl.float32), axis=0)
        tl.store(part + program * E + cols, total, mask=cols < E)
    else:  # and these copy the visible ones
        block, per_clip = program - PROGRAMS, tl.cdiv(V, ROWS)
        clip, rows = (block // per_clip).to(tl.int64), block % per_clip * ROWS + tl.arange(0, ROWS)
        inside = (rows < V)[:, None] & (cols < E)[None, :]
        at = rows[:, None] * E + cols[None, :]
        tl.store(dvisible + clip * V * E + at, tl.load(dout + clip * (V + M) * E + at, mask=inside), mask=inside)


def _forward(
    visible: Tensor, mask_token: Tensor, positions: Tensor, visible_index: Tensor, masked_index: Tensor
) -> Tensor:
    (B, V, E), M = visible.shape, masked_index.shape[1]
    out = visible.new_empty(B, V + M, E)
    t = tile("decoder_input.forward", _forward_tile, visible.device, visible.dtype, E=E)
    arguments = (visible, mask_token, positions, visible_index, masked_index, out, V, M, len(positions), E)
    blocks = triton.cdiv(V, t["ROWS"]) + triton.cdiv(M, t["ROWS"])
    launch(_forward_kernel, (B * blocks,), *arguments, BLOCK=triton.next_power_of_2(E), **t)
    return out


def _backward(dout: Tensor, num_visible: int, token_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (B, L, E), V = dout.shape, num_visible
    M = L - V
    t = dict(tile("decoder_input.backward", _backward_tile, dout.device, dout.dtype, E=E))
    programs = min(t.pop("PROGRAMS"), B * triton.cdiv(M, t["ROWS"]))
    dvisible = dout.new_empty(B, V, E)
    part = torch.empty(programs, E, dtype=torch.float32, device=dout.device)
    grid = (programs + B * triton.cdiv(V, t["ROWS"]),)
    launch(_backward_kernel, grid, dout, dvisible, part, B, V, M, E, programs, BLOCK=triton.next_power_of_2(E), **t)
    return dvisible, part.sum(0).to(token_dtype)


def _setup(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    visible, mask_token, _, _, _ = inputs
    ctx.num_visible, ctx.token_dtype = visible.shape[1], mask_token.dtype  # type: ignore[attr-defined]


def _autograd(ctx: FunctionCtx, dout: Tensor) -> tuple:
    gradients = backward_op(dout.contiguous(), ctx.num_visible, ctx.token_dtype)  # type: ignore[attr-defined]
    return *gradients, None, None, None


forward_op = torch.library.custom_op("videomae::decoder_input", _forward, mutates_args=())
backward_op = torch.library.custom_op("videomae::decoder_input_backward", _backward, mutates_args=())
forward_op.register_fake(
    lambda visible, mask_token, positions, visible_index, masked_index: visible.new_empty(
        visible.shape[0], visible.shape[1] + masked_index.shape[1], visible.shape[2]
    )
)
backward_op.register_fake(
    lambda dout, num_visible, token_dtype: (
        dout.new_empty(dout.shape[0], num_visible, dout.shape[2]),
        dout.new_empty(dout.shape[2], dtype=token_dtype),
    )
)
forward_op.register_autograd(_autograd, setup_context=_setup)


def decoder_input(
    visible: Tensor, mask_token: Tensor, positions: Tensor, visible_index: Tensor, masked_index: Tensor
) -> Tensor:
    """The sequence [B, V + M, E] for the decoder, in the dtype of visible; differentiable in visible and mask_token.

    visible: [B, V, E], contiguous. mask_token: [E]. positions: [N, E], fixed. visible_index: integer [B, V].
    masked_index: integer [B, M]. A cube number outside [0, N) gives NaN on a GPU, and IndexError elsewhere.
    Raises ValueError when shapes, dtypes, devices or strides do not fit together.
    """
    check(visible.ndim == 3, f"visible must be [B, V, E]; got shape {tuple(visible.shape)}")
    _, num_visible, width = visible.shape
    check(mask_token.shape == (width,), f"mask_token must be ({width},); got {tuple(mask_token.shape)}")
    check(
        positions.ndim == 2 and positions.shape[1] == width,
        f"positions must be [N, {width}]; got {tuple(positions.shape)}",
    )
    check(not positions.requires_grad, "positions are fixed: a gradient for them is not computed")
    check_index(visible_index, "visible_index", visible)
    check_index(masked_index, "masked_index", visible)
    check(
        visible_index.shape[1] == num_visible,
        f"visible_index must be {tuple(visible.shape[:2])}; got {tuple(visible_index.shape)}",
    )
    check_contiguous(visible=visible, mask_token=mask_token, positions=positions)
    check_same_device(visible=visible, mask_token=mask_token, positions=positions)
    if not runs_triton(visible):
        return decoder_input_ref(visible, mask_token, positions, visible_index, masked_index)
    check_kernel_dtypes(visible=visible, mask_token=mask_token, positions=positions)
    small = max(positions.numel(), width * (num_visible + masked_index.shape[1])) < 2**31
    check(small, "positions and a clip's sequence must have fewer than 2^31 values: their offsets are 32 bits wide")
    return forward_op(visible, mask_token, positions, visible_index, masked_index)
