"""The shapes that pre-training gives the ops, from the table of sizes; every bench and the tuner take theirs from here.

16 x 224 x 224 clips, cubes of 2 x 16 x 16, 90 % tube mask: 1568 cubes, of which 160 visible and 1408 masked.
"""

from dataclasses import dataclass

import torch

from videomae import masking
from videomae.clip import grid_of
from videomae.model import SIZES

CUBE = (2, 16, 16)
CHANNELS = 3
# as many clips as one GPU trains on at a time, and as a CPU gets through in a second
GPU_CLIPS, CPU_CLIPS = 64, 2


@dataclass(frozen=True)
class Shape:
    """One batch of a model of that size."""

    size: str
    clips: int
    width: int
    heads: int
    decoder_width: int
    frames: int = 16
    side: int = 224
    ratio: float = 0.9

    @property
    def grid(self) -> tuple[int, int, int]:
        return grid_of(self.frames, self.side, self.side, CUBE)

    @property
    def num_cubes(self) -> int:
        slots, rows, columns = self.grid
        return slots * rows * columns

    @property
    def num_masked(self) -> int:
        return masking.num_masked("tube", self.grid, self.ratio)

    @property
    def num_visible(self) -> int:
        return self.num_cubes - self.num_masked

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def cube_values(self) -> int:
        """Numbers in one cube: pixels times channels."""
        return CUBE[0] * CUBE[1] * CUBE[2] * CHANNELS

    def mask(self, seed: int, device: torch.device) -> masking.Mask:
        """A fresh tube mask for every clip."""
        keys = torch.arange(self.clips) + seed * self.clips
        return masking.tube(self.grid, self.ratio, keys=keys).to(device)


def shape_of(size: str, clips: int = GPU_CLIPS) -> Shape:
    """The row of SIZES with that many clips."""
    row = SIZES[size]
    return Shape(size, clips, row.width, row.heads, row.decoder_width)


# 8 cubes, 4 of them visible: small enough for Triton's interpreter
TINY = Shape("tiny", clips=2, width=32, heads=2, decoder_width=16, frames=4, side=32, ratio=0.5)
