"""Residual add and LayerNorm in one pass: s = x + residual, y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias.

x, residual, s and y are [R, D]; mean and variance (divisor D) run along D, in float32, and are kept for backward.
Forward moves 4RD elements where add-then-norm moves 5RD in two launches; backward 4RD (dy, ds, s in, dx out) where
norm-backward-then-add moves 6RD. Statistics are those of s as stored, which is what the rest of the network sees.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.launch import check, check_contiguous, check_kernel_dtypes, check_same_device, launch, runs_triton
from kernels.tiles import Target, Tile, tile


def _forward_tile(target: Target, dtype: torch.dtype, D: int) -> Tile:
    """A row over as many warps as give each thread 16 bytes; four rows share one load of weight and bias."""
    return {"ROWS": 4, "num_warps": min(8, max(1, triton.next_power_of_2(D) // 256))}


def _backward_tile(target: Target, dtype: torch.dtype, D: int) -> Tile:
    """As forward; of the widest rows two, since four spill on sm_120. PROGRAMS bounds the rows of partial sums."""
    rows = 4 if D <= 1024 else 2
    return _forward_tile(target, dtype, D) | {"ROWS": rows, "PROGRAMS": 4 * target.processors}


def layer_norm_ref(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What the kernel must equal: the sum, rounded to its dtype, then LayerNorm of it, no lower than float32."""
    s = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.nn.functional.layer_norm(s.to(wide), s.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype), s


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(x, residual, weight, bias, s, y, means, rstds, R, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        added = value.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        value = added.to(s.dtype.element_ty)
        tl.store(s + at, value, mask=inside)
    value = value.to(tl.float32)
    mean = tl.div_rn(tl.sum(value, axis=1), D * 1.0)  # rounded right: a constant row is 0 from its mean
    centred = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / D + eps)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(y + at, centred * rstd[:, None] * w[None, :] + b[None, :], mask=inside)
    tl.store(means + rows, mean, mask=rows < R)
    tl.store(rstds + rows, rstd, mask=rows < R)


@triton.jit(do_not_specialize=["R", "PROGRAMS"])
def _backward_kernel(
    dy, ds, s, weight, means, rstds, dx, part, R, D, PROGRAMS, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.arange(0, BLOCK)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(R, ROWS), PROGRAMS):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < R)[:, None] & (cols < D)[None, :]
        at = rows[:, None] * D + cols[None, :]
        upstream = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(s + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(means + rows, mask=rows < R, other=0.0)[:, None]
        rstd = tl.load(rstds + rows, mask=rows < R, other=0.0)[:, None]
        normed = tl.where(inside, (value - mean) * rstd, 0.0)
        weighted = upstream * w
        along = tl.sum(weighted * normed, axis=1)[:, None] / D
        level = tl.sum(weighted, axis=1)[:, None] / D
        gradient = rstd * (weighted - level - normed * along)
        if ds is not None:
            gradient += tl.load(ds + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, gradient, mask=inside)
        dw += tl.sum(upstream * normed, axis=0)
        db += tl.sum(upstream, axis=0)
    # one row of partial sums per program, added up after the launch: no atomics, so the same bits every run
    row = part + tl.program_id(0).to(tl.int64) * 2 * D
    tl.store(row + cols, dw, mask=cols < D)
    tl.store(row + D + cols, db, mask=cols < D)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s (empty without residual: it would be x again), mean and 1 / deviation of every row."""
    R, D = x.shape
    t = tile("layer_norm.forward", _forward_tile, x.device, x.dtype, D=D)
    y, mean = torch.empty_like(x), torch.empty(R, dtype=torch.float32, device=x.device)
    s, rstd = x.new_empty(0) if residual is None else torch.empty_like(x), torch.empty_like(mean)
    arguments = (x, residual, weight, bias, None if residual is None else s, y, mean, rstd, R, D, eps)
    launch(_forward_kernel, (triton.cdiv(R, t["ROWS"]),), *arguments, BLOCK=triton.next_power_of_2(D), **t)
    return y, s, mean, rstd


def _backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, which is the residual's gradient too, and [2, D]: the gradients of weight and bias."""
    R, D = s.shape
    t = dict(tile("layer_norm.backward", _backward_tile, s.device, s.dtype, D=D))
    programs = min(t.pop("PROGRAMS"), triton.cdiv(R, t["ROWS"]))
    dx = torch.empty_like(s)
    part = torch.empty(programs, 2, D, dtype=torch.float32, device=s.device)
    arguments = (dy, ds, s, weight, mean, rstd, dx, part, R, D, programs)
    launch(_backward_kernel, (programs,), *arguments, BLOCK=triton.next_power_of_2(D), **t)
    return dx, part.sum(0).to(weight.dtype)


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x.new_empty(0) if residual is None else torch.empty_like(x)
    row = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), s, row, torch.empty_like(row)


def _setup(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, _ = inputs
    _, s, mean, rstd = output
    ctx.summed = residual is not None  # type: ignore[attr-defined]
    ctx.bias_dtype = bias.dtype  # type: ignore[attr-defined]
    ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd(ctx: FunctionCtx, dy: Tensor | None, ds: Tensor | None, *_: None) -> tuple:
    summed = ctx.summed  # type: ignore[attr-defined]
    if dy is None:  # the norm was not used, the sum was
        return ds, ds, None, None, None
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, sums = backward_op(dy.contiguous(), ds.contiguous() if summed and ds is not None else None, *saved)
    return dx, dx if summed else None, sums[0], sums[1].to(ctx.bias_dtype), None  # type: ignore[attr-defined]


forward_op = torch.library.custom_op("videomae::layer_norm", _forward, mutates_args=())
backward_op = torch.library.custom_op("videomae::layer_norm_backward", _backward, mutates_args=())
forward_op.register_fake(_fake_forward)
backward_op.register_fake(
    lambda dy, ds, s, weight, mean, rstd: (torch.empty_like(s), weight.new_empty(2, *weight.shape))
)
forward_op.register_autograd(_autograd, setup_context=_setup)


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x + residual) over the last axis, and the sum itself; differentiable in all four.

    x, residual: [..., D], contiguous, of one dtype; without residual the sum is x. weight, bias: [D].
    Raises ValueError when shapes, dtypes, devices or strides do not fit.
    """
    width = tuple(x.shape[-1:])
    check(x.ndim > 0 and x.shape[-1] > 0, f"x must be [..., D], D at least 1; got shape {tuple(x.shape)}")
    check(tuple(weight.shape) == width, f"weight must be {width}, x's last axis; got {tuple(weight.shape)}")
    check(tuple(bias.shape) == width, f"bias must be {width}, x's last axis; got {tuple(bias.shape)}")
    if residual is not None:
        same = residual.shape == x.shape and residual.dtype == x.dtype
        received = f"{residual.dtype} {tuple(residual.shape)}"
        check(same, f"residual must be {x.dtype} {tuple(x.shape)}, as x; got {received}")
    check_contiguous(x=x, residual=residual, weight=weight, bias=bias)
    check_same_device(x=x, residual=residual, weight=weight, bias=bias)
    if not runs_triton(x):
        return layer_norm_ref(x, residual, weight, bias, eps)
    check_kernel_dtypes(x=x, weight=weight, bias=bias)
    flat = None if residual is None else residual.view(-1, *width)
    y, s, _, _ = forward_op(x.view(-1, *width), flat, weight, bias, eps)
    return y.view(x.shape), x if residual is None else s.view(x.shape)
