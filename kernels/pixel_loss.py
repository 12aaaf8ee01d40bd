"""Mean error against the normalised pixels of the masked cubes, straight from uint8 frames.

Per masked cube and channel, over its P = dt*dy*dx pixels x in [0, 1]:
    target = (x - mean(x)) / (sqrt(var(x)) + 1e-6), var with divisor P - 1     (normalize=True; else target = x)
    loss   = scale * mean over clips, cubes and entries of e(pred - target)    (clips weighted where weight is given)
    e(d)   = d^2 ("mse"), |d| ("l1", of derivative 0 at 0), or, "smooth-l1", d^2 / 2 where |d| < 1, else |d| - 1/2
pred [B, M, P*C] is channel fastest: entry ((dt * 16 + dy) * 16 + dx) * C + c. Source: the official
engine_for_pretraining (RECIPES B); of the errors the published models have the first, an ablation the others.

The kernel reads the masked cubes' pixels and the predictions once from memory and writes the gradient: 5 bytes an entry
in bfloat16, 11 MB a clip, and no target. Sums over uint8 pixels are exact integers, so a constant cube gives 0.
"""

from collections.abc import Sequence
from math import gcd
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

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
    launch,
    runs_triton,
)
from kernels.tiles import Target, Tile, tile

Error = Literal["mse", "l1", "smooth-l1"]
ERRORS: tuple[str, ...] = get_args(Error)
EPS = 1e-6  # added to the standard deviation, outside the root
VECTOR = 8  # entries a thread holds together: 16 bytes of bfloat16 predictions, 8 bytes of pixels


def _loss_tile(target: Target, dtype: torch.dtype, K: int) -> Tile:
    """One warp for a cube: its sums need no shared memory, and 32 cubes in flight on a multiprocessor hide latency."""
    return {"num_warps": 1 if K <= 2048 else 4}


def _rescale_tile(target: Target, dtype: torch.dtype) -> Tile:
    return {"BLOCK": 4096, "PROGRAMS": 8 * target.processors, "num_warps": 4}


def pixel_target(
    frames: Tensor,
    masked: Tensor,
    cube: tuple[int, int, int],
    *,
    normalize: bool = True,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The target [B, M, P*C] of the loss; a fresh tensor without gradient. The kernel never stores it."""
    is_uint8 = frames.dtype == torch.uint8
    pixels = pick(cut(frames, cube), masked).to(dtype)  # [B, M, P, C], a copy: what follows works in place
    # uint8 stays on its 0-255 scale: sums of integers are exact in float32, so a constant cube gives 0 and not noise
    unit = 255.0 if is_uint8 else 1.0
    if not is_uint8:
        shift, scale = (channel_values(tuple(v), 1, dtype, pixels.device) for v in (mean, std))
        pixels = pixels * scale + shift
    if not normalize:
        return pixels.div_(unit).flatten(2)
    if not is_uint8:
        pixels -= pixels[:, :, :1].clone()  # for the same reason: equal numbers become 0
    pixels -= pixels.mean(dim=2, keepdim=True)
    deviation = torch.linalg.vector_norm(pixels, dim=2, keepdim=True) / (pixels.shape[2] - 1) ** 0.5
    return pixels.div_(deviation + EPS * unit).flatten(2)


def _errors(residual: Tensor, error: str) -> tuple[Tensor, Tensor, int]:
    """Sums of the errors of residual [B, M, K], [B, M]; their derivative, but for a factor, which is the third. Writes
    over residual."""
    if error == "mse":
        return torch.linalg.vector_norm(residual, dim=2).square(), residual, 2
    if error == "l1":
        return torch.linalg.vector_norm(residual, ord=1, dim=2), residual.sign_(), 1
    near = residual.clamp(-1, 1)
    beyond = residual.sub_(near)
    sums = torch.linalg.vector_norm(near, dim=2).square() / 2 + torch.linalg.vector_norm(beyond, ord=1, dim=2)
    return sums, near, 1


class _Error(torch.autograd.Function):
    """Mean error of each clip, [B]. Keeps the derivative, written over the target, and nothing else: mse_loss keeps
    both its inputs and makes two more of their size, which on a CPU costs a tenth of a ViT-S step in page faults. Of
    smooth-l1 forward needs one more, for a while."""

    @staticmethod
    def forward(ctx: FunctionCtx, pred: Tensor, target: Tensor, error: str) -> Tensor:
        sums, derivative, factor = _errors(target.sub_(pred), error)
        ctx.save_for_backward(derivative)
        ctx.dtype, ctx.factor = pred.dtype, factor  # type: ignore[attr-defined]
        return sums.mean(dim=1) / target.shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors  # type: ignore[attr-defined]
        # minus: it is that of target - pred
        factor = upstream * (-ctx.factor / (derivative.shape[1] * derivative.shape[2]))  # type: ignore[attr-defined]
        return (derivative * factor[:, None, None]).to(ctx.dtype), None, None  # type: ignore[attr-defined]


def pixel_loss_ref(
    pred: Tensor,
    frames: Tensor,
    masked: Tensor,
    cube: tuple[int, int, int],
    normalize: bool,
    weight: Tensor | None,
    scale: float | Tensor,
    mean: tuple,
    std: tuple,
    error: str = "mse",
) -> Tensor:
    """What the kernel must equal: the target in memory, then the mean error, no lower than float32."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    target = pixel_target(frames, masked, cube, normalize=normalize, mean=mean, std=std, dtype=wide)
    if weight is None:
        return _Error.apply(pred, target, error).mean() * scale
    # chosen before the difference: a clip without weight may hold inf or nan, and 0 * nan would reach every gradient
    chosen = torch.where((weight > 0)[:, None, None], pred, target.to(pred.dtype))
    per_clip = _Error.apply(chosen, target, error)
    total = weight.to(wide).sum()
    return (per_clip * weight.to(wide)).sum() / total.clamp_min(torch.finfo(wide).tiny) * scale


@triton.jit(do_not_specialize=["M", "N", "T", "H", "W", "GRID_H", "GRID_W"])
def _loss_kernel(
    pred, frames, masked, factor, scale, values, grad, part, constant, M, N, T, H, W, GRID_H, GRID_W,
    C: tl.constexpr, DT: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, NORMALIZE: tl.constexpr, ERROR: tl.constexpr,
    EPS: tl.constexpr, ALIGN: tl.constexpr, GROUPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One cube: its sums, its target, its error, its gradient."""
    P: tl.constexpr = DT * DY * DX
    K: tl.constexpr = P * C
    UINT8: tl.constexpr = frames.dtype.element_ty == tl.uint8
    row = tl.program_id(0).to(tl.int64)
    clip = (tl.program_id(0) // M).to(tl.int64)
    raw = tl.load(masked + row)
    known = (raw >= 0) & (raw < N)
    cube = tl.where(known, raw, 0).to(tl.int32)
    first = ((cube // (GRID_H * GRID_W)) * DT * H + (cube // GRID_W) % GRID_H * DY) * W + cube % GRID_W * DX
    pixels = frames + tl.multiple_of((clip * T * H * W + first) * C, ALIGN)

    # C tiles of VECTOR entries: entry e of tile q has channel (q * VECTOR + e) % C in every group, known to the
    # compiler, so that choosing by channel costs nothing at run time
    group = tl.arange(0, GROUPS)[:, None] * (C * VECTOR)
    entry = tl.arange(0, VECTOR)[None, :]
    tiles = ()
    for q in tl.static_range(C):
        k = group + (q * VECTOR + entry)
        run = k // (DX * C)  # pixels of one row of the cube lie together
        offset = ((run // DY) * H + run % DY) * (W * C) + k % (DX * C)
        offset = tl.max_contiguous(tl.multiple_of(offset, [1, ALIGN]), [1, ALIGN])
        if UINT8:
            tiles = tiles + (tl.load(pixels + offset, mask=k < K, other=0).to(tl.int32),)
        else:
            value = tl.load(pixels + offset, mask=k < K, other=0.0).to(tl.float32)
            channel = (q * VECTOR + entry) % C
            tiles = tiles + (value * tl.load(values + channel) + tl.load(values + C + channel),)

    # target = (value - shift) * rate, shift and rate per channel
    shifts = ()
    rates = ()
    if not NORMALIZE:
        for _ in tl.static_range(C):
            shifts = shifts + (tl.full((), 0.0, tl.float32),)
            rates = rates + (1.0 / 255.0 if UINT8 else 1.0,)
    elif UINT8:
        # in integers: P x - sum(x) and P sum(x^2) - sum(x)^2 are exact
        for c in tl.static_range(C):
            total = tl.zeros([GROUPS], tl.int32)
            squares = tl.zeros([GROUPS], tl.int32)
            for q in tl.static_range(C):
                value = tl.where((q * VECTOR + entry) % C == c, tiles[q], 0)
                total += tl.sum(value, axis=1)
                squares += tl.sum(value * value, axis=1)
            whole = tl.sum(total, axis=0)
            spread = P * tl.sum(squares, axis=0).to(tl.int64) - whole.to(tl.int64) * whole
            deviation = tl.sqrt_rn(spread.to(tl.float32) / (P * (P - 1.0)))
            shifts = shifts + (whole,)
            rates = rates + (1.0 / (P * (deviation + 255.0 * EPS)),)
        scaled = ()
        for q in tl.static_range(C):
            scaled = scaled + (tiles[q] * P,)
        tiles = scaled
    else:
        for c in tl.static_range(C):
            # from the first pixel: equal numbers give 0
            start = tl.load(pixels + c).to(tl.float32) * tl.load(values + c) + tl.load(values + C + c)
            total = tl.zeros([GROUPS], tl.float32)
            for q in tl.static_range(C):
                mine = ((q * VECTOR + entry) % C == c) & (group + (q * VECTOR + entry) < K)
                total += tl.sum(tl.where(mine, tiles[q] - start, 0.0), axis=1)
            mean = tl.sum(total, axis=0) / P
            squares = tl.zeros([GROUPS], tl.float32)
            for q in tl.static_range(C):
                mine = ((q * VECTOR + entry) % C == c) & (group + (q * VECTOR + entry) < K)
                off = tl.where(mine, (tiles[q] - start) - mean, 0.0)
                squares += tl.sum(off * off, axis=1)
            deviation = tl.sqrt_rn(tl.sum(squares, axis=0) / (P - 1.0))
            shifts = shifts + (start + mean,)
            rates = rates + (1.0 / (deviation + EPS),)

    share = constant
    if factor is not None:
        share *= tl.load(factor + clip)
    if scale is not None:
        share *= tl.load(scale).to(tl.float32)
    # a cube number outside [0, N) must not pass unnoticed
    share = tl.where(known, share, float("nan"))
    error = tl.zeros([GROUPS], tl.float32)
    for q in tl.static_range(C):
        k = group + (q * VECTOR + entry)
        shift = tl.zeros([1, VECTOR], shifts[0].dtype) + shifts[0]
        rate = tl.zeros([1, VECTOR], tl.float32) + rates[0]
        for c in tl.static_range(1, C):
            shift = tl.where((q * VECTOR + entry) % C == c, shifts[c], shift)
            rate = tl.where((q * VECTOR + entry) % C == c, rates[c], rate)
        target = (tiles[q] - shift).to(tl.float32) * rate
        difference = tl.load(pred + row * K + k, mask=k < K, other=0.0).to(tl.float32) - target
        difference = tl.where(k < K, difference, 0.0)
        size = tl.abs(difference)
        if ERROR == "mse":
            error += tl.sum(difference * difference, axis=1)
        elif ERROR == "l1":
            error += tl.sum(size, axis=1)
        else:
            error += tl.sum(tl.where(size < 1.0, 0.5 * difference * difference, size - 0.5), axis=1)
        if grad is not None:
            if ERROR == "mse":
                slope = difference * (2.0 * share)
            else:
                slope = tl.where(difference > 0.0, 1.0, 0.0) - tl.where(difference < 0.0, 1.0, 0.0)
                if ERROR == "smooth-l1":
                    slope = tl.where(size >= 1.0, slope, difference)
                slope *= share
            # a clip without weight may hold inf or nan: 0 * nan would reach every gradient
            slope = tl.where(share == 0.0, 0.0, slope)
            tl.store(grad + row * K + k, slope, mask=k < K)
    tl.store(part + row, tl.where(share == 0.0, 0.0, tl.sum(error, axis=0) * share))


@triton.jit(do_not_specialize=["BLOCKS", "PROGRAMS"])
def _rescale_kernel(grad, upstream, SIZE, BLOCKS, PROGRAMS, BLOCK: tl.constexpr):
    """grad *= upstream, in place; nothing is read or written where upstream is 1."""
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        for block in range(tl.program_id(0), BLOCKS, PROGRAMS):
            at = tl.full((), BLOCK, tl.int64) * block + tl.arange(0, BLOCK)
            value = tl.load(grad + at, mask=at < SIZE, other=0.0).to(tl.float32)
            tl.store(grad + at, value * factor, mask=at < SIZE)


def _forward(
    pred: Tensor,
    frames: Tensor,
    masked: Tensor,
    factor: Tensor | None,
    scale: Tensor | None,
    values: Tensor | None,
    cube: Sequence[int],
    normalize: bool,
    error: str,
    number: float,
    write_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in pred, empty unless asked for. A clip counts constant * factor[clip] * scale."""
    (B, T, H, W, C), (M, K), (dt, dy, dx) = frames.shape, pred.shape[1:], cube
    grid = (T // dt, H // dy, W // dx)
    part = torch.empty(B * M, dtype=torch.float32, device=pred.device)
    grad = torch.empty_like(pred) if write_gradient else pred.new_empty(0)
    constant = number * (1 if factor is None else B) / max(1, pred.numel())
    constants = {"C": C, "DT": dt, "DY": dy, "DX": dx, "NORMALIZE": normalize, "ERROR": error}
    constants |= {"EPS": EPS, "VECTOR": VECTOR, "ALIGN": gcd(VECTOR, dx * C, W * C)}
    constants["GROUPS"] = triton.next_power_of_2(triton.cdiv(K, VECTOR * C))
    tensors = (pred, frames, masked, factor, scale, values, grad if write_gradient else None, part)
    sizes = (constant, M, grid[0] * grid[1] * grid[2], T, H, W, grid[1], grid[2])
    launch(
        _loss_kernel,
        (B * M,),
        *tensors,
        *sizes,
        **constants,
        **tile("pixel_loss", _loss_tile, pred.device, pred.dtype, K=K),
    )
    return part.sum(), grad


def _rescale(grad: Tensor, upstream: Tensor) -> None:
    t = dict(tile("pixel_loss.rescale", _rescale_tile, grad.device, grad.dtype))
    blocks = triton.cdiv(grad.numel(), t["BLOCK"])
    programs = min(t.pop("PROGRAMS"), blocks)
    launch(_rescale_kernel, (programs,), grad, upstream, grad.numel(), blocks, programs, **t)


forward_op = torch.library.custom_op("videomae::pixel_loss", _forward, mutates_args=())
rescale_op = torch.library.custom_op("videomae::pixel_loss_rescale", _rescale, mutates_args=("grad",))
forward_op.register_fake(
    lambda pred, frames, masked, factor, scale, values, cube, normalize, error, number, write_gradient: (
        pred.new_empty((), dtype=torch.float32),
        torch.empty_like(pred) if write_gradient else pred.new_empty(0),
    )
)
rescale_op.register_fake(lambda grad, upstream: None)


def _version(x: Tensor) -> int:
    """How often x was written to; torch.compile has no such count, and runs a backward pass once."""
    return 0 if torch.compiler.is_compiling() else x._version


class _Loss(torch.autograd.Function):
    """forward_op with its backward. Not registered with the op: there the gradient would be an output, which a compiled
    backward may not write to."""

    @staticmethod
    def forward(ctx: FunctionCtx, pred: Tensor, *arguments: object) -> Tensor:
        loss, grad = forward_op(pred, *arguments, True)
        ctx.save_for_backward(grad)
        ctx.version = _version(grad)  # type: ignore[attr-defined]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple:
        (grad,) = ctx.saved_tensors  # type: ignore[attr-defined]
        # the gradient itself is handed out, not a copy: a second backward through one graph is therefore refused, here
        # where saved-tensor hooks hide it from autograd
        if _version(grad) != ctx.version:  # type: ignore[attr-defined]
            raise RuntimeError("pixel_loss hands out its gradient once: it was modified by an inplace operation since")
        rescale_op(grad, upstream)
        return grad, *[None] * 9


def pixel_loss(
    pred: Tensor,
    frames: Tensor,
    masked: Tensor,
    normalize: bool = True,
    *,
    cube: tuple[int, int, int] = (2, 16, 16),
    weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    error: Error = "mse",
) -> Tensor:
    """The loss, a scalar of at least float32, differentiable in pred, once for every forward.

    pred: float [B, M, dt*dy*dx*C], channel fastest. frames: uint8 [B, T, H, W, C], or floating point, normalised with
    mean and std.
    masked: integer [B, M]; a cube number outside [0, N) gives NaN on a GPU, and IndexError elsewhere.
    weight: [B], not negative; the loss is then the weighted mean over clips, and 0 when all weights are 0.
    scale: a factor (accumulation, loss scaling), a number or a scalar tensor; it enters before the gradient is rounded.
    error: of an entry, see the top.
    A kernel writes the gradient in forward, if one is needed; backward hands it out as it is where upstream is 1.
    Raises ValueError when shapes and devices do not fit together, or a cube has a single pixel to normalise.
    """
    check(error in ERRORS, f"error must be one of {', '.join(ERRORS)}; got {error!r}")
    check_frames(frames, cube)
    check_index(masked, "masked", frames)
    pixels = cube[0] * cube[1] * cube[2]
    check(pixels > 1 or not normalize, "a cube of one pixel has no variance: use normalize=False")
    wanted = (*masked.shape, pixels * frames.shape[-1])
    check(tuple(pred.shape) == wanted, f"pred must be {wanted} for cube {tuple(cube)}; got {tuple(pred.shape)}")
    check(pred.dtype.is_floating_point, f"pred must be floating point; got {pred.dtype}")
    check(pred.device == frames.device, f"pred is on {pred.device}, the frames on {frames.device}")
    if weight is not None:
        wanted = tuple(frames.shape[:1])
        check(tuple(weight.shape) == wanted, f"weight must be {wanted}; got {tuple(weight.shape)}")
        check(not weight.requires_grad, "weight is fixed: a gradient for it is not computed")
    channels = frames.shape[-1]
    check(len(mean) == len(std) == channels, f"mean and std must have {channels} channels; got {mean} and {std}")
    number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    if tensor is not None:
        check(tensor.numel() == 1, f"scale must be one number; got shape {tuple(tensor.shape)}")
        check(not tensor.requires_grad, "scale is fixed: a gradient for it is not computed")
        scale = tensor = tensor.reshape(())
    check_contiguous(pred=pred, weight=weight)
    check_same_device(frames=frames, weight=weight, scale=tensor)
    if not runs_triton(pred):
        return pixel_loss_ref(pred, frames, masked, cube, normalize, weight, scale, mean, std, error)
    check_kernel_dtypes(pred=pred, frames=None if frames.dtype == torch.uint8 else frames)
    # sums of squares of more pixels would not fit 32 bits
    check(pixels <= 32768, f"a cube must have at most 32768 pixels to run the kernel; got {tuple(cube)}")
    factor = values = None
    if weight is not None:
        factor = weight.float() / weight.float().sum().clamp_min(torch.finfo(torch.float32).tiny)
    if frames.dtype != torch.uint8:
        values = channel_values((*std, *mean), 1, torch.float32, pred.device)
    arguments = (pred, frames, masked, factor, tensor, values, cube, normalize, error, number)
    if torch.is_grad_enabled() and pred.requires_grad:
        return _Loss.apply(*arguments)
    return forward_op(*arguments, False)[0]
