"""pixel_loss: loss and gradient straight from uint8 frames, beside the path by way of a float video.

pytest bench/bench_pixel_loss.py --benchmark-only
"""

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

import kernels
from bench.compare import Contest, Inputs, Result, Setting, Work, results
from bench.pairs import SIZES, beside_each_other, beside_transformers, on_cpu, on_gpu
from bench.shapes import CHANNELS, CPU_CLIPS, CUBE, Shape, shape_of
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from kernels.pixel_loss import pixel_loss_ref

DT, DY, DX = CUBE


def ours(pred: Tensor, frames: Tensor, masked: Tensor, **_: Tensor) -> Tensor:
    return kernels.pixel_loss(pred, frames, masked, cube=CUBE)


def truth(pred: Tensor, frames: Tensor, masked: Tensor, **_: Tensor) -> Tensor:
    return pixel_loss_ref(pred, frames, masked, CUBE, True, None, 1.0, IMAGENET_MEAN, IMAGENET_STD)


def normalised_cubes(video: Tensor) -> Tensor:
    """[B, N, P * C] of a video [B, T, H, W, C] in [0, 1]: each cube and channel to mean 0 and deviation 1."""
    cubes = rearrange(video, "b (t dt) (h dy) (w dx) c -> b (t h w) (dt dy dx) c", dt=DT, dy=DY, dx=DX)
    deviation = cubes.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6
    return ((cubes - cubes.mean(dim=2, keepdim=True)) / deviation).flatten(2)


def eager(pred: Tensor, frames: Tensor, masked: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The published way: a normalised float video, normalisation undone, every cube's target, the masked ones picked.

    By gather: a boolean mask would wait for the GPU to count it, which a captured graph cannot.
    """
    video = (frames.float() / 255 - mean) / std
    labels = normalised_cubes(video * std + mean)
    labels = labels.gather(1, masked[..., None].expand(-1, -1, labels.shape[2]))
    return functional.mse_loss(pred.float(), labels)


def contest(shape: Shape, setting: Setting) -> Contest:
    entries = shape.clips * shape.num_masked * shape.cube_values
    item = setting.dtype.itemsize

    def make(seed: int) -> Inputs:
        generator = torch.Generator(setting.device).manual_seed(seed)
        sizes = (shape.clips, shape.frames, shape.side, shape.side, CHANNELS)
        frames = torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator, device=setting.device)
        sizes = (shape.clips, shape.num_masked, shape.cube_values)
        pred = torch.randn(sizes, generator=generator, device=setting.device).to(setting.dtype)
        mean, std = (torch.tensor(v, device=setting.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
        masked = shape.mask(seed, setting.device).masked
        return {"pred": pred.requires_grad_(), "frames": frames, "masked": masked, "mean": mean, "std": std}

    # reads predictions and one byte for every pixel value of a masked cube; writes the gradient. The kernel does both
    # passes in one
    work = {"forward+backward": Work(entries * (item + 1) + 8 * shape.clips * shape.num_masked, entries * item)}
    where = f"B={shape.clips} M={shape.num_masked} K={shape.cube_values}"
    return Contest("pixel_loss", shape.size, where, make, {"ours": ours, "eager": eager}, truth, work)


def contests(shape: Shape, setting: Setting) -> list[Contest]:
    return [contest(shape, setting)]


def rows(shape: Shape, setting: Setting) -> list[Result]:
    return results(contest(shape, setting), setting)


def as_transformers(pred: Tensor, video: Tensor, hidden: Tensor, **_: Tensor) -> Tensor:
    """What VideoMAEForPreTraining makes of its input video [B, T, C, H, W] and its mask, bool [B, N]."""
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        labels = normalised_cubes((video * std + mean).permute(0, 1, 3, 4, 2))
        labels = labels[hidden].reshape(pred.shape)
    return torch.nn.MSELoss()(pred, labels)


@on_cpu
@pytest.mark.benchmark(group="pixel_loss")
def test_pixel_loss_beside_transformers(benchmark, capsys):
    """The float video is made beforehand and not counted."""
    shape = shape_of("vit_base", CPU_CLIPS)
    one = contest(shape, Setting.cpu())
    inputs = one.make(0)
    video = (inputs["frames"].float() / 255 - inputs["mean"]) / inputs["std"]
    extra = {"video": video.permute(0, 1, 4, 2, 3).contiguous()}
    extra["hidden"] = shape.mask(0, Setting.cpu().device).to_bool()
    beside_transformers(benchmark, capsys, one, lambda **named: as_transformers(**named, **extra), inputs)


@on_gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="pixel_loss")
def test_pixel_loss_beside_pytorch(benchmark, capsys, size):
    beside_each_other(benchmark, capsys, contests(shape_of(size), Setting.gpu()))
