"""bias_gelu: the activation of an MLP, at the encoder's and the decoder's width.

pytest bench/bench_bias_gelu.py --benchmark-only
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import kernels
from bench.compare import Contest, Inputs, Result, Setting, Work, results
from bench.pairs import SIZES, beside_each_other, beside_transformers, on_cpu, on_gpu
from bench.shapes import CPU_CLIPS, Shape, shape_of
from kernels.bias_gelu import bias_gelu_ref


def eager(x: Tensor, b: Tensor) -> Tensor:
    return functional.gelu(x + b)


def contest(shape: Shape, setting: Setting, tokens: int, width: int) -> Contest:
    rows = shape.clips * tokens
    size = rows * width * setting.dtype.itemsize

    def make(seed: int) -> Inputs:
        generator = torch.Generator(setting.device).manual_seed(seed)
        x = torch.randn(shape.clips, tokens, width, generator=generator, device=setting.device)
        b = torch.randn(width, generator=generator, device=setting.device)
        return {"x": x.to(setting.dtype).requires_grad_(), "b": b.to(setting.dtype).requires_grad_()}

    work = {
        "forward": Work(size, size),  # reads x; writes y
        "backward": Work(2 * size, size),  # reads dy, x; writes dx
    }
    contenders = {"ours": kernels.bias_gelu, "eager": eager}
    return Contest("bias_gelu", shape.size, f"R={rows} D={width}", make, contenders, bias_gelu_ref, work)


def contests(shape: Shape, setting: Setting) -> list[Contest]:
    """Encoder blocks see the visible tokens, decoder blocks all."""
    encoder = contest(shape, setting, shape.num_visible, 4 * shape.width)
    return [encoder, contest(shape, setting, shape.num_cubes, 4 * shape.decoder_width)]


def rows(shape: Shape, setting: Setting) -> list[Result]:
    return [r for c in contests(shape, setting) for r in results(c, setting)]


@on_cpu
@pytest.mark.benchmark(group="bias_gelu")
def test_bias_gelu_beside_transformers(benchmark, capsys):
    pytest.importorskip("transformers")
    from transformers.activations import ACT2FN

    shape = shape_of("vit_base", CPU_CLIPS)
    one = contest(shape, Setting.cpu(), shape.num_cubes, 4 * shape.decoder_width)
    activation = ACT2FN["gelu"]  # what VideoMAEConfig's hidden_act names
    beside_transformers(benchmark, capsys, one, lambda x, b: activation(x + b), one.make(0))


@on_gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="bias_gelu")
def test_bias_gelu_beside_pytorch(benchmark, capsys, size):
    beside_each_other(benchmark, capsys, contests(shape_of(size), Setting.gpu()))
