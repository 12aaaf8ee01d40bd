"""MoCo v3 (Chen, Xie and He, arXiv 2104.02057) for clips: two views of a video are to be told from those of all other
videos. The models, and what they are compared by; `train.moco` trains them.

The encoder is a plain `Encoder` over every cube, whose parameters keep their names: a file of a `Contrasted` is that of
an encoder, with heads that nobody else wants.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from kernels.launch import check
from videomae.model import Encoder, Input, Size

_NORM_EPS = 1e-5


class BatchNorm(nn.Module):
    """Each number over the clips that count, of all processes together, to mean 0 and deviation 1; in float32.

    There are no running statistics: the heads are not used after training.
    """

    def __init__(self, width: int, *, affine: bool = True) -> None:
        """affine: scaled and shifted afterwards, as is learned."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        """[B, C] of x [B, C]; counted: float32 [B], 1 or 0."""
        x, number = x.float(), _added_up(counted.sum()).clamp_min(1)
        # autocast would take these products in half precision
        with torch.autocast(x.device.type, enabled=False):
            centred = x - _added_up(counted @ x) / number
            variance = _added_up(counted @ centred.square()) / number
        normed = centred * torch.rsqrt(variance + _NORM_EPS)
        if self.weight is None or self.bias is None:
            return normed
        return torch.addcmul(self.bias, normed, self.weight)


class Head(nn.Module):
    """Linear layers, a batch norm after each, ReLU between them; the last norm has no weights, as the authors' has."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.layers = nn.ModuleList(nn.Linear(before, after, bias=False) for before, after in pairs)
        self.norms = nn.ModuleList(BatchNorm(after, affine=i < len(pairs)) for i, (_, after) in enumerate(pairs, 1))

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        """float32 [B, C] of x [B, D]; counted as in `BatchNorm`."""
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(layer(functional.relu(x) if i else x), counted)
        return x


class MomentumEncoder(Encoder):
    """An encoder and a projector, of 3 layers, on the mean of its tokens: what gives keys."""

    def __init__(self, size: Size, input: Input, *, hidden: int = 4096, width: int = 256) -> None:
        """hidden, width: of the heads' layers but the last, and of that."""
        super().__init__(size, input)
        check(hidden >= 1 and width >= 2, f"heads must be at least 1 and 2 wide; got {hidden} and {width}")
        self.hidden, self.width = hidden, width
        self.projector = Head(size.width, hidden, hidden, width)

    def pooled(self, frames: Tensor) -> Tensor:
        """The mean of the normed tokens, [B, D]: what probes and `features_of` take."""
        return self(frames).mean(dim=1, dtype=torch.float32)


class Contrasted(MomentumEncoder):
    """The model that is trained: with a predictor of 2 layers on the projector, which gives queries."""

    def __init__(self, size: Size, input: Input, *, hidden: int = 4096, width: int = 256) -> None:
        super().__init__(size, input, hidden=hidden, width=width)
        self.predictor = Head(width, hidden, width)


def momentum_encoder_of(model: Contrasted) -> MomentumEncoder:
    """A copy without the predictor, that no gradient changes."""
    made = MomentumEncoder(model.size, model.input, hidden=model.hidden, width=model.width)
    made.to(model.positions.device).requires_grad_(False)
    follow(made, model, 0.0)
    return made


@torch.no_grad()
def follow(momentum: MomentumEncoder, model: Contrasted, rate: float) -> None:
    """Each weight of the momentum encoder becomes rate of itself and 1 - rate of the model's."""
    theirs = dict(model.named_parameters())
    own = dict(momentum.named_parameters())
    torch._foreach_lerp_(list(own.values()), [theirs[name] for name in own], 1 - rate)


def momentum_at(step: int, steps: int, base: float) -> float:
    """The rate after `step` of so many steps: from base to 1, along half a cosine."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / steps)) / 2


class Compared(NamedTuple):
    """Of every query: its loss, float32 [B], and whether its own key is the nearest, bool [B]."""

    loss: Tensor
    found: Tensor


def compare(queries: Tensor, keys: Tensor, own: Tensor, temperature: float, counted: Tensor) -> Compared:
    """InfoNCE: 2 tau times the cross-entropy of cosines / tau.

    queries: [B, C]. keys: [K, C], of which a query's own is at own, int64 [B], and all others are negatives; no
    gradient reaches them. counted: [K], 0 for keys that are not there.
    """
    queries, keys = functional.normalize(queries.float(), dim=1), functional.normalize(keys.detach().float(), dim=1)
    # a query whose own key is not there does not count either; its row only has to be finite
    hidden = (counted == 0)[None, :].expand(len(queries), -1).scatter(1, own[:, None], False)
    logits = (queries @ keys.T / temperature).masked_fill(hidden, -math.inf)
    loss = 2 * temperature * functional.cross_entropy(logits, own, reduction="none")
    return Compared(loss, logits.argmax(1) == own)


def spread(x: Tensor, counted: Tensor) -> Tensor:
    """How far rows x [B, C] point in different directions: the deviation of their numbers, made unit vectors, times the
    root of C. 1 where they point everywhere, 0 where all point the same way: a collapse."""
    units = functional.normalize(x.detach().float(), dim=1)
    number = counted.sum().clamp_min(1)
    mean = counted @ units / number
    return (counted @ (units - mean).square() / number).sum().sqrt()


def processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@torch.no_grad()
def everyones(x: Tensor) -> Tensor:
    """The rows of all processes, by rank, without gradients."""
    _, count = processes()
    if count == 1:
        return x
    found = x.new_empty(count * len(x), *x.shape[1:])
    distributed.all_gather_into_tensor(found, x.contiguous())
    return found


class _AddedUp(torch.autograd.Function):
    """The sum over all processes; each process's loss has a share in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def _added_up(x: Tensor) -> Tensor:
    return _AddedUp.apply(x) if processes()[1] > 1 else x
