"""The pre-training model: a plain ViT over the visible tokens, a light decoder over all of them, and the table of
sizes.

Parameter names are those of the official checkpoints (RECIPES A.9), so that a state dict needs no translation.
The model knows nothing of optimisers, processes or files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD, check
from videomae.blocks import Blocks, LayerNorm
from videomae.clip import grid_of, interpolated_positions, sinusoid_positions
from videomae.data.sampling import Sampling
from videomae.masking import Mask


@dataclass(frozen=True)
class Size:
    """Widths, depths and heads of one row of RECIPES A.4; the decoder's depth belongs to the recipe."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_heads: int


SIZES = {
    # this project's own: for tests, and for the demo on a CPU
    "vit_tiny": Size(64, 2, 4, 64, 4),
    "vit_mini": Size(96, 4, 4, 48, 4),
    "vit_small": Size(384, 12, 6, 192, 3),
    "vit_base": Size(768, 12, 12, 384, 6),
    "vit_large": Size(1024, 24, 16, 512, 8),
    "vit_huge": Size(1280, 32, 16, 640, 8),
}


@dataclass(frozen=True)
class Input:
    """What a model takes: clips of this many frames and pixels, cut into cubes, normalised with mean and std on [0,
    1].

    sampling: how a clip's frames were chosen when the model was trained; None where that is not known.
    positions_of: the grid whose position table is interpolated to this one; None for this grid's own table.
    """

    frames: int = 16
    image_size: int | tuple[int, int] = 224
    cube: tuple[int, int, int] = (2, 16, 16)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    sampling: Sampling | None = None
    positions_of: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check(len(self.cube) == 3, f"a cube is (frames, height, width); got {self.cube}")
        check(len(self.mean) == len(self.std), f"mean and std must have as many channels; got {self.mean}, {self.std}")
        # lists, as json and command lines give them, would not hash
        object.__setattr__(self, "cube", tuple(self.cube))
        if not isinstance(self.image_size, int):
            height, width = self.image_size
            # a square has one spelling, so that equal inputs compare equal
            object.__setattr__(self, "image_size", height if height == width else (height, width))
        grid = self.grid  # refuses sizes that the cube does not divide
        if self.positions_of is not None:
            old = tuple(self.positions_of)
            check(len(old) == 3 and min(old) >= 1, f"positions_of must be a grid of three positive numbers; got {old}")
            object.__setattr__(self, "positions_of", None if old == grid else old)

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

    def positions(self, width: int) -> Tensor:
        """The position table of tokens of this width, float32 [N, width]: fixed, never trained."""
        if self.positions_of is None:
            return sinusoid_positions(self.num_cubes, width)
        return interpolated_positions(self.positions_of, self.grid, width)

    @property
    def cube_values(self) -> int:
        """Numbers in one cube: pixels times channels."""
        return self.cube[0] * self.cube[1] * self.cube[2] * len(self.mean)


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
        self.register_buffer("positions", input.positions(size.width), persistent=False)
        self.blocks.apply(_init_linear_xavier)

    def embed(self, frames: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens [B, V, D] of the visible cubes (int [B, V]; None: all) of frames [B, T, H, W, 3]."""
        wanted = (self.input.frames, *self.input.size)
        check(
            frames.ndim == 5 and tuple(frames.shape[1:4]) == wanted,
            f"this model takes clips [B, {', '.join(map(str, wanted))}, C]; got {tuple(frames.shape)}",
        )
        return self._embedded(frames, self.positions, visible)

    def _embedded(self, frames: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        proj = self.patch_embed.proj
        assert proj.bias is not None
        return kernels.cube_embed(
            frames, proj.weight, proj.bias, positions, visible, mean=self.input.mean, std=self.input.std
        )

    def forward(self, frames: Tensor, visible: Tensor | None = None) -> Tensor:
        """Features [B, V, D] of the visible cubes, or [B, N, D] of all."""
        return self.blocks(self.embed(frames, visible), self.norm)


class Decoder(nn.Module):
    """Blocks over the whole sequence; norm and head over its last num_predicted tokens.

    short_last_layer: the last block's queries, MLP and second norm are computed for those tokens only, which changes
    nothing in what they become.
    """

    def __init__(self, size: Size, depth: int, cube_values: int) -> None:
        super().__init__()
        self.blocks = Blocks(size.decoder_width, depth, size.decoder_heads)
        self.norm = LayerNorm(size.decoder_width)
        self.head = nn.Linear(size.decoder_width, cube_values)
        self.short_last_layer = True
        self.apply(_init_linear_xavier)

    def forward(self, x: Tensor, num_predicted: int) -> Tensor:
        if self.short_last_layer:
            return self.head(self.blocks(x, self.norm, num_predicted))
        return self.head(self.norm(self.blocks(x)[:, -num_predicted:]))


class VideoMAE(nn.Module):
    """Encoder over visible cubes, decoder over these and the mask's decoded ones, prediction for its predicted ones."""

    decoder_positions: Tensor

    def __init__(self, size: Size, input: Input, *, decoder_depth: int = 4) -> None:
        super().__init__()
        check(decoder_depth >= 1, f"decoder_depth must be at least 1; got {decoder_depth}")
        self.input = input
        self.normalized: bool | None = None  # whether it was trained to predict normalised pixels, where that is known
        self.encoder = Encoder(size, input)
        self.encoder_to_decoder = nn.Linear(size.width, size.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_width))
        self.decoder = Decoder(size, decoder_depth, input.cube_values)
        self.register_buffer("decoder_positions", input.positions(size.decoder_width), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, frames: Tensor, mask: Mask) -> Tensor:
        """The (normalised) pixels of the mask's predicted cubes, [B, P, dt*dy*dx*C], channel fastest.

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
        sequence = kernels.decoder_input(visible, self.mask_token.flatten(), positions, mask.visible, mask.decoded)
        return self.decoder(sequence, mask.predicted.shape[1])


def _init_linear_xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
