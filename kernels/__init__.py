"""The fused operations of VideoMAE, one per file; importing them touches no GPU."""

from kernels.attention import attention
from kernels.bias_gelu import bias_gelu
from kernels.cube_embed import cube_embed
from kernels.decoder_input import decoder_input
from kernels.layer_norm import layer_norm
from kernels.pixel_loss import pixel_loss
from kernels.split_heads import split_heads

__all__ = ["attention", "bias_gelu", "cube_embed", "decoder_input", "layer_norm", "pixel_loss", "split_heads"]
