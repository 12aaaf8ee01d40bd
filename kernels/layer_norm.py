"""Residual add and LayerNorm in one pass: s = x + x_bias + residual, y = (s - mean) / sqrt(var + eps) * weight + bias.

x, residual, s and y are [R, D]; x_bias, that of the linear layer which made x, is [D]. s is summed in float32, rounded
once. Mean and variance (divisor D) run along D, in float32, and are kept for backward. They are those of s as stored,
which is what the rest of the network sees.
Forward moves 4RD elements where add-then-norm moves 5RD in two launches, x_bias added by the linear layer; backward 4RD
(dy, ds, s in, dx out) where norm-backward-then-add moves 6RD, and the sum over dx for dx_bias another RD.
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
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the kernel must equal: the sum, rounded to its dtype, then LayerNorm of it, no lower than float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x
    if residual is not None:
        s = x + residual if x_bias is None else (x + x_bias.to(wide)).add_(residual).to(x.dtype)
    y = torch.nn.functional.layer_norm(s.to(wide), s.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype), s


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    x, residual, weight, bias, x_bias, s, y, means, rstds, R, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        added = value.to(tl.float32)
        if x_bias is not None:
            added += tl.load(x_bias + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        added += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
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
    dy, ds, s, weight, means, rstds, dx, dw, db, dx_bias, R, D, PROGRAMS, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.arange(0, BLOCK)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    dw_sum = tl.zeros([BLOCK], tl.float32)
    db_sum = tl.zeros([BLOCK], tl.float32)
    dx_sum = tl.zeros([BLOCK], tl.float32)
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
        dw_sum += tl.sum(upstream * normed, axis=0)
        db_sum += tl.sum(upstream, axis=0)
        if dx_bias is not None:
            dx_sum += tl.sum(gradient, axis=0)
    # one row of partial sums per program, added up after the launch: no atomics, so the same bits every run
    at = tl.program_id(0).to(tl.int64) * D + cols
    tl.store(dw + at, dw_sum, mask=cols < D)
    tl.store(db + at, db_sum, mask=cols < D)
    if dx_bias is not None:
        tl.store(dx_bias + at, dx_sum, mask=cols < D)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s (empty without residual: it would be x again), mean and 1 / deviation of every row."""
    R, D = x.shape
    t = tile("layer_norm.forward", _forward_tile, x.device, x.dtype, D=D)
    y, mean = torch.empty_like(x), torch.empty(R, dtype=torch.float32, device=x.device)
    s, rstd = x.new_empty(0) if residual is None else torch.empty_like(x), torch.empty_like(mean)
    arguments = (x, residual, weight, bias, x_bias, None if residual is None else s, y, mean, rstd, R, D, eps)
    launch(_forward_kernel, (triton.cdiv(R, t["ROWS"]),), *arguments, BLOCK=triton.next_power_of_2(D), **t)
    return y, s, mean, rstd


def _backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, num_sums: int
) -> tuple[Tensor, Tensor]:
    """dx, which is the residual's gradient too, and [num_sums, D], float32: those of weight, bias and, of 3, x_bias."""
    R, D = s.shape
    t = dict(tile("layer_norm.backward", _backward_tile, s.device, s.dtype, D=D))
    programs = min(t.pop("PROGRAMS"), triton.cdiv(R, t["ROWS"]))
    dx = torch.empty_like(s)
    part = torch.empty(num_sums, programs, D, dtype=torch.float32, device=s.device)
    dw, db, dx_bias = (*part, None)[:3]
    arguments = (dy, ds, s, weight, mean, rstd, dx, dw, db, dx_bias, R, D, programs)
    launch(_backward_kernel, (programs,), *arguments, BLOCK=triton.next_power_of_2(D), **t)
    return dx, part.sum(1)


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, x_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x.new_empty(0) if residual is None else torch.empty_like(x)
    row = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), s, row, torch.empty_like(row)


def _setup(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, _, x_bias = inputs
    _, s, mean, rstd = output
    ctx.summed = residual is not None  # type: ignore[attr-defined]
    ctx.bias_dtype = bias.dtype  # type: ignore[attr-defined]
    ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype  # type: ignore[attr-defined]
    ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _autograd(ctx: FunctionCtx, dy: Tensor | None, ds: Tensor | None, *_: None) -> tuple:
    summed, bias_dtype, x_bias_dtype = ctx.summed, ctx.bias_dtype, ctx.x_bias_dtype  # type: ignore[attr-defined]
    if dy is None:  # the norm was not used, the sum was
        dx_bias = ds.sum(0, dtype=torch.float32).to(x_bias_dtype) if ds is not None and x_bias_dtype else None
        return ds, ds, None, None, None, dx_bias
    ds = ds.contiguous() if summed and ds is not None else None
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, sums = backward_op(dy.contiguous(), ds, *saved, 3 if x_bias_dtype else 2)
    dx_bias = sums[2].to(x_bias_dtype) if x_bias_dtype else None
    return dx, dx if summed else None, sums[0].to(saved[1].dtype), sums[1].to(bias_dtype), None, dx_bias


forward_op = torch.library.custom_op("videomae::layer_norm", _forward, mutates_args=())
backward_op = torch.library.custom_op("videomae::layer_norm_backward", _backward, mutates_args=())
forward_op.register_fake(_fake_forward)
backward_op.register_fake(
    lambda dy, ds, s, weight, mean, rstd, num_sums: (torch.empty_like(s), mean.new_empty(num_sums, *weight.shape))
)
forward_op.register_autograd(_autograd, setup_context=_setup)


def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x + x_bias + residual) over the last axis, and the sum itself; differentiable in all five.

    x, residual: [..., D], contiguous, of one dtype; without residual the sum is x. weight, bias: [D]. x_bias: [D], only
    beside a residual. x and residual get one tensor as their gradient: where both are leaves, do not add up a second.
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
    if x_bias is not None:
        check(residual is not None, "x_bias is added together with a residual; got none")
        check(tuple(x_bias.shape) == width, f"x_bias must be {width}, x's last axis; got {tuple(x_bias.shape)}")
    check_contiguous(x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    check_same_device(x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    if not runs_triton(x):
        return layer_norm_ref(x, residual, weight, bias, eps, x_bias)
    check_kernel_dtypes(x=x, weight=weight, bias=bias, x_bias=x_bias)
    flat = None if residual is None else residual.view(-1, *width)
    y, s, _, _ = forward_op(x.view(-1, *width), flat, weight, bias, eps, x_bias)
    return y.view(x.shape), x if residual is None else s.view(x.shape)
