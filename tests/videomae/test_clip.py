"""Geometry: grids, the position table's published values, and cubes there and back."""

import pytest
import torch

from videomae.clip import from_cubes, grid_of, sinusoid_positions, to_cubes


def test_position_table_has_the_published_values():
    table = sinusoid_positions(1568, 768)
    assert table.dtype == torch.float32
    assert table[0].tolist() == [0, 1] * 384
    expected = {(1, 0): 0.841471, (1, 1): 0.540302, (1, 2): 0.828431, (1, 3): 0.560091, (100, 100): -0.956366}
    expected |= {(1567, 0): 0.608948, (1567, 1): -0.793210, (1567, 766): 0.159816, (1567, 767): 0.987147}
    for (p, j), value in expected.items():
        assert abs(table[p, j].item() - value) < 1e-6
    small = sinusoid_positions(1568, 384)
    for (p, j), value in {(1, 2): 0.815251, (1, 3): 0.579108, (100, 100): 0.333112}.items():
        assert abs(small[p, j].item() - value) < 1e-6


def test_cubes_are_ordered_by_time_row_column_and_channel_fastest():
    t, y, x, c = torch.meshgrid(*(torch.arange(n) for n in (4, 32, 48, 3)), indexing="ij")
    frames = (t * 1000000 + y * 10000 + x * 10 + c)[None].double()
    cubes = to_cubes(frames, (2, 16, 16))
    assert cubes.shape == (1, 12, 1536)
    # token (t=1, h=1, w=2), inside it (dt=1, dy=3, dx=5), channel 2
    assert cubes[0, (1 * 2 + 1) * 3 + 2, ((1 * 16 + 3) * 16 + 5) * 3 + 2] == 3 * 1000000 + 19 * 10000 + 37 * 10 + 2
    assert torch.equal(from_cubes(cubes, (2, 2, 3), (2, 16, 16)), frames)


def test_grid_refuses_sizes_the_cube_does_not_divide():
    assert grid_of(16, 224, 320, (2, 16, 16)) == (8, 14, 20)
    with pytest.raises(ValueError, match="height must be a multiple of the cube's 16; got 225"):
        grid_of(16, 225, 224, (2, 16, 16))
    with pytest.raises(ValueError, match="positive"):
        grid_of(16, 224, 224, (0, 16, 16))
