"""Cut a clip into cubes and pick some of them: what the references of cube_embed and pixel_loss share.

Order: cubes by time, then row, then column; token index = (t * H' + h) * W' + w.
"""

import torch
from einops import rearrange
from torch import Tensor


def cut(frames: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """frames [B, T, H, W, C] as cubes [B, N, dt*dy*dx, C], pixels in (dt, dy, dx) order; a copy of the same dtype."""
    dt, dy, dx = cube
    return rearrange(frames, "b (t dt) (h dy) (w dx) c -> b (t h w) (dt dy dx) c", dt=dt, dy=dy, dx=dx)


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """The rows [B, K, ...] that index [B, K] names out of rows [B, N, ...]; a copy."""
    batch, count = rows.shape[:2]
    # whole rows by memcpy; a gather would read an int64 index for every byte
    first = torch.arange(batch, device=index.device)[:, None] * count
    return rows.flatten(0, 1).index_select(0, (index.long() + first).flatten()).view(*index.shape, *rows.shape[2:])
