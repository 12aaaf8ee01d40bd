"""attention over the visible tokens from packed qkv, beside every backend of scaled_dot_product_attention with the
views and copies that packed qkv costs it.

    pytest bench/bench_attention.py --benchmark-only
"""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import kernels
from bench.compare import Contender, Contest, Inputs, Result, Setting, Work, results
from bench.pairs import SIZES, beside_each_other, beside_transformers, on_cpu, on_gpu
from bench.shapes import CPU_CLIPS, Shape, shape_of
from kernels.attention import attention_ref

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def heads_first(qkv: Tensor) -> list[Tensor]:
    """q, k, v [B, A, V, d]: views, split so that their gradients are joined in one copy."""
    clips, tokens, _, heads, width = qkv.shape
    parts = qkv.flatten(2).split(heads * width, dim=-1)
    return [part.view(clips, tokens, heads, width).transpose(1, 2) for part in parts]


def eager(qkv: Tensor) -> Tensor:
    """With the backend that PyTorch chooses."""
    return scaled_dot_product_attention(*heads_first(qkv)).transpose(1, 2).flatten(2)


def with_backend(backend: SDPBackend) -> Contender:
    def run(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return eager(qkv)

    return run


def contest(shape: Shape, setting: Setting) -> Contest:
    tokens = shape.num_visible
    token = shape.clips * tokens * shape.width * setting.dtype.itemsize
    product = 2 * shape.clips * shape.heads * tokens * tokens * shape.head_width
    sums = 4 * shape.clips * shape.heads * tokens

    def make(seed: int) -> Inputs:
        generator = torch.Generator(setting.device).manual_seed(seed)
        sizes = (shape.clips, tokens, 3, shape.heads, shape.head_width)
        qkv = torch.randn(sizes, generator=generator, device=setting.device)
        return {"qkv": qkv.to(setting.dtype).requires_grad_()}

    # reads qkv; writes out and the logarithms of the sums: two products
    forward = Work(3 * token, token + sums, 2 * product)
    # reads qkv, out, dout, sums; writes dqkv: five products
    backward = Work(5 * token + sums, 3 * token, 5 * product)
    contenders = {"ours": kernels.attention, "eager": eager}
    contenders |= {name: with_backend(backend) for name, backend in BACKENDS.items()}
    work = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    where = f"B={shape.clips} V={tokens} A={shape.heads} d={shape.head_width}"
    return Contest("attention", shape.size, where, make, contenders, attention_ref, work)


def contests(shape: Shape, setting: Setting) -> list[Contest]:
    return [contest(shape, setting)]


def rows(shape: Shape, setting: Setting) -> list[Result]:
    return results(contest(shape, setting), setting)


@on_cpu
@pytest.mark.benchmark(group="attention")
def test_attention_beside_transformers(benchmark, capsys):
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.videomae.modeling_videomae import VideoMAESelfAttention

    shape = shape_of("vit_base", CPU_CLIPS)
    one = contest(shape, Setting.cpu())
    config = transformers.VideoMAEConfig(hidden_size=shape.width, num_attention_heads=shape.heads)
    module = VideoMAESelfAttention(config).eval()

    def theirs(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed, _ = sdpa_attention_forward(module, q, k, v, None, scaling=module.scaling, is_causal=module.is_causal)
        return mixed.reshape(*mixed.shape[:2], shape.width)

    beside_transformers(benchmark, capsys, one, theirs, one.make(0))


@on_gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="attention")
def test_attention_beside_pytorch(benchmark, capsys, size):
    beside_each_other(benchmark, capsys, contests(shape_of(size), Setting.gpu()))
