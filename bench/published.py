"""The baseline `published`: our own model's weights, run the way the official code runs a pre-training step.

Every choice is from RECIPES, whose section stands in brackets at the function; the official code was not copied. Where
RECIPES leaves a choice open, the cheaper one is taken: the decoder's positions in the activations' dtype and gathered
from an expanded table that is not stored, losses and gradients without a norm of the gradients, AdamW fused.

A step makes a float32 video [B, 3, T, H, W] on the CPU (`to_video`; D.1, A.1), embeds every cube and drops nine in ten
(A.1, A.5), stores softmax(q k) (A.3), runs every decoder layer on all tokens (A.5), and builds the target of every
cube from the float video in memory (B). float16 autocast with a gradient scaler on a GPU (D.1).
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import record_function

from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from videomae.blocks import Attention, Block, Mlp
from videomae.model import VideoMAE


def to_video(frames: Tensor) -> Tensor:
    """The float video: float32 [B, 3, T, H, W], contiguous, from uint8 frames [B, T, H, W, 3] (D.1)."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((frames / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()


def published_loss(model: VideoMAE, video: Tensor, hidden: Tensor) -> Tensor:
    """The loss of a video [B, 3, T, H, W] with hidden [B, N], True = masked; a profiler sees its parts by name."""
    with record_function("part: embedding"):
        visible = _visible_tokens(model, video, hidden)
    with record_function("part: encoder"):
        for block in model.encoder.blocks:
            visible = _block(block, visible)
        assert model.encoder.norm is not None
        visible = _norm(model.encoder.norm, visible)
    with record_function("part: decoder"):
        pred = _decoded(model, visible, hidden)
    with record_function("part: loss"):
        return functional.mse_loss(pred, pixel_target(video, hidden, model.input.cube))


def _visible_tokens(model: VideoMAE, video: Tensor, hidden: Tensor) -> Tensor:
    """Every cube embedded, positions added in the tokens' dtype, visible ones kept (A.1, A.2, A.5; K.3 19)."""
    proj = model.encoder.patch_embed.proj
    tokens = functional.conv3d(video, proj.weight, proj.bias, stride=proj.stride).flatten(2).transpose(1, 2)
    tokens = tokens + model.encoder.positions.to(tokens.dtype)
    return _picked(tokens, ~hidden)


def _picked(rows: Tensor, which: Tensor) -> Tensor:
    """The rows that a boolean mask names, as many in every clip."""
    return rows[which].reshape(len(rows), -1, rows.shape[-1])


def _block(block: Block, x: Tensor) -> Tensor:
    """Pre-norm block (A.3); drop path is 0 in pre-training (D.1)."""
    x = x + _attention(block.attn, _norm(block.norm1, x))
    return x + _mlp(block.mlp, _norm(block.norm2, x))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _attention(attn: Attention, x: Tensor) -> Tensor:
    """q scaled before the product, softmax and weights in memory (A.3)."""
    bias = torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias, requires_grad=False), attn.v_bias))
    qkv = functional.linear(x, attn.qkv.weight, bias)
    q, k, v = rearrange(qkv, "b n (three a d) -> three b a n d", three=3, a=attn.heads).unbind(0)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, A, N, N]
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))


def _mlp(mlp: Mlp, x: Tensor) -> Tensor:
    """Linear, exact GELU, linear (A.3)."""
    return mlp.fc2(functional.gelu(mlp.fc1(x)))


def _decoded(model: VideoMAE, visible: Tensor, hidden: Tensor) -> Tensor:
    """Visible tokens, then mask tokens, each with its position; all layers on all tokens; norm and head on the masked
    ones (A.5)."""
    visible = model.encoder_to_decoder(visible)
    positions = model.decoder_positions.to(visible.dtype).expand(len(visible), -1, -1)
    masked = model.mask_token + _picked(positions, hidden)
    x = torch.cat((visible + _picked(positions, ~hidden), masked), dim=1)
    for block in model.decoder.blocks:
        x = _block(block, x)
    return model.decoder.head(_norm(model.decoder.norm, x[:, -masked.shape[1] :]))


@torch.no_grad()
def pixel_target(video: Tensor, hidden: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """The target [B, M, dt*dy*dx*3], channel fastest, built for every cube and then gathered (B.1 to B.5)."""
    mean, std = (torch.tensor(v, device=video.device)[:, None, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    dt, dy, dx = cube
    pixels = video * std + mean
    cubes = rearrange(pixels, "b c (t dt) (h dy) (w dx) -> b (t h w) (dt dy dx) c", dt=dt, dy=dy, dx=dx)
    deviation = cubes.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6
    normed = (cubes - cubes.mean(dim=-2, keepdim=True)) / deviation
    return _picked(rearrange(normed, "b n p c -> b n (p c)"), hidden)
