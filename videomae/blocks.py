"""The transformer of encoder, decoder and classifier: pre-norm blocks whose additions, norms, biases and GELUs are
fused ops, and what the backward pass computes anew instead of keeping (`set_recompute`).

Parameter names are those of the official checkpoints (RECIPES A.9).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.launch import check, runs_triton
from videomae.attention import attend

NORM_EPS = 1e-6

# What the backward pass computes anew, from least memory saved to most; numbers kept per token and block in widths:
# none 16, norms 10 (outputs of LayerNorm and GELU anew), mlp 8 (the MLP), block 1 (all but its input)
Recompute = Literal["none", "norms", "mlp", "block"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "norms", "mlp", "block")


class Branch(NamedTuple):
    """What a linear layer gives, [B, L, D], and the bias [D] that is still to be added to it: the next kernel adds it,
    and sums its gradient while that passes through. It stays inside its block, whose weights may be gone afterwards
    (sharded, or moved away)."""

    x: Tensor
    bias: Tensor | None

    def whole(self) -> Tensor:
        """Bias added; the dtype remains, as in a linear layer under autocast."""
        return self.x if self.bias is None else self.x + self.bias.to(self.x.dtype)

    def gelu(self) -> Tensor:
        """GELU of the whole."""
        return functional.gelu(self.x) if self.bias is None else kernels.bias_gelu(self.x, self.bias)

    def detach(self) -> "Branch":
        return Branch(self.x.detach(), None if self.bias is None else self.bias.detach())


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, as one kernel with the addition before it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x.contiguous(), None, self.weight, self.bias, self.eps)[0]

    def add(self, branch: Tensor | None, x: Tensor, branch_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of x + branch + branch_bias, and that sum itself; without a branch, x."""
        if branch is None:
            return self(x), x
        return kernels.layer_norm(branch, x, self.weight, self.bias, self.eps, branch_bias)


class Attention(nn.Module):
    """Joint space-time self-attention; q and v have biases, k has none (RECIPES A.3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        check(width % heads == 0, f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.backend = "auto"  # see videomae.attention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, last: int | None = None, remake: Callable[[], Tensor] | None = None) -> Branch:
        """[B, L, D] to [B, L, D]; with last given, what only the last so many tokens see: [B, last, D].

        remake: gives x again, for the backward pass, which then does not keep it.
        """
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        # where kernels run, the one that joins the gradients of q, k and v sums them for the bias
        late = bias if runs_triton(x) else None
        with _remade(x, remake):
            qkv = functional.linear(x, self.qkv.weight, bias if late is None else bias.detach())
        mixed = attend(qkv.view(batch, length, 3, self.heads, width // self.heads), self.backend, last, late)
        return _linear(mixed, self.proj)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, remake: Callable[[], Tensor] | None = None, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """[B, L, D] to [B, L, D]. remake: as in `Attention`; GELU's output is then made anew too. reduce: linear, over
        the tokens; what it makes of the result, for a second layer that sees as few."""
        with _remade(x, remake):
            hidden = _linear(x, self.fc1)
        active = hidden.gelu()
        if reduce is not None:
            return self.fc2(reduce(active))
        again = None if remake is None else hidden.detach().gelu
        with _remade(active, again):
            return self.fc2(active)


class DropPath(nn.Module):
    """Drop a residual branch for whole clips with this probability, and divide the survivors by its complement."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        check(0 <= rate < 1, f"drop path rate must be in [0, 1); got {rate}")
        self.rate = rate

    def draw(self, x: Tensor) -> Tensor | None:
        """Which clips of x keep a branch, bool [B]; None: all of them."""
        if not self.training or self.rate == 0:
            return None
        return torch.rand(len(x), device=x.device) >= self.rate

    def forward(self, branch: Callable[[Tensor], Tensor], x: Tensor, keep: Tensor | None) -> Tensor:
        """The branch of x, by what `draw` gave."""
        if keep is None:
            return branch(x)
        if is_known(keep):
            # only the survivors are computed; none of them still gives gradients
            if keep.all():
                return branch(x) / (1 - self.rate)
            kept = keep.nonzero().flatten()
            # not x[kept], whose gradient is added value by value
            made = branch(x.index_select(0, kept)) / (1 - self.rate)
            return made.new_zeros(len(x), *made.shape[1:]).index_copy(0, kept, made)
        made = branch(x)
        return made * keep.view(-1, *[1] * (made.ndim - 1)).to(made.dtype) / (1 - self.rate)


def is_known(x: Tensor) -> bool:
    """Whether x's values are there at once: on a CPU, unless what is done with them is compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class Block(nn.Module):
    """Pre-norm transformer block. What its second branch gives is added by whoever reads it, in the next norm's
    kernel."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        last: int | None = None,
        recompute: Recompute = "none",
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From x + branch (or x) to x and branch, both [B, L, D], or [B, last, D] with last given, or what reduce makes
        of these."""
        # drawn before anything that is computed anew: a captured graph cannot draw the same again
        keeps = self.drop_path.draw(x), self.drop_path.draw(x)
        if recompute == "block":
            # added up here: one tensor to keep for each block, not two
            x = x if branch is None else x + branch
            return _anew(self._branches, x, None, last, "none", reduce, *keeps)
        return self._branches(x, branch, last, recompute, reduce, *keeps)

    def _branches(
        self,
        x: Tensor,
        branch: Tensor | None,
        last: int | None,
        recompute: Recompute,
        reduce: Callable[[Tensor], Tensor] | None,
        keep: Tensor | None,
        keep_second: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """keep, keep_second: which clips keep what the attention and what the MLP give."""
        normed, x = self.norm1.add(branch, x)
        attn = partial(self.attn, last=last, remake=_again(self.norm1, x, recompute, keep))
        if keep is None:
            mixed = attn(normed)
        else:  # the bias is dropped with the rest
            mixed = Branch(self.drop_path(lambda kept: attn(kept).whole(), normed, keep), None)
        normed, x = self.norm2.add(mixed.x, x if last is None else x[:, -last:].contiguous(), mixed.bias)
        mlp = partial(self.mlp, remake=_again(self.norm2, x, recompute, keep_second), reduce=reduce)
        made = self.drop_path(partial(_anew, mlp) if recompute == "mlp" else mlp, normed, keep_second)
        return x if reduce is None else reduce(x), made


class Blocks(nn.ModuleList):
    """Blocks in sequence."""

    def __init__(self, width: int, depth: int, heads: int, drop_path: float = 0.0) -> None:
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(Block(width, heads, rate) for rate in rates)
        self.recompute: Recompute = "none"

    def forward(self, x: Tensor, norm: LayerNorm | None = None, last: int | None = None) -> Tensor:
        """x after every block, and after norm where it is given.

        With last given, the last block's queries, MLP and second norm are computed for its last so many tokens only.
        """
        branch = None
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for i, block in enumerate(self):
            x, branch = block(x, branch, last if i == len(self) - 1 else None, recompute)
        if norm is not None:
            return norm.add(branch, x)[0]
        return x if branch is None else x + branch

    def pooled(self, x: Tensor) -> Tensor:
        """[B, L, D] to the mean over tokens of x after every block, [B, D]: the last block's last layer sees the mean
        of what goes into it, as both are linear."""
        branch = None
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for i, block in enumerate(self):
            x, branch = block(x, branch, None, recompute, _mean if i == len(self) - 1 else None)
        return x if branch is None else x + branch


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=1)


def set_recompute(model: nn.Module, recompute: Recompute) -> None:
    """What every block of the model makes anew in the backward pass, one of RECOMPUTE: time for memory, the same
    gradients. ValueError for any other. torch.compile cannot trace "norms"."""
    check(recompute in RECOMPUTE, f"recompute must be one of {', '.join(RECOMPUTE)}; got {recompute!r}")
    for module in model.modules():
        if isinstance(module, Blocks):
            module.recompute = recompute


def set_attention(model: nn.Module, backend: str) -> None:
    """Which back end of `videomae.attention` every block of the model uses."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend


def _linear(x: Tensor, layer: nn.Linear) -> Branch:
    """The layer of x. Where no kernel follows that would add its bias, the matrix product does so at less cost than a
    pass of its own; and so for a layer that somebody replaced or hooked (an adapter, a quantised one)."""
    plain = type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
    if plain and runs_triton(x):
        return Branch(functional.linear(x, layer.weight), layer.bias)
    return Branch(layer(x), None)


def _anew(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of which the backward pass keeps the arguments and computes the rest anew; it must draw
    nothing."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _again(norm: LayerNorm, x: Tensor, recompute: Recompute, keep: Tensor | None) -> Callable[[], Tensor] | None:
    """What gives the norm of x to a backward pass that is not to keep it. None where only some clips' is computed on:
    x gives that of all."""
    whole = keep is None or not is_known(keep)
    return _norm_of(norm, x) if recompute == "norms" and whole else None


def _norm_of(norm: LayerNorm, x: Tensor) -> Callable[[], Tensor]:
    again = partial(kernels.layer_norm, x.detach(), None, norm.weight.detach(), norm.bias.detach(), norm.eps)
    return lambda: again()[0]


@contextmanager
def _remade(x: Tensor, remake: Callable[[], Tensor] | None) -> Iterator[None]:
    """What is computed inside does not keep x for its backward pass, which calls remake instead; None: it does."""
    if remake is None:
        yield
        return

    # not x itself, which the hooks would keep; nor addresses, which tensors without data lack
    storage, numel = x.untyped_storage()._cdata, x.numel()

    def pack(saved: Tensor) -> Any:
        # a matrix product saves x by another shape
        if saved.untyped_storage()._cdata != storage or saved.numel() != numel:
            return saved
        return remake, saved.shape, saved.dtype

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        make, shape, dtype = kept
        return make().view(shape).to(dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
