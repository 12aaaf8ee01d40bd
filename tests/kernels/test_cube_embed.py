"""cube_embed: the reference against a convolution over the whole normalised clip, the kernel against the reference."""

import pytest
import torch

from kernels import cube_embed, tiles
from kernels.cube_embed import _splits, cube_embed_ref, fold_values, forward_op
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from tests.kernels.harness import DTYPES, assert_matches, assert_works_captured, assert_works_compiled, sweep
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


def kernel_case(dtype, device, count=5, **sizes):
    """A clip, its leaves at that dtype, and which cubes: count of them, or all without."""
    clip, weight, bias, positions, grid = make(**sizes)
    num_cubes = grid[0] * grid[1] * grid[2]
    index = None if count is None else torch.stack([torch.randperm(num_cubes)[:count] for _ in range(len(clip))])
    leaves = [t.detach().to(device, dtype) for t in (weight, bias)]
    dy = torch.randn(len(clip), num_cubes if index is None else count, weight.shape[0]).to(device, dtype)
    return clip.to(device), leaves, positions.float().to(device), None if index is None else index.to(device), dy


def assert_kernel_matches(clip, leaves, positions, index, dy, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    def op(weight, bias):
        return cube_embed(clip, weight, bias, positions, index, mean=mean, std=std)

    def reference(weight, bias):
        return cube_embed_ref(clip, weight, bias, positions.to(weight.dtype), index, mean, std)

    assert_matches(op, reference, reference, leaves, (dy,))


# smallest; odd width; one past a tile of rows and of columns; ViT-S, two clips of 16x112x112; other cubes, channels,
# sides that are no powers of two; a cube row of 8 values, read by single bytes
KERNEL_CASES = {
    "one cube": {"frames": 2, "height": 16, "width": 16, "width_out": 1, "batch": 1, "count": 1},
    "odd": {"width_out": 37, "batch": 3},
    "past a tile": {"height": 160, "width": 144, "width_out": 129, "batch": 1, "count": 129},
    "real": {"frames": 16, "height": 112, "width": 112, "width_out": 384, "count": 40},
    "every cube": {"count": None},
    "cube 1x8x8": {"cube": (1, 8, 8), "count": 31},
    "cube 4x32x32": {"height": 64, "width": 64, "cube": (4, 32, 32), "count": 3},
    "cube 2x14x14": {"height": 42, "width": 56, "cube": (2, 14, 14), "count": 7},
    "cube 3x12x20": {"frames": 6, "height": 36, "width": 60, "cube": (3, 12, 20), "count": 7},
    "one channel": {"channels": 1, "cube": (1, 8, 8)},
    "five channels": {"channels": 5, "cube": (1, 8, 8)},
}


@pytest.mark.parametrize(
    ("case", "dtype"), sweep(KERNEL_CASES, half=["odd", "every cube"], long=["real", "past a tile", "cube 4x32x32"])
)
def test_kernel_matches_the_reference(case, dtype, kernel_device):
    sizes = KERNEL_CASES[case]
    channels = sizes.get("channels", 3)
    mean, std = (0.485, 0.456, 0.406, 0.1, 0.9)[:channels], (0.229, 0.224, 0.225, 0.5, 0.05)[:channels]
    assert_kernel_matches(*kernel_case(dtype, kernel_device, **sizes), mean, std)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_takes_normalised_float_frames(dtype, kernel_device):
    clip, leaves, positions, index, dy = kernel_case(dtype, kernel_device)
    assert_kernel_matches(torch.randn(clip.shape, device=kernel_device).to(dtype), leaves, positions, index, dy)


def test_kernel_sums_over_many_splits_and_uneven_ones(kernel_device):
    """Rows of backward's sum in three parts: they are added up, and the last one is short."""
    sizes = {"height": 48, "width": 56, "cube": (1, 8, 8), "width_out": 9, "batch": 2, "channels": 1}
    case = kernel_case(torch.float32, kernel_device, count=97, **sizes)
    tile = {"OUTER": 16, "COLS": 64, "ROWS": 16, "num_warps": 4, "num_stages": 2}
    assert _splits(194, 64, 1, 16, torch.float32, torch.device("cpu")) == 3
    with tiles.trying("cube_embed.backward", tile):
        assert_kernel_matches(*case, mean=(0.4,), std=(0.2,))


def test_splits_keep_a_gpu_busy_and_take_no_more_memory_than_the_tokens():
    with tiles.assuming(tiles.Target("some GPU", 90, 132)):
        for width in (384, 768, 1024, 1280):
            num_tiles = 12 * -(-width // 128)
            splits = _splits(64 * 160, 1536, num_tiles, 64, torch.bfloat16, torch.device("cuda"))
            busy = splits * num_tiles / 132
            assert busy / -(-busy // 1) > 0.7
            assert splits * width * 1536 * 4 <= 64 * 160 * width * 2


def test_kernel_goes_past_a_tile_both_ways(kernel_device):
    tile = {"ROWS": 16, "COLS": 16, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    with tiles.trying("cube_embed.forward", tile):
        assert_kernel_matches(
            *kernel_case(torch.float32, kernel_device, count=17, cube=(1, 8, 8), width_out=17, batch=1)
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_kernel_takes_any_integers_as_index(dtype, kernel_device):
    clip, (weight, bias), positions, index, _ = kernel_case(torch.float32, kernel_device)
    wanted = cube_embed_ref(clip, weight, bias, positions, index, IMAGENET_MEAN, IMAGENET_STD)
    got = cube_embed(clip, weight, bias, positions, index.to(dtype))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_kernel_gives_nan_for_a_cube_that_is_none(kernel_device):
    clip, (weight, bias), positions, index, _ = kernel_case(torch.float32, kernel_device)
    for wrong in (-1, 12, 2**40):
        broken = index.clone()
        broken[0, 2] = wrong
        got = cube_embed(clip, weight, bias, positions, broken)
        assert got[0, 2].isnan().all()
        assert got.isnan().sum() == got.shape[2]


def test_kernel_follows_autocast_and_gives_float32_gradients(kernel_device):
    clip, leaves, positions, index, dy = kernel_case(torch.float32, kernel_device)
    weight, bias = (t.requires_grad_() for t in leaves)
    half = torch.float16
    with torch.autocast(kernel_device, dtype=half):
        tokens = cube_embed(clip, weight, bias, positions, index)
    dweight, dbias = torch.autograd.grad(tokens, (weight, bias), dy.to(half))
    assert (tokens.dtype, dweight.dtype, dbias.dtype) == (half, torch.float32, torch.float32)
    wanted = cube_embed_ref(clip, weight, bias, positions, index, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(tokens.float(), wanted, atol=2e-2, rtol=2e-3)


def test_kernel_takes_an_empty_batch(kernel_device):
    clip, leaves, positions, index, dy = kernel_case(torch.float32, kernel_device)
    weight, bias = (t.requires_grad_() for t in leaves)
    tokens = cube_embed(clip[:0], weight, bias, positions, index[:0])
    dweight, dbias = torch.autograd.grad(tokens, (weight, bias), dy[:0])
    assert tokens.shape == (0, 5, 40)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize("indexed", [True, False])
def test_kernel_is_registered_as_torch_wants_it(indexed, bare_kernel_device):
    clip, (weight, bias), positions, index, _ = kernel_case(torch.float32, bare_kernel_device, width_out=16)
    leaves = (weight.requires_grad_(), bias.requires_grad_())
    constants = (fold_values(clip, IMAGENET_MEAN, IMAGENET_STD), torch.float32)
    torch.library.opcheck(forward_op, (clip, *leaves, positions, index if indexed else None, *constants))


def test_kernel_works_compiled(kernel_device):
    clip, leaves, positions, index, dy = kernel_case(torch.float32, kernel_device)
    assert_works_compiled(lambda weight, bias: cube_embed(clip, weight, bias, positions, index), leaves, (dy,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_works_captured(kernel_device):
    clip, leaves, positions, index, dy = kernel_case(torch.bfloat16, kernel_device)
    assert_works_captured(lambda weight, bias: cube_embed(clip, weight, bias, positions, index), leaves, (dy,))


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
        ({"frames": torch.zeros(2, 3, 4, 32, 48, dtype=torch.uint8).movedim(1, -1)}, "frames must be contiguous"),
        ({"weight": torch.zeros(40, 2, 16, 16, 3).movedim(-1, 1)}, "weight must be contiguous"),
        ({"index": torch.zeros(4, 2, dtype=torch.int64).t()}, "index must be contiguous"),
        ({"bias": torch.zeros(40, device="meta")}, "bias is on meta, frames on cpu"),
        ({"positions": torch.zeros(12, 40, requires_grad=True)}, "positions are fixed"),
    ],
    ids=[
        "width",
        "no batch",
        "int32",
        "boolean index",
        "index rows",
        "positions",
        "bias",
        "mean",
        "frames' strides",
        "weight's strides",
        "index's strides",
        "device",
        "trained positions",
    ],  # fmt: skip
)
def test_refuses(change, says):
    clip, weight, bias, positions, _ = make()
    arguments = {"frames": clip, "weight": weight, "bias": bias, "positions": positions} | change
    with pytest.raises(ValueError, match=says):
        cube_embed(**arguments)
