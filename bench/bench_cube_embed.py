"""cube_embed: tokens of the visible cubes from uint8 frames, beside convolving every cube and gathering.

pytest bench/bench_cube_embed.py --benchmark-only
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import kernels
from bench.compare import Contest, Inputs, Result, Setting, Work, results
from bench.pairs import SIZES, beside_each_other, beside_transformers, on_cpu, on_gpu
from bench.shapes import CHANNELS, CPU_CLIPS, CUBE, Shape, shape_of
from kernels.cube_embed import cube_embed_ref
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from videomae.clip import sinusoid_positions


def ours(frames: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, visible: Tensor, **_: Tensor) -> Tensor:
    return kernels.cube_embed(frames, weight, bias, positions, visible)


def truth(frames: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, visible: Tensor, **_: Tensor) -> Tensor:
    return cube_embed_ref(frames, weight, bias, positions, visible, IMAGENET_MEAN, IMAGENET_STD)


def eager(video: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, visible: Tensor, **_: Tensor) -> Tensor:
    """Every cube convolved, the visible ones gathered; the normalised video is there already and costs nothing."""
    tokens = functional.conv3d(video, weight, bias, stride=CUBE).flatten(2).transpose(1, 2) + positions
    return tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))


def from_uint8(frames: Tensor, mean: Tensor, std: Tensor, **named: Tensor) -> Tensor:
    """The same, with the video's normalisation counted."""
    video = ((frames.float() / 255 - mean) / std).to(named["weight"].dtype).permute(0, 4, 1, 2, 3)
    return eager(**(named | {"video": video.contiguous()}))


def contest(shape: Shape, setting: Setting) -> Contest:
    tokens, item = shape.clips * shape.num_visible, setting.dtype.itemsize
    pixels, width = tokens * shape.cube_values, shape.width

    def make(seed: int) -> Inputs:
        generator = torch.Generator(setting.device).manual_seed(seed)
        sizes = (shape.clips, shape.frames, shape.side, shape.side, CHANNELS)
        frames = torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator, device=setting.device)
        mean, std = (torch.tensor(v, device=setting.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
        weight = torch.randn(width, CHANNELS, *CUBE, generator=generator, device=setting.device) * 0.03
        bias = torch.randn(width, generator=generator, device=setting.device)
        return {
            "frames": frames,
            "video": ((frames.float() / 255 - mean) / std).to(setting.dtype).permute(0, 4, 1, 2, 3).contiguous(),
            "mean": mean,
            "std": std,
            "weight": weight.to(setting.dtype).requires_grad_(),
            "bias": bias.to(setting.dtype).requires_grad_(),
            "positions": sinusoid_positions(shape.num_cubes, width).to(setting.device, setting.dtype),
            "visible": shape.mask(seed, setting.device).visible,
        }

    flops = 2 * pixels * width
    out, weights = tokens * width * item, width * shape.cube_values * item
    work = {
        "forward": Work(pixels + weights, out, flops),  # reads the visible pixels, weight; writes tokens
        "backward": Work(pixels + out, weights, flops),  # reads the visible pixels, dy; writes dweight
    }
    contenders = {"ours": ours, "eager": eager, "from uint8": from_uint8}
    where = f"B={shape.clips} V={shape.num_visible} D={width}"
    return Contest("cube_embed", shape.size, where, make, contenders, truth, work)


def contests(shape: Shape, setting: Setting) -> list[Contest]:
    return [contest(shape, setting)]


def rows(shape: Shape, setting: Setting) -> list[Result]:
    return results(contest(shape, setting), setting)


@on_cpu
@pytest.mark.benchmark(group="cube_embed")
def test_cube_embed_beside_transformers(benchmark, capsys):
    """The float video that `transformers` takes is made beforehand and not counted."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.videomae.modeling_videomae import VideoMAEEmbeddings

    shape = shape_of("vit_base", CPU_CLIPS)
    one = contest(shape, Setting.cpu())
    inputs = one.make(0)
    embeddings = VideoMAEEmbeddings(transformers.VideoMAEConfig(hidden_size=shape.width))
    video = inputs["video"].transpose(1, 2).contiguous()
    hidden = shape.mask(0, Setting.cpu().device).to_bool()
    prefix = "patch_embeddings.projection."

    def theirs(weight: Tensor, bias: Tensor, **_: Tensor) -> Tensor:
        return torch.func.functional_call(
            embeddings, {prefix + "weight": weight, prefix + "bias": bias}, (video, hidden)
        )

    beside_transformers(benchmark, capsys, one, theirs, inputs)


@on_gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="cube_embed")
def test_cube_embed_beside_pytorch(benchmark, capsys, size):
    beside_each_other(benchmark, capsys, contests(shape_of(size), Setting.gpu()))
