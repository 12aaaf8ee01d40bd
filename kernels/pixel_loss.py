"""Mean squared error against the normalised pixels of the masked cubes, straight from uint8 frames.

Per masked cube and channel, over its P = dt*dy*dx pixels x in [0, 1]:
    target = (x - mean(x)) / (sqrt(var(x)) + 1e-6), var with divisor P - 1     (normalize=True; else target = x)
    loss   = scale * mean over clips, cubes and entries of (pred - target)^2   (clips weighted where weight is given)
pred [B, M, P*C] is channel fastest: entry ((dt * 16 + dy) * 16 + dx) * C + c. Source: the official
engine_for_pretraining (RECIPES B).
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.cubes import cut, pick
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD, channel_values, check, check_frames, check_index

EPS = 1e-6  # added to the standard deviation, outside the root


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


class _SquaredError(torch.autograd.Function):
    """Mean squared error of each clip, [B]. Keeps the residual, written over the target, and nothing else: mse_loss
    keeps both its inputs and makes two more of their size, which on a CPU costs a tenth of a ViT-S step in page
    faults."""

    @staticmethod
    def forward(ctx: FunctionCtx, pred: Tensor, target: Tensor) -> Tensor:
        residual = target.sub_(pred)
        ctx.save_for_backward(residual)
        ctx.dtype = pred.dtype  # type: ignore[attr-defined]
        return torch.linalg.vector_norm(residual, dim=2).square().mean(dim=1) / residual.shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
        (residual,) = ctx.saved_tensors  # type: ignore[attr-defined]
        factor = upstream * (-2 / (residual.shape[1] * residual.shape[2]))
        return (residual * factor[:, None, None]).to(ctx.dtype), None  # type: ignore[attr-defined]


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
) -> Tensor:
    """What the kernel must equal: the target in memory, then the mean squared error, no lower than float32."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    target = pixel_target(frames, masked, cube, normalize=normalize, mean=mean, std=std, dtype=wide)
    if weight is None:
        return _SquaredError.apply(pred, target).mean() * scale
    # chosen before the difference: a clip without weight may hold inf or nan, and 0 * nan would reach every gradient
    chosen = torch.where((weight > 0)[:, None, None], pred, target.to(pred.dtype))
    per_clip = _SquaredError.apply(chosen, target)
    total = weight.to(wide).sum()
    return (per_clip * weight.to(wide)).sum() / total.clamp_min(torch.finfo(wide).tiny) * scale


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
) -> Tensor:
    """The loss, a scalar of at least float32, differentiable in pred.

    pred: float [B, M, dt*dy*dx*C], channel fastest. frames: uint8 [B, T, H, W, C], or floating point, normalised with
    mean and std.
    masked: integer [B, M]. weight: [B], not negative; the loss is then the weighted mean over clips, and 0 when all
    weights are 0.
    scale: a factor (accumulation, loss scaling), a number or a scalar tensor.
    Raises ValueError when shapes and devices do not fit together, or a cube has a single pixel to normalise.
    """
    check_frames(frames, cube)
    check_index(masked, "masked", len(frames), frames)
    pixels = cube[0] * cube[1] * cube[2]
    check(pixels > 1 or not normalize, "a cube of one pixel has no variance: use normalize=False")
    wanted = (*masked.shape, pixels * frames.shape[-1])
    check(tuple(pred.shape) == wanted, f"pred must be {wanted} for cube {tuple(cube)}; got {tuple(pred.shape)}")
    check(pred.dtype.is_floating_point, f"pred must be floating point; got {pred.dtype}")
    check(pred.device == frames.device, f"pred is on {pred.device}, the frames on {frames.device}")
    if weight is not None:
        check(tuple(weight.shape) == (len(frames),), f"weight must be ({len(frames)},); got {tuple(weight.shape)}")
    return pixel_loss_ref(pred, frames, masked, cube, normalize, weight, scale, mean, std)
