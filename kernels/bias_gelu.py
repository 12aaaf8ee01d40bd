"""Bias and exact GELU in one pass: y = gelu(x + b), gelu(z) = z * Phi(z) = z * (1 + erf(z / sqrt(2))) / 2.

x and y are [R, D], b is [D]; arithmetic is float32 whatever the storage dtype.
With u = |z| and t(u) = Phi(-u), gelu(z) = max(z, 0) - u t(u). t is exp2 of a polynomial: 25 instructions an entry less
than erf, which alone would take longer than the memory. Within 1.2e-7 of Phi and 3e-7 of gelu, as float32 erf is.
Forward moves 2RD elements where add-then-gelu moves 4RD; backward 3RD where eager moves 4RD.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check, check_contiguous, check_kernel_dtypes, check_same_device, launch, runs_triton
from kernels.tiles import Target, Tile, tile


def _forward_tile(target: Target, dtype: torch.dtype, D: int) -> Tile:
    """Two 16-byte loads in flight per thread, which hides memory's latency at full occupancy."""
    return {"ROWS": 4, "COLS": min(1024, triton.next_power_of_2(D)), "num_warps": 4}


def _backward_tile(target: Target, dtype: torch.dtype, D: int) -> Tile:
    """As forward, with half the columns: the sums of db take registers. PROGRAMS bounds the rows of partial sums."""
    return {"ROWS": 4, "COLS": min(512, triton.next_power_of_2(D)), "PROGRAMS": 4 * target.processors, "num_warps": 4}


def bias_gelu_ref(x: Tensor, b: Tensor) -> Tensor:
    """What the kernel must equal: the same formula in plain PyTorch, no lower than float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.gelu(x.to(wide) + b.to(wide)).to(x.dtype)


@triton.jit
def _tail(u):
    """Phi(-u) of u >= 0. Minimax fit of log2 Phi(-u) on [0, 8.5], weighted by Phi(-u); falls without end beyond it."""
    p = -1.0522334e-08
    p = p * u + 3.9795094e-07
    p = p * u - 6.2266731e-06
    p = p * u + 5.0705108e-05
    p = p * u - 1.9948366e-04
    p = p * u - 1.4645797e-04
    p = p * u + 7.1016015e-03
    p = p * u - 5.2530720e-02
    p = p * u - 4.5919573e-01
    p = p * u - 1.1511068e00
    p = p * u - 9.9999994e-01
    return tl.exp2(p)


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(x, b, y, R, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < R)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    z += tl.load(b + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    u = tl.abs(z)
    tl.store(y + at, tl.maximum(z, 0.0) - u * _tail(u), mask=inside)


@triton.jit(do_not_specialize=["R", "PROGRAMS"])
def _backward_kernel(dy, x, b, dx, db_part, R, D, PROGRAMS, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    bias = tl.load(b + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([COLS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(R, ROWS), PROGRAMS):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < R)[:, None] & (cols < D)[None, :]
        at = rows[:, None] * D + cols[None, :]
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + bias
        upstream = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        tail = _tail(tl.abs(z))
        cdf = tl.where(z < 0.0, tail, 1.0 - tail)
        pdf = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
        dz = upstream * (cdf + z * pdf)
        tl.store(dx + at, dz, mask=inside)
        total += tl.sum(dz, axis=0)
    # one row of partial sums per program, added up after the launch: no atomics, so the same bits every run
    tl.store(db_part + tl.program_id(0) * D + cols, total, mask=cols < D)


def _forward(x: Tensor, b: Tensor) -> Tensor:
    R, D = x.shape
    y = torch.empty_like(x)
    t = tile("bias_gelu.forward", _forward_tile, x.device, x.dtype, D=D)
    launch(_forward_kernel, (triton.cdiv(R, t["ROWS"]), triton.cdiv(D, t["COLS"])), x, b, y, R, D, **t)
    return y


def _backward(dy: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    R, D = x.shape
    t = dict(tile("bias_gelu.backward", _backward_tile, x.device, x.dtype, D=D))
    programs = min(t.pop("PROGRAMS"), triton.cdiv(R, t["ROWS"]))
    dx = torch.empty_like(x)
    db_part = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    launch(_backward_kernel, (programs, triton.cdiv(D, t["COLS"])), dy, x, b, dx, db_part, R, D, programs, **t)
    return dx, db_part.sum(0).to(b.dtype)


forward_op = torch.library.custom_op("videomae::bias_gelu", _forward, mutates_args=())
backward_op = torch.library.custom_op("videomae::bias_gelu_backward", _backward, mutates_args=())
forward_op.register_fake(lambda x, b: torch.empty_like(x))
backward_op.register_fake(lambda dy, x, b: (torch.empty_like(x), torch.empty_like(b)))
forward_op.register_autograd(
    lambda ctx, dy: backward_op(dy.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def bias_gelu(x: Tensor, b: Tensor) -> Tensor:
    """gelu(x + b) over the last axis, differentiable in both.

    x: [..., D], contiguous. b: [D]. Returns x's shape and dtype.
    Raises ValueError when b is not [D], x is not contiguous (call .contiguous() yourself: the copy is then visible), or
    devices or dtypes do not fit.
    """
    check(x.ndim > 0 and x.shape[-1] > 0, f"x must be [..., D], D at least 1; got shape {tuple(x.shape)}")
    check(b.shape == x.shape[-1:], f"b must be {tuple(x.shape[-1:])}, x's last axis; got {tuple(b.shape)}")
    check_contiguous(x=x, b=b)
    check_same_device(x=x, b=b)
    if not runs_triton(x):
        return bias_gelu_ref(x, b)
    check_kernel_dtypes(x=x, b=b)
    return forward_op(x.view(-1, x.shape[-1]), b).view(x.shape)
