"""layer_norm: bias, residual add and norm, at the encoder's and the decoder's width.

pytest bench/bench_layer_norm.py --benchmark-only
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import kernels
from bench.compare import Contest, Inputs, Result, Setting, Work, results
from bench.pairs import SIZES, beside_each_other, beside_transformers, on_cpu, on_gpu
from bench.shapes import CPU_CLIPS, Shape, shape_of
from kernels.layer_norm import layer_norm_ref

EPS = 1e-6


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.layer_norm(x, residual, weight, bias, EPS, x_bias)


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + x_bias + residual
    return functional.layer_norm(total, total.shape[-1:], weight, bias, EPS), total


def truth(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> tuple[Tensor, Tensor]:
    return layer_norm_ref(x, residual, weight, bias, EPS, x_bias)


def contest(shape: Shape, setting: Setting, tokens: int, width: int) -> Contest:
    rows = shape.clips * tokens
    size = rows * width * setting.dtype.itemsize

    def make(seed: int) -> Inputs:
        generator = torch.Generator(setting.device).manual_seed(seed)

        def random(*sizes: int) -> Tensor:
            values = torch.randn(*sizes, generator=generator, device=setting.device).to(setting.dtype)
            return values.requires_grad_()

        named = {"x": random(shape.clips, tokens, width), "residual": random(shape.clips, tokens, width)}
        return named | {name: random(width) for name in ("weight", "bias", "x_bias")}

    work = {
        "forward": Work(2 * size, 2 * size + 8 * rows),  # reads x, residual; writes s, y, and a row's two statistics
        "backward": Work(3 * size + 8 * rows, size),  # reads dy, ds, s, statistics; writes dx, the residual's too
    }
    where = f"R={rows} D={width}"
    return Contest("layer_norm", shape.size, where, make, {"ours": ours, "eager": eager}, truth, work)


def contests(shape: Shape, setting: Setting) -> list[Contest]:
    """Encoder blocks see the visible tokens, decoder blocks all."""
    encoder = contest(shape, setting, shape.num_visible, shape.width)
    return [encoder, contest(shape, setting, shape.num_cubes, shape.decoder_width)]


def rows(shape: Shape, setting: Setting) -> list[Result]:
    return [r for c in contests(shape, setting) for r in results(c, setting)]


@on_cpu
@pytest.mark.benchmark(group="layer_norm")
def test_layer_norm_beside_transformers(benchmark, capsys):
    transformers = pytest.importorskip("transformers")
    from transformers.models.videomae.modeling_videomae import VideoMAELayer

    one = contest(shape := shape_of("vit_base", CPU_CLIPS), Setting.cpu(), shape.num_cubes, shape.decoder_width)
    config = transformers.VideoMAEConfig(hidden_size=shape.decoder_width, num_attention_heads=6, layer_norm_eps=EPS)
    norm = VideoMAELayer(config).layernorm_after

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + x_bias + residual
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (total,)), total

    beside_transformers(benchmark, capsys, one, theirs, one.make(0))


@on_gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="layer_norm")
def test_layer_norm_beside_pytorch(benchmark, capsys, size):
    beside_each_other(benchmark, capsys, contests(shape_of(size), Setting.gpu()))
