"""The pre-training model: a plain ViT over the visible tokens, a light decoder over all of them, and the table of
sizes.

Parameter names are those of the official checkpoints (RECIPES A.9), so that a state dict needs no translation.
The model knows nothing of optimisers, processes or files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD, check
from videomae.clip import grid_of, sinusoid_positions
from videomae.masking import Mask

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Widths, depths and heads of one row of RECIPES A.4; the decoder's depth belongs to the recipe."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_heads: int


SIZES = {
    "vit_tiny": Size(64, 2, 4, 64, 4),  # this project's own, for the demo on a CPU
    "vit_small": Size(384, 12, 6, 192, 3),
    "vit_base": Size(768, 12, 12, 384, 6),
    "vit_large": Size(1024, 24, 16, 512, 8),
    "vit_huge": Size(1280, 32, 16, 640, 8),
}


@dataclass(frozen=True)
class Input:
    """What a model takes: clips of this many frames and pixels, cut into cubes, normalised with mean and std on [0,
    1]."""

    frames: int = 16
    image_size: int | tuple[int, int] = 224
    cube: tuple[int, int, int] = (2, 16, 16)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        check(len(self.cube) == 3, f"a cube is (frames, height, width); got {self.cube}")
        check(len(self.mean) == len(self.std), f"mean and std must have as many channels; got {self.mean}, {self.std}")
        # lists, as json and command lines give them, would not hash
        object.__setattr__(self, "cube", tuple(self.cube))
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        _ = self.grid  # refuses sizes that the cube does not divide

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int, int]:
        return grid_of(self.frames, *self.size, self.cube)

    @property
    def num_cubes(self) -> int:
        slots, rows, columns = self.grid
        return slots * rows * columns

    @property
    def cube_values(self) -> int:
        """Numbers in one cube: pixels times channels."""
        return self.cube[0] * self.cube[1] * self.cube[2] * len(self.mean)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, as one kernel with the addition before it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x.contiguous(), None, self.weight, self.bias, self.eps)[0]

    def add(self, branch: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + branch, and x + branch itself; without a branch, x."""
        if branch is None:
            return self(x), x
        return kernels.layer_norm(branch, x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Joint space-time self-attention; q and v have biases, k has none (RECIPES A.3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        check(width % heads == 0, f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """[B, L, D] to [B, L, D]; with last given, what only the last so many tokens see: [B, last, D]."""
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = functional.linear(x, self.qkv.weight, bias)
        # split along the last axis: its backward joins the three gradients in one copy, where that of a permute takes
        # two
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in qkv.split(width, dim=-1))
        if last is not None:
            q = q[:, :, -last:]
        mixed = functional.scaled_dot_product_attention(q, k, v)  # [B, A, L or last, width / A]
        return self.proj(mixed.transpose(1, 2).reshape(batch, -1, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        assert self.fc1.bias is not None
        return self.fc2(kernels.bias_gelu(functional.linear(x, self.fc1.weight), self.fc1.bias))


class DropPath(nn.Module):
    """Drop a residual branch for whole clips with this probability, and divide the survivors by its complement."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        check(0 <= rate < 1, f"drop path rate must be in [0, 1); got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


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

    def forward(self, x: Tensor, branch: Tensor | None, last: int | None = None) -> tuple[Tensor, Tensor]:
        """From x + branch (or x) to x and branch, both [B, L, D], or [B, last, D] with last given."""
        normed, x = self.norm1.add(branch, x)
        mixed = self.drop_path(self.attn(normed, last))
        normed, x = self.norm2.add(mixed, x if last is None else x[:, -last:].contiguous())
        return x, self.drop_path(self.mlp(normed))


class Blocks(nn.ModuleList):
    """Blocks in sequence; with recompute set, each keeps only its input for the backward pass."""

    def __init__(self, width: int, depth: int, heads: int, drop_path: float = 0.0) -> None:
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(Block(width, heads, rate) for rate in rates)
        self.recompute = False

    def forward(self, x: Tensor, norm: LayerNorm | None = None, last: int | None = None) -> Tensor:
        """x after every block, and after norm where it is given.

        With last given, the last block's queries, MLP and second norm are computed for its last so many tokens only.
        """
        branch = None
        for i, block in enumerate(self):
            wanted = last if i == len(self) - 1 else None
            if self.recompute and torch.is_grad_enabled():
                # added up here: one tensor to keep for each block, not two
                x = x if branch is None else x + branch
                x, branch = checkpoint(block, x, None, wanted, use_reentrant=False)
            else:
                x, branch = block(x, branch, wanted)
        if norm is not None:
            return norm.add(branch, x)[0]
        return x if branch is None else x + branch


class PatchEmbed(nn.Module):
    """Holds the cube embedding's weights in a Conv3d, for its layout and its initialisation; `kernels.cube_embed` uses
    them."""

    def __init__(self, cube: tuple[int, int, int], channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel_size=cube, stride=cube)


class Encoder(nn.Module):
    """Cube embedding, blocks, final norm. `model(frames)` sees every cube, `model(frames, visible)` only those."""

    positions: Tensor

    def __init__(self, size: Size, input: Input, *, drop_path: float = 0.0, final_norm: bool = True) -> None:
        super().__init__()
        self.size, self.input = size, input
        self.patch_embed = PatchEmbed(input.cube, len(input.mean), size.width)
        self.blocks = Blocks(size.width, size.depth, size.heads, drop_path)
        self.norm = LayerNorm(size.width) if final_norm else None
        # not in the state dict: fixed, and absent from every published file
        self.register_buffer("positions", sinusoid_positions(input.num_cubes, size.width), persistent=False)
        self.blocks.apply(_init_linear_xavier)

    def embed(self, frames: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens [B, V, D] of the visible cubes (int [B, V]; None: all) of frames [B, T, H, W, 3]."""
        wanted = (self.input.frames, *self.input.size)
        check(
            frames.ndim == 5 and tuple(frames.shape[1:4]) == wanted,
            f"this model takes clips [B, {', '.join(map(str, wanted))}, C]; got {tuple(frames.shape)}",
        )
        proj = self.patch_embed.proj
        assert proj.bias is not None
        return kernels.cube_embed(
            frames, proj.weight, proj.bias, self.positions, visible, mean=self.input.mean, std=self.input.std
        )

    def forward(self, frames: Tensor, visible: Tensor | None = None) -> Tensor:
        """Features [B, V, D] of the visible cubes, or [B, N, D] of all."""
        return self.blocks(self.embed(frames, visible), self.norm)


class Decoder(nn.Module):
    """Blocks over the whole sequence; norm and head over its last num_masked tokens."""

    def __init__(self, size: Size, depth: int, cube_values: int) -> None:
        super().__init__()
        self.blocks = Blocks(size.decoder_width, depth, size.decoder_heads)
        self.norm = LayerNorm(size.decoder_width)
        self.head = nn.Linear(size.decoder_width, cube_values)
        self.apply(_init_linear_xavier)

    def forward(self, x: Tensor, num_masked: int) -> Tensor:
        return self.head(self.blocks(x, self.norm, num_masked))


class VideoMAE(nn.Module):
    """Encoder over visible cubes, decoder over all, prediction for the masked ones."""

    decoder_positions: Tensor

    def __init__(self, size: Size, input: Input, *, decoder_depth: int = 4) -> None:
        super().__init__()
        check(decoder_depth >= 1, f"decoder_depth must be at least 1; got {decoder_depth}")
        self.input = input
        self.encoder = Encoder(size, input)
        self.encoder_to_decoder = nn.Linear(size.width, size.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_width))
        self.decoder = Decoder(size, decoder_depth, input.cube_values)
        positions = sinusoid_positions(input.num_cubes, size.decoder_width)
        self.register_buffer("decoder_positions", positions, persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, frames: Tensor, mask: Mask) -> Tensor:
        """The predicted (normalised) pixels of the masked cubes, [B, M, dt*dy*dx*C], channel fastest.

        frames: uint8 [B, T, H, W, C], or floating point and already normalised. ValueError when frames or mask do not
        fit the model.
        """
        check(
            isinstance(mask, Mask), f"mask must be a Mask; got {type(mask).__name__} (videomae.masking.Mask.from_bool)"
        )
        check(
            mask.num_cubes == self.input.num_cubes,
            f"the mask is for {mask.num_cubes} cubes, the model has {self.input.num_cubes}: {self.input.grid}",
        )
        visible = self.encoder_to_decoder(self.encoder(frames, mask.visible))
        # in the activations' dtype (RECIPES A.2): a row is read for every token, at a rate that float32 would halve
        positions = self.decoder_positions.to(visible.dtype)
        sequence = kernels.decoder_input(visible, self.mask_token.flatten(), positions, mask.visible, mask.masked)
        return self.decoder(sequence, mask.masked.shape[1])


def _init_linear_xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Trade time for memory: every block recomputes its activations in the backward pass."""
    for module in model.modules():
        if isinstance(module, Blocks):
            module.recompute = recompute


def size_of(name: str) -> Size:
    """The row of SIZES; ValueError names the known ones."""
    check(name in SIZES, f"model size must be one of {', '.join(SIZES)}; got {name!r}")
    return SIZES[name]


def pretrain_model(
    size: str,
    *,
    frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    cube: tuple[int, int, int] = (2, 16, 16),
    decoder_depth: int = 4,
) -> VideoMAE:
    """A freshly initialised pre-training model (RECIPES A.5); ValueError for an unknown size or sides the cube does not
    divide."""
    return VideoMAE(size_of(size), Input(frames, image_size, cube), decoder_depth=decoder_depth)


def encoder(
    size: str,
    *,
    frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    cube: tuple[int, int, int] = (2, 16, 16),
) -> Encoder:
    """A freshly initialised encoder, final norm included: `encoder(frames)` gives features [B, N, D]."""
    return Encoder(size_of(size), Input(frames, image_size, cube))
