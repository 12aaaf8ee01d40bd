"""Geometry of a clip: its grid, the order of its cubes, their positions, and the way there and back.

Letters, used in the whole project: B clips, T frames, H W pixels, N cubes, V visible, M masked, D encoder width, E
decoder width, A heads, R rows in a kernel. A clip is uint8 [T, H, W, 3]; the grid is (T', H', W') = (T, H, W) / cube;
cubes run by time, then row,
then column: token index = (t * H' + h) * W' + w.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from kernels.cubes import cut
from kernels.launch import check, check_frames


def grid_of(frames: int, height: int, width: int, cube: tuple[int, int, int]) -> tuple[int, int, int]:
    """Cubes along time, height and width; ValueError when the cube does not divide the clip."""
    check(all(step > 0 for step in cube), f"a cube must have positive sides; got {tuple(cube)}")
    for name, size, step in zip(("frames", "height", "width"), (frames, height, width), cube, strict=True):
        check(size > 0 and size % step == 0, f"{name} must be a multiple of the cube's {step}; got {size}")
    return frames // cube[0], height // cube[1], width // cube[2]


def sinusoid_positions(num_cubes: int, width: int) -> Tensor:
    """The fixed position table, float32 [N, width], one-dimensional over the token index (RECIPES A.2).

    Channel j of position p is sin (j even) or cos (j odd) of p / 10000^(2 * floor(j / 2) / width), computed in float64.
    """
    channels = torch.arange(width, dtype=torch.float64)
    places = torch.arange(num_cubes, dtype=torch.float64)
    angles = places[:, None] / 10000 ** (2 * (channels // 2) / width)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()


def interpolated_positions(old_grid: tuple[int, int, int], new_grid: tuple[int, int, int], width: int) -> Tensor:
    """The old grid's position table resized to the new grid, float32 [N, width], computed in float64 (RECIPES A.11).

    Bicubic in every time slot, then linear along time, both without aligned corners; grids that are equal give the
    table of `sinusoid_positions` itself.
    """
    (slots, rows, columns), new_size = old_grid, new_grid[1:]
    table = sinusoid_positions(slots * rows * columns, width)
    if (rows, columns) != new_size:
        images = rearrange(table.double(), "(t h w) d -> t d h w", t=slots, h=rows)
        images = functional.interpolate(images, new_size, mode="bicubic", align_corners=False)
        table = rearrange(images, "t d h w -> (t h w) d")
    if slots != new_grid[0]:
        lines = rearrange(table.double(), "(t n) d -> n d t", t=slots)
        lines = functional.interpolate(lines, new_grid[0], mode="linear", align_corners=False)
        table = rearrange(lines, "n d t -> (t n) d")
    return table.float().contiguous()


def to_cubes(frames: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """frames [B, T, H, W, C] as [B, N, dt*dy*dx*C], channel fastest: the layout of the model's prediction."""
    check_frames(frames, cube)
    return cut(frames, cube).flatten(2)


def from_cubes(cubes: Tensor, grid: tuple[int, int, int], cube: tuple[int, int, int]) -> Tensor:
    """The inverse of `to_cubes`."""
    (t, h, w), (dt, dy, dx) = grid, cube
    return rearrange(
        cubes, "b (t h w) (dt dy dx c) -> b (t dt) (h dy) (w dx) c", t=t, h=h, w=w, dt=dt, dy=dy, dx=dx
    ).contiguous()
