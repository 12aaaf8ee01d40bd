"""What S, B, L and H start in training: every kernel specialisation, found by running the ops on tensors without data.

A specialisation is a kernel with its argument types and compile-time constants. Those of the published recipes are
listed here and nowhere else; the tiles come from `kernels.tiles`, as in training.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kernels.aot.specialise import Specialisation, specialise
from kernels.attention import _backward as attention_backward
from kernels.attention import _forward as attention_forward
from kernels.bias_gelu import _backward as bias_gelu_backward
from kernels.bias_gelu import _forward as bias_gelu_forward
from kernels.cube_embed import _backward as cube_embed_backward
from kernels.cube_embed import _forward as cube_embed_forward
from kernels.cube_embed import fold_values
from kernels.decoder_input import _backward as decoder_input_backward
from kernels.decoder_input import _forward as decoder_input_forward
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD, Launch, recording
from kernels.layer_norm import _backward as layer_norm_backward
from kernels.layer_norm import _forward as layer_norm_forward
from kernels.pixel_loss import _forward as pixel_loss_forward
from kernels.pixel_loss import _rescale as pixel_loss_rescale
from kernels.split_heads import _join as split_heads_join
from kernels.tiles import Target, assuming, measured_on
from videomae.model import SIZES, Size

ARCHITECTURES = (80, 90, 100, 120)
PUBLISHED = ("vit_small", "vit_base", "vit_large", "vit_huge")
CUBE = (2, 16, 16)
# any batch that is a multiple of 16 starts the same specialisations
BATCH = 64
# visible cubes at 90 % (the recipes), 95 % and 75 % tube masking of 8 x 14 x 14
VISIBLE = (160, 80, 392)
NUM_CUBES = 1568
# multiprocessors of the A100, H200, B200 and RTX 5090: they set how many programs share a sum
PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


def arch_option(text: str) -> int:
    """A compute capability on a command line; refused below 8.0, which has no bfloat16."""
    if not text.isdecimal() or int(text) < 80:
        raise ArgumentTypeError(f"the kernels need compute capability 8.0 or later, written 80; got {text!r}")
    return int(text)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _pixel_ops(size: Size, visible: int, dtype: torch.dtype) -> None:
    """Cube embedding of the visible and of all cubes, decoder input, and the loss with and without weights."""
    D, E, wide = size.width, size.decoder_width, torch.float32
    masked = NUM_CUBES - visible
    frames = _empty(BATCH, 16, 224, 224, 3, dtype=torch.uint8)
    seen, hidden = (_empty(BATCH, n, dtype=torch.int64) for n in (visible, masked))
    weight, bias = _empty(D, 3, *CUBE, dtype=wide), _empty(D, dtype=wide)
    values = fold_values(frames, IMAGENET_MEAN, IMAGENET_STD)
    for index in (seen, None):
        arguments = (frames, weight, bias, _empty(NUM_CUBES, D, dtype=wide), index, values)
        tokens = cube_embed_forward(*arguments, dtype)
        cube_embed_backward(tokens, frames, index, values, CUBE, wide, wide)
    positions = _empty(NUM_CUBES, E, dtype=dtype)  # the model casts them
    sequence = decoder_input_forward(
        _empty(BATCH, visible, E, dtype=dtype), _empty(E, dtype=wide), positions, seen, hidden
    )
    decoder_input_backward(sequence, visible, wide)
    pred = _empty(BATCH, masked, 1536, dtype=dtype)
    for factor, writes in ((None, True), (_empty(BATCH, dtype=wide), True), (None, False)):
        pixel_loss_forward(pred, frames, hidden, factor, None, None, CUBE, True, "mse", 1.0, writes)
    pixel_loss_rescale(pred, _empty(1, dtype=wide))


def _block_ops(width: int, heads: int, tokens: int, attention: bool, dtype: torch.dtype) -> None:
    """Norms, bias and GELU, the gradients of q, k and v, and attention of one transformer block."""
    x, weight = _empty(BATCH * tokens, width, dtype=dtype), _empty(width, dtype=torch.float32)
    # after a branch with its bias, after one that drop path has added it to, and the first norm, after none
    for residual, x_bias in ((x, weight), (x, None), (None, None)):
        _, _, mean, rstd = layer_norm_forward(x, residual, weight, weight, 1e-6, x_bias)
    # of the last norm nobody reads the sum
    for ds in (x, None):
        for num_sums in (3, 2):
            layer_norm_backward(x, ds, x, weight, mean, rstd, num_sums)
    hidden, bias = _empty(BATCH * tokens, 4 * width, dtype=dtype), _empty(4 * width, dtype=torch.float32)
    bias_gelu_forward(hidden, bias)
    bias_gelu_backward(hidden, hidden, bias)
    split = _empty(BATCH, tokens, heads, width // heads, dtype=dtype)
    split_heads_join(split, split, split)
    if attention:
        qkv = _empty(BATCH, tokens, 3, heads, width // heads, dtype=dtype)
        out, lse = attention_forward(qkv)
        attention_backward(out, qkv, out, lse)


def launches(size: Size, dtype: torch.dtype) -> list[Launch]:
    """Every kernel start of a training step of that size, at each of the mask ratios."""
    with recording() as found:
        for visible in VISIBLE:
            _pixel_ops(size, visible, dtype)
            _block_ops(size.width, size.heads, visible, True, dtype)
        _block_ops(size.decoder_width, size.decoder_heads, NUM_CUBES, False, dtype)
    return found


def target_for(architecture: int) -> Target:
    """A GPU of that compute capability, by no name: its tiles are the analytic defaults."""
    return Target(f"sm_{architecture}", architecture, PROCESSORS.get(architecture, 132))


def specialisations(
    architecture: int, sizes: tuple[str, ...] = PUBLISHED, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
) -> Iterator[Specialisation]:
    """Each different one once: with the default tiles, then with those measured on GPUs of the architecture."""
    seen: dict[str, Specialisation] = {}
    for found in _started(target_for(architecture), sizes, dtypes):
        if seen.setdefault(found.name, found) != found:
            raise ValueError(f"two specialisations are called {found.name}: {seen[found.name]} and {found}")
    unnamed = {replace(found, name="") for found in seen.values()}
    for target in measured_on(architecture):
        for found in _started(target, sizes, dtypes):
            if replace(found, name="") not in unnamed:
                named = replace(found, name=_with_tile(found, target), gpu=target.key)
                seen[named.name] = named
    yield from seen.values()


def _started(target: Target, sizes: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Iterator[Specialisation]:
    with assuming(target):
        for dtype in dtypes:
            for size in sizes:
                yield from map(specialise, launches(SIZES[size], dtype))


def _with_tile(found: Specialisation, target: Target) -> str:
    """`bias_gelu_forward_bf16_nvidia_h200_ROWS8_COLS512_warps4_stages3`."""
    gpu = re.sub(r"[^a-z0-9]+", "_", target.name.lower())
    tile = [f"{k}{v}" for k, v in found.constants if k in ("ROWS", "COLS", "DEPTH", "OUTER", "BLOCK")]
    return "_".join([found.name, gpu, *tile, f"warps{found.num_warps}", f"stages{found.num_stages}"])
