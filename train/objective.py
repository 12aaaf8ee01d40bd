"""What a pre-training step minimises: draw the masks from the clips' keys, predict, compare with the pixels."""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from videomae import masking
from videomae.model import VideoMAE


@dataclass(frozen=True)
class PretrainObjective:
    """A function of tensors only, of fixed shapes and without a wait for the device: it can be compiled or captured.

    autocast: the dtype of matrix products; None computes in the weights' own.
    """

    model: VideoMAE
    mask_kind: str = "tube"
    mask_ratio: float = 0.9
    decoder_mask: str = "none"
    decoder_ratio: float = 0.5
    normalize: bool = True
    autocast: torch.dtype | None = None

    def __call__(
        self, frames: Tensor, keys: Tensor, weight: Tensor | None = None, scale: float | Tensor = 1.0
    ) -> Tensor:
        """The loss, a float32 scalar, times scale.

        frames: uint8 [B, T, H, W, C]. keys: int64 [B]. weight: float32 [B], 0 for clips that do not count.
        """
        mask = self.mask(keys)
        return kernels.pixel_loss(
            self.predict(frames, mask),
            frames,
            mask.predicted,
            self.normalize,
            cube=self.model.input.cube,
            weight=weight,
            scale=scale,
        )

    def mask(self, keys: Tensor) -> masking.Mask:
        """The masks of clips with these keys, on their device."""
        grid = self.model.input.grid
        return masking.make(self.mask_kind, grid, self.mask_ratio, keys, self.decoder_mask, self.decoder_ratio)

    def predict(self, frames: Tensor, mask: masking.Mask) -> Tensor:
        """The model's prediction, with matrix products in the autocast dtype."""
        with torch.autocast(frames.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(frames, mask)
