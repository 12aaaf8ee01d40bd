"""q, k and v as views of packed qkv, with a backward pass that joins their gradients and sums them for the bias.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]            views, [B, L, A, d]
    dqkv    = dq, dk, dv side by side in one tensor, as a matrix product's backward pass wants them
    dbias   = sum of dqkv over B and L

Left to autograd, the join is a copy, and the sum for the bias' gradient reads all of it again in a kernel of its own.
Here both are one pass: 6 elements a channel and token move instead of 9. With `last` only the last so many tokens ask,
q is [B, last, A, d], and the gradient of the others' queries is zero, written in the same pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.launch import check, check_contiguous, check_kernel_dtypes, check_same_device, launch, runs_triton
from kernels.tiles import Target, Tile, tile


def _join_tile(target: Target, dtype: torch.dtype, D: int) -> Tile:
    """16 bytes a thread, four rows of a part at once. PROGRAMS, a third for each part, bounds the partial sums."""
    block = triton.next_power_of_2(D)
    return {"ROWS": 4, "num_warps": min(8, max(1, block // 256)), "PROGRAMS": 2 * target.processors}


def join_heads_ref(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel must equal: dqkv [B, L, 3, A, d], and its sums [3 * A * d], no lower than float32."""
    missing = dk.shape[1] - dq.shape[1]
    if missing:
        dq = torch.nn.functional.pad(dq, (0, 0, 0, 0, missing, 0))
    dqkv = torch.stack((dq, dk, dv), dim=2)
    return dqkv, dqkv.flatten(2).sum(dim=(0, 1), dtype=torch.promote_types(dqkv.dtype, torch.float32))


@triton.jit
def _part(grad, clip, token, cols, rows_inside, B_STRIDE, L_STRIDE, A_STRIDE, D, d: tl.constexpr):
    """[rows, cols] of one gradient, zero outside."""
    inside = rows_inside[:, None] & (cols < D)[None, :]
    at = clip[:, None] * B_STRIDE + token.to(tl.int64)[:, None] * L_STRIDE + (cols // d * A_STRIDE + cols % d)[None, :]
    return tl.load(grad + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["R", "L", "LAST", "PROGRAMS"])
def _join_kernel(
    dq, dk, dv, dqkv, part, R, L, LAST, D,
    Q_B, Q_L, Q_A, K_B, K_L, K_A, V_B, V_L, V_A,
    PROGRAMS, d: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which, program = tl.program_id(1), tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(program, tl.cdiv(R, ROWS), PROGRAMS):
        rows = block * ROWS + tl.arange(0, ROWS)
        clip, token = (rows // L).to(tl.int64), rows % L
        if which == 0:  # token L - LAST is the first that asks
            asks = (rows < R) & (token >= L - LAST)
            value = _part(dq, clip, token - (L - LAST), cols, asks, Q_B, Q_L, Q_A, D, d)
        elif which == 1:
            value = _part(dk, clip, token, cols, rows < R, K_B, K_L, K_A, D, d)
        else:
            value = _part(dv, clip, token, cols, rows < R, V_B, V_L, V_A, D, d)
        at = rows.to(tl.int64)[:, None] * (3 * D) + which * D + cols[None, :]
        tl.store(dqkv + at, value, mask=(rows < R)[:, None] & (cols < D)[None, :])
        total += tl.sum(value.to(tl.float32), axis=0)
    # one row of partial sums per program, added up after the launch: no atomics, so the same bits every run
    tl.store(part + program * (3 * D) + which * D + cols, total, mask=cols < D)


def _join(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    (B, L, A, d), last = dk.shape, dq.shape[1]
    D = A * d
    t = dict(tile("split_heads.backward", _join_tile, dk.device, dk.dtype, D=D))
    programs = max(1, min(t.pop("PROGRAMS"), triton.cdiv(B * L, t["ROWS"])))
    dqkv = torch.empty(B, L, 3, A, d, dtype=dk.dtype, device=dk.device)
    part = torch.empty(programs, 3 * D, dtype=torch.float32, device=dk.device)
    # the width of a head is what the kernel reads at once
    parts = [x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, dv)]
    strides = [stride for x in parts for stride in x.stride()[:3]]
    arguments = (*parts, dqkv, part, B * L, L, last, D, *strides, programs)
    launch(_join_kernel, (programs, 3), *arguments, d=d, BLOCK=triton.next_power_of_2(D), **t)
    return dqkv, part.sum(0)


join_op = torch.library.custom_op("videomae::join_heads", _join, mutates_args=())
join_op.register_fake(
    lambda dq, dk, dv: (
        dk.new_empty(*dk.shape[:2], 3, *dk.shape[2:]),
        dk.new_empty(3 * dk.shape[2] * dk.shape[3], dtype=torch.float32),
    )
)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, bias: Tensor, last: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.bias_dtype, ctx.sizes = bias.dtype, qkv.shape  # type: ignore[attr-defined]
        q, k, v = qkv.unbind(2)
        return q[:, qkv.shape[1] - last :], k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
        dqkv, sums = join_op(dq, dk, dv) if runs_triton(dk) else join_heads_ref(dq, dk, dv)
        return dqkv, sums.to(ctx.bias_dtype), None  # type: ignore[attr-defined]


def split_heads(qkv: Tensor, bias: Tensor, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, L or last, A, d], k and v [B, L, A, d]: views of qkv, differentiable in qkv and bias.

    qkv: [B, L, 3, A, d], contiguous. bias: [3 * A * d], which the linear layer that made qkv has added already, from a
    detached copy: its gradient comes from here. last: only the last so many tokens ask; 1 to L.
    Raises ValueError when shapes, dtypes, devices or strides do not fit.
    """
    check(qkv.ndim == 5 and qkv.shape[2] == 3, f"qkv must be [B, L, 3, A, d]; got shape {tuple(qkv.shape)}")
    wanted = (3 * qkv.shape[3] * qkv.shape[4],)
    check(tuple(bias.shape) == wanted, f"bias must be {wanted}; got {tuple(bias.shape)}")
    length = qkv.shape[1]
    check(last is None or 1 <= last <= length, f"last must be 1 to {tuple(qkv.shape[1:2])} tokens; got {last}")
    check_contiguous(qkv=qkv, bias=bias)
    check_same_device(qkv=qkv, bias=bias)
    if runs_triton(qkv):
        check_kernel_dtypes(qkv=qkv, bias=bias)
        small = qkv.shape[0] * length < 2**31
        check(small, "tokens must number fewer than 2^31: their numbers are 32 bits wide")
    return _Split.apply(qkv, bias, length if last is None else last)
