"""Mixup, CutMix and random erasing (Zhang et al., Yun et al., Zhong et al., 2017-2019) as fine-tuning has them, and the
loss of mixed labels (RECIPES E.1).

Clips are mixed in groups of neighbours in the global batch, clip i of a group with clip group - 1 - i, all by one draw.
Draws are made on the host, each a pure function of a clip's key: the number of processes and the micro-batches, which
hold whole groups, change nothing. Pixels change on their device, in this order: a clip is erased, CutMix takes pixels
of erased clips, and mixup blends tokens: the embedding is linear, and positions are the same for both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.launch import channel_values, check
from videomae.keys import Draws
from videomae.keys import key as hashed

# what a draw is for: the number after a clip's key; masks have -1 and all from 0 on
_MIX, _ERASE, _NOISE = -2, -3, -4


@dataclass(frozen=True)
class Mixing:
    """How clips and their labels are mixed."""

    mixup: float = 0.8  # alpha of the Beta distribution; 0: never
    cutmix: float = 1.0
    probability: float = 1.0  # that a group is mixed at all
    switch: float = 0.5  # that it is CutMix where both are on
    group: int | None = None  # clips mixed among themselves; None: the fewest that pair no video with itself

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            check(0 <= alpha < math.inf, f"mix.{name} must be finite and not negative; got {alpha}")
        for name in ("probability", "switch"):
            share = getattr(self, name)
            check(0 <= share <= 1, f"mix.{name} must be in [0, 1]; got {share}")
        check(self.group is None or self.group >= 2, f"mix.group must be at least 2; got {self.group}")

    @property
    def mixes(self) -> bool:
        """Whether any group may be mixed."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def group_of(self, views: int) -> int:
        """Clips of a group where each video has so many views, side by side.

        ValueError unless it is a multiple of 2 * views: a group of an odd number of videos pairs its middle one with
        itself.
        """
        check(views >= 1, f"views must be at least 1; got {views}")
        group = 2 * views if self.group is None else self.group
        fits = group % (2 * views) == 0
        check(fits, f"mix.group must be a multiple of {2 * views}, twice the {views} views of a video; got {group}")
        return group


@dataclass(frozen=True)
class Erasing:
    """A rectangle of noise, the same in all frames of a clip."""

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)  # of a frame, drawn evenly
    aspect: tuple[float, float] = (0.3, 1 / 0.3)  # height / width, drawn evenly on a log scale
    tries: int = 100  # to find one that fits into the frame

    def __post_init__(self) -> None:
        check(0 <= self.probability <= 1, f"erasing.probability must be in [0, 1]; got {self.probability}")
        ordered = 0 < self.area[0] <= self.area[1] <= 1
        check(ordered, f"erasing.area must be two ascending shares in (0, 1]; got {self.area}")
        ordered = 0 < self.aspect[0] <= self.aspect[1] < math.inf
        check(ordered, f"erasing.aspect must be two ascending positive numbers; got {self.aspect}")
        check(self.tries >= 1, f"erasing.tries must be at least 1; got {self.tries}")


class Box(NamedTuple):
    """A rectangle in pixels, without row bottom and column right."""

    top: int
    left: int
    bottom: int
    right: int


class Mix(NamedTuple):
    """How the clips of a micro-batch are mixed, [B] each.

    lam: float32, the share of the clip's own label. partner: int64, the clip it is mixed with, whose partner it is.
    blend: float32, the share of its own tokens: lam for mixup, 1 for CutMix.
    """

    lam: Tensor
    partner: Tensor
    blend: Tensor

    def to(self, device: torch.device | str) -> "Mix":
        return Mix(*(x.to(device, non_blocking=True) for x in self))


def draw_mix(
    mixing: Mixing, group: int, keys: Sequence[int], size: tuple[int, int], present: Sequence[bool]
) -> tuple[Mix, list[Box | None]]:
    """How clips with these keys are mixed, and for each the box that CutMix fills from its partner.

    size: height and width. present: False for a clip that could not be read; its partner and itself stay as they are.
    The clips are whole groups of the batch, in its order: ValueError when they cannot be.
    """
    check(group >= 2 and group % 2 == 0, f"a group must have an even number of clips; got {group}")
    check(len(keys) % group == 0, f"{len(keys)} clips are no whole groups of {group}")
    check(len(keys) == len(present), f"present must be given for {len(keys)} clips; got {len(present)}")
    lams, partners, blends = [], [], []
    boxes: list[Box | None] = []
    for first in range(0, len(keys), group):
        lam, box = _draw_group(mixing, size, Draws(keys[first], _MIX))
        for clip in range(first, first + group):
            partner = 2 * first + group - 1 - clip
            both = present[clip] and present[partner]
            partners.append(partner)
            lams.append(lam if both else 1.0)
            blends.append(lam if both and box is None else 1.0)
            boxes.append(box if both else None)
    mix = Mix(
        torch.tensor(lams, dtype=torch.float32),
        torch.tensor(partners, dtype=torch.int64),
        torch.tensor(blends, dtype=torch.float32),
    )
    return mix, boxes


def _draw_group(mixing: Mixing, size: tuple[int, int], draws: Draws) -> tuple[float, Box | None]:
    """The share of a clip's own label, and CutMix's box where there is one."""
    if not mixing.mixes or draws.uniform() >= mixing.probability:
        return 1.0, None
    if mixing.cutmix == 0 or (mixing.mixup > 0 and draws.uniform() >= mixing.switch):
        return _beta(mixing.mixup, draws), None
    height, width = size
    scale = math.sqrt(1 - _beta(mixing.cutmix, draws))
    half_height, half_width = int(height * scale) // 2, int(width * scale) // 2
    y, x = draws.below(height), draws.below(width)
    box = Box(max(y - half_height, 0), max(x - half_width, 0), min(y + half_height, height), min(x + half_width, width))
    # of the box as it is: rounded, and cut at the border
    pixels = (box.bottom - box.top) * (box.right - box.left)
    return (1 - pixels / (height * width), box) if pixels else (1.0, None)


def _beta(alpha: float, draws: Draws) -> float:
    """From Beta(alpha, alpha), exactly, of two uniform draws.

    T = sqrt(2 alpha (U^(-1 / alpha) - 1)) cos(2 pi V) has Student's t distribution with 2 alpha degrees of freedom
    (Bailey, 1994), and 1 / 2 + T / (2 sqrt(2 alpha + T^2)) this one (Devroye, 1996); here without the power that
    overflows.
    """
    w = (1 - draws.uniform()) ** (1 / alpha)
    x = math.sqrt(1 - w) * math.cos(2 * math.pi * draws.uniform())
    # sqrt(x * x) rounds to abs(x): never below 0 or above 1
    return (1 + x / math.sqrt(w + x * x)) / 2


def draw_erasing(erasing: Erasing, key: int, size: tuple[int, int]) -> Box | None:
    """The rectangle of height and width `size` that a clip with this key loses; None for none, or if none fits."""
    draws = Draws(key, _ERASE)
    if draws.uniform() >= erasing.probability:
        return None
    height, width = size
    smallest, largest = erasing.area
    low, high = (math.log(x) for x in erasing.aspect)
    for _ in range(erasing.tries):
        pixels = height * width * (smallest + (largest - smallest) * draws.uniform())
        aspect = math.exp(low + (high - low) * draws.uniform())
        h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = draws.below(height - h + 1), draws.below(width - w + 1)
            return Box(top, left, top + h, left + w)
    return None


def normalize(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(frames / 255 - mean) / std per channel, float32, of uint8 [B, T, H, W, C]."""
    check(frames.dtype == torch.uint8, f"frames must be uint8 to be normalised; got {frames.dtype}")
    channels = frames.shape[-1]
    check(len(mean) == len(std) == channels, f"mean and std must have {channels} channels; got {mean} and {std}")
    scales, shifts = tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    scale, shift = (channel_values(v, 1, torch.float32, frames.device) for v in (scales, shifts))
    return frames.to(torch.float32).mul_(scale).add_(shift)


def erase(frames: Tensor, boxes: Sequence[Box | None], keys: Sequence[int]) -> None:
    """Fill each clip's box, in place, with normal noise: another value for each frame, pixel and channel.

    frames: float32 [B, T, H, W, C], normalised. The noise depends on the clip's key, the box's size and the kind of
    device alone.
    """
    check(frames.dtype == torch.float32, f"frames must be float32 and normalised to be erased; got {frames.dtype}")
    check(len(frames) == len(boxes) == len(keys), f"{len(boxes)} boxes and {len(keys)} keys for {len(frames)} clips")
    generator = torch.Generator(frames.device)
    for clip, box, key in zip(frames, boxes, keys, strict=True):
        if box is not None:
            inside = clip[:, box.top : box.bottom, box.left : box.right]
            generator.manual_seed(hashed(key, _NOISE))
            inside.copy_(torch.randn(inside.shape, generator=generator, dtype=clip.dtype, device=clip.device))


def cut(frames: Tensor, mix: Mix, boxes: Sequence[Box | None]) -> Tensor:
    """CutMix: frames [B, T, H, W, C] of any dtype with each clip's box filled from its partner, before that one was cut
    itself.

    A new tensor, but frames itself where there is no box.
    """
    check(len(frames) == len(boxes) == len(mix.partner), f"{len(boxes)} boxes for {len(frames)} clips")
    if not any(boxes):
        return frames
    out = frames.clone()
    for clip, box in enumerate(boxes):
        if box is not None:
            inside = slice(box.top, box.bottom), slice(box.left, box.right)
            # the partner's number may be on a GPU, and is not waited for
            partner = frames[:, :, inside[0], inside[1]].index_select(0, mix.partner[clip : clip + 1])
            out[clip, :, inside[0], inside[1]] = partner[0]
    return out


def blend_tokens(tokens: Tensor, mix: Mix) -> Tensor:
    """Mixup: blend * tokens + (1 - blend) * the partner's, of tokens [B, N, D] with their positions; differentiable.

    The same, up to rounding, as the tokens of blended pixels. Computed in float32 or wider, and rounded once.
    """
    share = mix.blend[:, None, None]
    return (share * tokens + (1 - share) * _Swap.apply(tokens, mix.partner)).to(tokens.dtype)


class _Swap(torch.autograd.Function):
    """x[partner]. Partners are mutual, so that backward is the same again: indexing's own would sort or add
    atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, partner: Tensor) -> Tensor:
        ctx.save_for_backward(partner)
        return x[partner]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (partner,) = ctx.saved_tensors
        return grad[partner], None


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, mix: Mix | None = None, smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """The weighted mean over clips of lam * CE(own label) + (1 - lam) * CE(partner's), a scalar of float32 or wider.

    logits: [B, C]. labels: int64 [B]. mix: None for own labels only. smoothing: the share of a label that is spread
    over all C classes. weight: float32 [B], 0 for clips that do not count; None counts all. 0 when all weights are 0.
    A function of tensors only, without a wait for the device.
    """
    check(logits.ndim == 2, f"logits must be [B, C]; got shape {tuple(logits.shape)}")
    check(labels.shape == logits.shape[:1], f"labels must be {tuple(logits.shape[:1])}; got {tuple(labels.shape)}")
    check(0 <= smoothing < 1, f"smoothing must be in [0, 1); got {smoothing}")
    if weight is not None:
        # a clip without weight may hold inf or nan: 0 * nan would reach every gradient
        logits = torch.where((weight > 0)[:, None], logits, 0)
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_shares = torch.log_softmax(logits.to(wide), dim=1)
    named = log_shares.gather(1, labels[:, None])[:, 0]
    if mix is not None:
        other = log_shares.gather(1, labels[mix.partner][:, None])[:, 0]
        named = mix.lam * named + (1 - mix.lam) * other
    losses = -(1 - smoothing) * named - smoothing * log_shares.mean(dim=1)
    if weight is None:
        return losses.mean()
    total = weight.to(wide).sum()
    return (losses * weight.to(wide)).sum() / total.clamp_min(torch.finfo(wide).tiny)
