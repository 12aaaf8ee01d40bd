"""cube_embed against a convolution over the whole normalised clip."""

import pytest
import torch

from kernels import cube_embed
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from videomae import masking
from videomae.clip import sinusoid_positions


def make(frames=4, height=32, width=48, cube=(2, 16, 16), width_out=40, batch=2, seed=0, channels=3):
    torch.manual_seed(seed)
    clip = torch.randint(0, 256, (batch, frames, height, width, channels), dtype=torch.uint8)
    weight = torch.randn(width_out, channels, *cube, dtype=torch.float64) * 0.05
    bias = torch.randn(width_out, dtype=torch.float64)
    grid = (frames // cube[0], height // cube[1], width // cube[2])
    positions = sinusoid_positions(grid[0] * grid[1] * grid[2], width_out).double()
    return clip, weight.requires_grad_(), bias.requires_grad_(), positions, grid


def by_convolution(clip, weight, bias, positions, index):
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((clip.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    tokens = torch.nn.functional.conv3d(pixels, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = tokens + positions
    return tokens if index is None else torch.stack([t[i] for t, i in zip(tokens, index, strict=True)])


@pytest.mark.parametrize("cube", [(2, 16, 16), (1, 8, 8), (4, 8, 24)], ids=str)
@pytest.mark.parametrize("visible", [True, False], ids=["visible", "all"])
def test_equals_a_convolution_with_a_gather(cube, visible):
    clip, weight, bias, positions, grid = make(height=32, width=48, cube=cube)
    mask = masking.random(grid, 0.5, keys=torch.arange(2)) if visible else None
    index = None if mask is None else mask.visible
    got = cube_embed(clip, weight, bias, positions, index)
    wanted = by_convolution(clip, weight, bias, positions, index)
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, (weight, bias), upstream), torch.autograd.grad(wanted, (weight, bias), upstream)
    )


def test_takes_normalised_float_frames_as_they_are():
    clip, weight, bias, positions, _ = make()
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(
        cube_embed((clip.double() / 255 - mean) / std, weight, bias, positions),
        cube_embed(clip, weight, bias, positions),
    )


def test_uses_the_given_mean_and_std():
    clip, weight, bias, positions, _ = make()
    half = cube_embed(clip, weight, bias, positions, mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.testing.assert_close(half, cube_embed(clip.double() / 127.5 - 1, weight, bias, positions))


def test_takes_an_empty_batch_and_one_channel():
    clip, weight, bias, positions, _ = make(batch=0)
    assert cube_embed(clip, weight, bias, positions).shape == (0, 12, 40)
    clip, weight, bias, positions, _ = make(channels=1)
    assert cube_embed(clip, weight, bias, positions, mean=(0.5,), std=(0.5,)).shape == (2, 12, 40)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frames": torch.zeros(2, 4, 32, 40, 3, dtype=torch.uint8)}, "multiples of the cube"),
        ({"frames": torch.zeros(4, 32, 48, 3, dtype=torch.uint8)}, r"\[B, T, H, W, C\]"),
        ({"frames": torch.zeros(2, 4, 32, 48, 3, dtype=torch.int32)}, "uint8"),
        ({"index": torch.zeros(2, 12, dtype=torch.bool)}, "from_bool"),
        ({"index": torch.zeros(3, 4, dtype=torch.int64)}, "one row per clip"),
        ({"positions": torch.zeros(11, 40)}, "positions must be"),
        ({"bias": torch.zeros(39)}, "bias must be"),
        ({"mean": (0.5,)}, "3 channels"),
    ],
    ids=["width", "no batch", "int32", "boolean index", "index rows", "positions", "bias", "mean"],
)
def test_refuses(change, says):
    clip, weight, bias, positions, _ = make()
    arguments = {"frames": clip, "weight": weight, "bias": bias, "positions": positions} | change
    with pytest.raises(ValueError, match=says):
        cube_embed(**arguments)
