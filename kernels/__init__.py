"""The fused operations of VideoMAE pre-training, one per file; importing them touches no GPU."""

from kernels.cube_embed import cube_embed
from kernels.decoder_input import decoder_input
from kernels.pixel_loss import pixel_loss

__all__ = ["cube_embed", "decoder_input", "pixel_loss"]
