"""attention over the visible tokens from packed qkv, beside every backend of scaled_dot_product_attention with the
views and copies that packed qkv costs it; there, and over the decoder's sequence, every usable back end of
`videomae.attention` too, whose table is made of the times.

    pytest bench/bench_attention.py --benchmark-only
    python -m bench.gpu --only attention --keep-attention       # writes the table, videomae/attention.json
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import kernels
from bench.compare import Contender, Contest, Inputs, Result, Setting, Work, results
from bench.pairs import SIZES, beside_each_other, beside_transformers, on_cpu, on_gpu
from bench.shapes import CPU_CLIPS, Shape, shape_of
from kernels.attention import attention_ref
from videomae import attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# what videomae.attention calls the contenders that it has by another name
NAMES = {"ours": "triton", "eager": "sdpa", "flash": "sdpa-flash", "cudnn": "sdpa-cudnn"}
# clips for which the reference has its weights at a time: all 64 would need 15 GB over the decoder's sequence
TRUTH_CLIPS = 8


@dataclass(frozen=True)
class Tokens:
    """One of a model's two sequences: of the visible tokens, V, or of all, N."""

    letter: str
    clips: int
    length: int
    heads: int
    head_width: int

    @property
    def where(self) -> str:
        return f"B={self.clips} {self.letter}={self.length} A={self.heads} d={self.head_width}"

    @property
    def key(self) -> str:
        """How videomae.attention's table names it."""
        return f"{self.length}x{self.head_width}"


def sequences(shape: Shape) -> tuple[Tokens, Tokens]:
    """The encoder's and the decoder's, whose heads are as wide."""
    wide = shape.head_width
    return (
        Tokens("V", shape.clips, shape.num_visible, shape.heads, wide),
        Tokens("N", shape.clips, shape.num_cubes, shape.decoder_width // wide, wide),
    )


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


def truth(qkv: Tensor) -> Tensor:
    """The reference, a few clips at a time."""
    return torch.cat([checkpoint(attention_ref, part, use_reentrant=False) for part in qkv.split(TRUTH_CLIPS)])


def usable(tokens: Tokens, setting: Setting) -> dict[str, Contender]:
    """The back ends of videomae.attention that can run here, but for those that are contenders by another name."""
    question = (setting.device, setting.dtype, tokens.length, tokens.head_width)
    names = [name for name, backend in attention.BACKENDS.items() if not backend.refusal(*question)]
    return {name: partial(attention.attend, backend=name) for name in names if name not in NAMES.values()}


def contest(shape: Shape, setting: Setting, tokens: Tokens, contenders: dict[str, Contender]) -> Contest:
    token = tokens.clips * tokens.length * tokens.heads * tokens.head_width * setting.dtype.itemsize
    product = 2 * tokens.clips * tokens.heads * tokens.length**2 * tokens.head_width
    sums = 4 * tokens.clips * tokens.heads * tokens.length

    def make(seed: int) -> Inputs:
        generator = torch.Generator(setting.device).manual_seed(seed)
        sizes = (tokens.clips, tokens.length, 3, tokens.heads, tokens.head_width)
        qkv = torch.randn(sizes, generator=generator, device=setting.device)
        return {"qkv": qkv.to(setting.dtype).requires_grad_()}

    # reads qkv; writes out and the logarithms of the sums: two products
    forward = Work(3 * token, token + sums, 2 * product)
    # reads qkv, out, dout, sums; writes dqkv: five products
    backward = Work(5 * token + sums, 3 * token, 5 * product)
    work = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    contenders = contenders | usable(tokens, setting)
    return Contest("attention", shape.size, tokens.where, make, contenders, truth, work)


def contests(shape: Shape, setting: Setting) -> list[Contest]:
    """Over the visible tokens, what our kernel is for; over all, only what videomae.attention may choose."""
    encoder, decoder = sequences(shape)
    all_backends = {name: with_backend(backend) for name, backend in BACKENDS.items()}
    chosen = {name: all_backends[name] for name in ("flash", "cudnn")}
    return [
        contest(shape, setting, encoder, {"ours": kernels.attention, "eager": eager} | all_backends),
        contest(shape, setting, decoder, {"triton": kernels.attention, "eager": eager} | chosen),
    ]


def rows(shape: Shape, setting: Setting) -> list[Result]:
    return [r for one in contests(shape, setting) for r in results(one, setting)]


def proposal(found: Iterable[Result], shapes: Sequence[Shape]) -> dict[str, Any]:
    """A GPU's part of videomae.attention's table: all back ends that were timed, fastest first.

    Of two sizes with one sequence, which differ in the number of heads, the last counts.
    """
    keys = {(shape.size, tokens.where): tokens.key for shape in shapes for tokens in sequences(shape)}
    times: dict[tuple[str, str], dict[str, float]] = {}
    for r in found:
        key, name = keys.get((r.size, r.shape)), NAMES.get(r.contender, r.contender)
        if key and r.op == "attention" and r.part == "forward+backward" and r.timing and name in attention.BACKENDS:
            times.setdefault((key, r.size), {})[name] = round(r.timing.median, 1)
    table = {}
    for (key, _), us in times.items():
        fastest_first = dict(sorted(us.items(), key=lambda item: item[1]))
        table[key] = {"choice": next(iter(fastest_first)), "us": fastest_first}
    return table


def keep(found: dict[str, Any], path: Path) -> None:
    """Put what was found, by GPU, into the table at path; its other GPUs and shapes stay."""
    table = json.loads(path.read_text())
    for gpu, shapes in found.items():
        table[gpu] = table.get(gpu, {}) | shapes
    path.write_text(json.dumps(table, indent=1) + "\n")


@on_cpu
@pytest.mark.benchmark(group="attention")
def test_attention_beside_transformers(benchmark, capsys):
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.videomae.modeling_videomae import VideoMAESelfAttention

    shape = shape_of("vit_base", CPU_CLIPS)
    one, _ = contests(shape, Setting.cpu())
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
