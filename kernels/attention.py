"""Joint space-time attention over the visible sequence, read from packed qkv and written packed: no transposes.

out[b, i, a] = sum over j of softmax_j(q[b, i, a] . k[b, j, a] * scale) v[b, j, a]
qkv is [B, V, 3, A, d] as one linear layer gives it, out is [B, V, A * d], scale is d^-0.5. Softmax and sums in float32.

At V = 160 and d = 64 a head moves 82 KB and does 6.6 MFLOP forward, 164 KB and 16 MFLOP backward: bound by memory on
a Hopper GPU, so what counts is to read everything once. Up to 256 tokens one program does the whole backward of a head:
all queries stay on chip, key blocks pass by, and nothing is added up across programs. Longer sequences take a program
per block of rows, which sums either dq over keys or dk and dv over queries, and computes the scores twice.
A head width that is no power of two is split into the largest one below it and the rest: 80 = 64 + 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.launch import check, check_contiguous, check_kernel_dtypes, dot_precision, launch, runs_triton
from kernels.tiles import Target, Tile, tile

LOG2_E = 1.4426950408889634


def _forward_tile(target: Target, dtype: torch.dtype, V: int, d: int) -> Tile:
    """A program per ROWS queries; COLS keys at a time."""
    if dtype == torch.float32:
        return {"ROWS": 64, "COLS": 32, "num_warps": 8, "num_stages": 2}
    return {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 2}


def _backward_tile(target: Target, dtype: torch.dtype, V: int, d: int) -> Tile:
    """ROWS >= V: one program per head, COLS keys at a time. ROWS < V: programs per block of rows.

    As large as registers allow without a spill, which differs between wgmma (90), tcgen05 (100) and mma.sync (the
    others, with less shared memory besides); bench/results/kernels_aot.md has the counts.
    """
    whole = max(64, triton.next_power_of_2(V))
    if dtype == torch.float32:
        return {"ROWS": 32 if d <= 96 else 16, "COLS": 32, "num_warps": 8, "num_stages": 1}
    if target.capability not in (90, 100, 103):
        if whole <= 128:
            return {"ROWS": whole, "COLS": 16, "num_warps": 8, "num_stages": 1}
        return {"ROWS": 32, "COLS": 64 if d <= 64 else 32, "num_warps": 4, "num_stages": 1}
    if whole <= (256 if d <= (96 if target.capability == 90 else 64) else 128):
        warps = 8 if whole == 256 or d > 64 else 4
        return {"ROWS": whole, "COLS": 32, "num_warps": warps, "num_stages": 1}
    warps = 8 if d > 96 and target.capability == 90 else 4
    return {"ROWS": 64, "COLS": 64 if d <= 64 or target.capability != 90 else 32, "num_warps": warps, "num_stages": 1}


def attention_ref(qkv: Tensor) -> Tensor:
    """What the kernel must equal: softmax attention written out, no lower than float32."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).permute(2, 0, 3, 1, 4)  # each [B, A, V, d]
    weights = (q @ k.transpose(-2, -1) * qkv.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


@triton.jit
def _block(base, rows, stride, cols, V, d: tl.constexpr):
    """[rows, cols] of a head's tokens, zero outside."""
    inside = (rows < V)[:, None] & (cols < d)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, stride, cols, V, d: tl.constexpr, value):
    tl.store(base + rows[:, None] * stride + cols[None, :], value, mask=(rows < V)[:, None] & (cols < d)[None, :])


@triton.jit(do_not_specialize=["V", "heads"])
def _forward_kernel(
    qkv, out, lse, V, heads, scale, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(V, ROWS)
    pair = tl.program_id(0) // blocks  # clip and head
    clip, head = (pair // heads).to(tl.int64), pair % heads
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    cols0, cols1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 1)
    stride = 3 * heads * d
    base = qkv + clip * V * stride + head * d
    q0 = _block(base, rows, stride, cols0, V, d)
    acc0 = tl.zeros([ROWS, D0], tl.float32)
    if D1:
        q1 = _block(base, rows, stride, cols1, V, d)
        acc1 = tl.zeros([ROWS, D1], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, V, COLS):
        keys = start + tl.arange(0, COLS)
        scores = tl.dot(q0, tl.trans(_block(base + heads * d, keys, stride, cols0, V, d)), input_precision=PRECISION)
        if D1:
            k1 = _block(base + heads * d, keys, stride, cols1, V, d)
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        scores = tl.where((keys < V)[None, :], scores * scale, float("-inf"))  # scale holds log2(e)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, axis=1)
        weights = weights.to(out.dtype.element_ty)
        v0 = _block(base + 2 * heads * d, keys, stride, cols0, V, d)
        acc0 = tl.dot(weights, v0, acc0 * fade[:, None], input_precision=PRECISION)
        if D1:
            v1 = _block(base + 2 * heads * d, keys, stride, cols1, V, d)
            acc1 = tl.dot(weights, v1, acc1 * fade[:, None], input_precision=PRECISION)
        top = higher
    target = out + clip * V * heads * d + head * d
    _store(target, rows, heads * d, cols0, V, d, acc0 / total[:, None])
    if D1:
        _store(target, rows, heads * d, cols1, V, d, acc1 / total[:, None])
    tl.store(lse + pair.to(tl.int64) * V + rows, top + tl.log2(total), mask=rows < V)


@triton.jit
def _weights(q0, q1, k0, k1, do0, do1, v0, v1, level, delta, keys, V, scale, D1: tl.constexpr, PRECISION: tl.constexpr):
    """softmax weights p [queries, keys], and ds: the gradient of the scores."""
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
    if D1:
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
        dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
    p = tl.exp2(scores * scale - level[:, None])
    p = tl.where((keys < V)[None, :], p, 0.0)
    return p.to(k0.dtype), (p * (dp - delta[:, None])).to(k0.dtype)


@triton.jit(do_not_specialize=["V", "heads"])
def _whole_backward_kernel(
    qkv, out, dout, lse, dqkv, V, heads, scale, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One head of one clip: all queries on chip, keys COLS at a time."""
    pair = tl.program_id(0)
    clip, head = (pair // heads).to(tl.int64), pair % heads
    rows = tl.arange(0, ROWS)
    cols0, cols1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 1)
    stride, width = 3 * heads * d, heads * d
    base, dbase = qkv + clip * V * stride + head * d, dqkv + clip * V * stride + head * d
    obase, dobase = out + clip * V * width + head * d, dout + clip * V * width + head * d
    natural = scale * 0.6931471805599453  # scale holds log2(e)
    q0, do0 = _block(base, rows, stride, cols0, V, d), _block(dobase, rows, width, cols0, V, d)
    delta = tl.sum(do0.to(tl.float32) * _block(obase, rows, width, cols0, V, d).to(tl.float32), axis=1)
    dq0 = tl.zeros([ROWS, D0], tl.float32)
    q1, do1 = q0, do0
    if D1:
        q1, do1 = _block(base, rows, stride, cols1, V, d), _block(dobase, rows, width, cols1, V, d)
        delta += tl.sum(do1.to(tl.float32) * _block(obase, rows, width, cols1, V, d).to(tl.float32), axis=1)
        dq1 = tl.zeros([ROWS, D1], tl.float32)
    # rows past the end get weight 0
    level = tl.load(lse + pair.to(tl.int64) * V + rows, mask=rows < V, other=float("inf"))
    for start in range(0, V, COLS):
        keys = start + tl.arange(0, COLS)
        k0, v0 = _block(base + width, keys, stride, cols0, V, d), _block(base + 2 * width, keys, stride, cols0, V, d)
        k1, v1 = k0, v0
        if D1:
            k1 = _block(base + width, keys, stride, cols1, V, d)
            v1 = _block(base + 2 * width, keys, stride, cols1, V, d)
        p, ds = _weights(q0, q1, k0, k1, do0, do1, v0, v1, level, delta, keys, V, scale, D1, PRECISION)
        # transposed, so that the head width is the tall side, as the tensor cores want it
        dv0 = tl.dot(tl.trans(do0), p, input_precision=PRECISION)
        dk0 = tl.dot(tl.trans(q0), ds, input_precision=PRECISION) * natural
        _store(dbase + 2 * width, keys, stride, cols0, V, d, tl.trans(dv0))
        _store(dbase + width, keys, stride, cols0, V, d, tl.trans(dk0))
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1:
            dv1 = tl.dot(tl.trans(do1), p, input_precision=PRECISION)
            dk1 = tl.dot(tl.trans(q1), ds, input_precision=PRECISION) * natural
            _store(dbase + 2 * width, keys, stride, cols1, V, d, tl.trans(dv1))
            _store(dbase + width, keys, stride, cols1, V, d, tl.trans(dk1))
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    _store(dbase, rows, stride, cols0, V, d, dq0 * natural)
    if D1:
        _store(dbase, rows, stride, cols1, V, d, dq1 * natural)


@triton.jit(do_not_specialize=["V", "heads"])
def _blocked_backward_kernel(
    qkv, out, dout, lse, dqkv, V, heads, scale, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Even programs: dq of ROWS queries, COLS keys at a time. Odd ones: dk, dv of ROWS keys, COLS queries at a time."""
    blocks = tl.cdiv(V, ROWS)
    job = tl.program_id(0) // 2
    pair = job // blocks
    clip, head = (pair // heads).to(tl.int64), pair % heads
    rows = job % blocks * ROWS + tl.arange(0, ROWS)
    cols0, cols1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 else 1)
    stride, width = 3 * heads * d, heads * d
    base, dbase = qkv + clip * V * stride + head * d, dqkv + clip * V * stride + head * d
    obase, dobase = out + clip * V * width + head * d, dout + clip * V * width + head * d
    levels = lse + pair.to(tl.int64) * V
    natural = scale * 0.6931471805599453  # scale holds log2(e)
    acc0, other0 = tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D0], tl.float32)
    if D1:
        acc1, other1 = tl.zeros([ROWS, D1], tl.float32), tl.zeros([ROWS, D1], tl.float32)
    if tl.program_id(0) % 2 == 0:
        q0, do0 = _block(base, rows, stride, cols0, V, d), _block(dobase, rows, width, cols0, V, d)
        delta = tl.sum(do0.to(tl.float32) * _block(obase, rows, width, cols0, V, d).to(tl.float32), axis=1)
        q1, do1 = q0, do0
        if D1:
            q1, do1 = _block(base, rows, stride, cols1, V, d), _block(dobase, rows, width, cols1, V, d)
            delta += tl.sum(do1.to(tl.float32) * _block(obase, rows, width, cols1, V, d).to(tl.float32), axis=1)
        level = tl.load(levels + rows, mask=rows < V, other=float("inf"))
        for start in range(0, V, COLS):
            keys = start + tl.arange(0, COLS)
            k0 = _block(base + width, keys, stride, cols0, V, d)
            v0 = _block(base + 2 * width, keys, stride, cols0, V, d)
            k1, v1 = k0, v0
            if D1:
                k1 = _block(base + width, keys, stride, cols1, V, d)
                v1 = _block(base + 2 * width, keys, stride, cols1, V, d)
            _, ds = _weights(q0, q1, k0, k1, do0, do1, v0, v1, level, delta, keys, V, scale, D1, PRECISION)
            acc0 = tl.dot(ds, k0, acc0, input_precision=PRECISION)
            if D1:
                acc1 = tl.dot(ds, k1, acc1, input_precision=PRECISION)
        _store(dbase, rows, stride, cols0, V, d, acc0 * natural)
        if D1:
            _store(dbase, rows, stride, cols1, V, d, acc1 * natural)
    else:
        k0 = _block(base + width, rows, stride, cols0, V, d)
        v0 = _block(base + 2 * width, rows, stride, cols0, V, d)
        k1, v1 = k0, v0
        if D1:
            k1 = _block(base + width, rows, stride, cols1, V, d)
            v1 = _block(base + 2 * width, rows, stride, cols1, V, d)
        for start in range(0, V, COLS):
            queries = start + tl.arange(0, COLS)
            q0, do0 = _block(base, queries, stride, cols0, V, d), _block(dobase, queries, width, cols0, V, d)
            delta = tl.sum(do0.to(tl.float32) * _block(obase, queries, width, cols0, V, d).to(tl.float32), axis=1)
            q1, do1 = q0, do0
            if D1:
                q1, do1 = _block(base, queries, stride, cols1, V, d), _block(dobase, queries, width, cols1, V, d)
                delta += tl.sum(do1.to(tl.float32) * _block(obase, queries, width, cols1, V, d).to(tl.float32), axis=1)
            level = tl.load(levels + queries, mask=queries < V, other=float("inf"))
            p, ds = _weights(q0, q1, k0, k1, do0, do1, v0, v1, level, delta, rows, V, scale, D1, PRECISION)
            acc0 = tl.dot(tl.trans(p), do0, acc0, input_precision=PRECISION)
            other0 = tl.dot(tl.trans(ds), q0, other0, input_precision=PRECISION)
            if D1:
                acc1 = tl.dot(tl.trans(p), do1, acc1, input_precision=PRECISION)
                other1 = tl.dot(tl.trans(ds), q1, other1, input_precision=PRECISION)
        _store(dbase + 2 * width, rows, stride, cols0, V, d, acc0)
        _store(dbase + width, rows, stride, cols0, V, d, other0 * natural)
        if D1:
            _store(dbase + 2 * width, rows, stride, cols1, V, d, acc1)
            _store(dbase + width, rows, stride, cols1, V, d, other1 * natural)


def _constants(qkv: Tensor) -> dict[str, int | str]:
    d = qkv.shape[4]
    first = max(16, 1 << (d.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(d - first)) if d > first else 0
    return {"d": d, "D0": first, "D1": rest, "PRECISION": dot_precision(qkv.dtype)}


def _forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """out, and the logarithm (base 2) of the sum of exponentials of every query's scores, float32 [B, A, V]."""
    B, V, _, A, d = qkv.shape
    t = tile("attention.forward", _forward_tile, qkv.device, qkv.dtype, V=V, d=d)
    out = qkv.new_empty(B, V, A * d)
    lse = torch.empty(B, A, V, dtype=torch.float32, device=qkv.device)
    grid = (B * A * triton.cdiv(V, t["ROWS"]),)
    launch(_forward_kernel, grid, qkv, out, lse, V, A, LOG2_E * d**-0.5, **_constants(qkv), **t)
    return out, lse


def _backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    B, V, _, A, d = qkv.shape
    t = tile("attention.backward", _backward_tile, qkv.device, qkv.dtype, V=V, d=d)
    dqkv = torch.empty_like(qkv)
    whole = t["ROWS"] >= V
    kernel = _whole_backward_kernel if whole else _blocked_backward_kernel
    grid = (B * A if whole else 2 * B * A * triton.cdiv(V, t["ROWS"]),)
    launch(kernel, grid, qkv, out, dout, lse, dqkv, V, A, LOG2_E * d**-0.5, **_constants(qkv), **t)
    return dqkv


def _setup(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a gradient of zeros would be made for the second output
    ctx.save_for_backward(*inputs, *output)


forward_op = torch.library.custom_op("videomae::attention", _forward, mutates_args=())
backward_op = torch.library.custom_op("videomae::attention_backward", _backward, mutates_args=())
forward_op.register_fake(
    lambda qkv: (
        qkv.new_empty(*qkv.shape[:2], qkv.shape[3] * qkv.shape[4]),
        qkv.new_empty(qkv.shape[0], qkv.shape[3], qkv.shape[1], dtype=torch.float32),
    )
)
backward_op.register_fake(lambda dout, qkv, out, lse: torch.empty_like(qkv))
forward_op.register_autograd(
    lambda ctx, dout, _: backward_op(dout.contiguous(), *ctx.saved_tensors), setup_context=_setup
)


def attention(qkv: Tensor) -> Tensor:
    """Self-attention [B, V, A * d] of packed qkv [B, V, 3, A, d], contiguous; differentiable. Scores times d^-0.5.

    Raises ValueError when qkv has another shape, dtype or strides, or heads wider than 128.
    """
    check(qkv.ndim == 5 and qkv.shape[2] == 3, f"qkv must be [B, V, 3, A, d]; got shape {tuple(qkv.shape)}")
    check(1 <= qkv.shape[4] <= 128, f"heads must be 1 to 128 wide; got {qkv.shape[4]}")
    check_contiguous(qkv=qkv)
    if not runs_triton(qkv):
        return attention_ref(qkv)
    check_kernel_dtypes(qkv=qkv)
    check(qkv[:1].numel() < 2**31, f"a clip must have fewer than 2^31 values; got {tuple(qkv.shape[1:])}")
    return forward_op(qkv)[0]
