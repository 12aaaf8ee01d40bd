"""What a step minimises: in pre-training, draw the masks from the clips' keys, predict, compare with the pixels; in
fine-tuning, classify, compare with the labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from videomae import masking
from videomae.classifier import Classifier
from videomae.data.mix import Mix, blend_tokens, mixed_cross_entropy
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


@dataclass(frozen=True)
class ClassifyObjective:
    """What a fine-tuning step minimises: the cross-entropy with smoothed labels of clips that may be mixed.

    A function of tensors only, as `PretrainObjective`.
    """

    model: Classifier
    smoothing: float = 0.1
    autocast: torch.dtype | None = None

    def __call__(
        self,
        frames: Tensor,
        labels: Tensor,
        lam: Tensor | None = None,
        partner: Tensor | None = None,
        blend: Tensor | None = None,
        weight: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The loss, a float32 scalar, times scale.

        frames: [B, T, H, W, C], uint8, or normalised. labels: int64 [B]. lam, partner, blend: see `mix.Mix`, or none of
        them. weight: float32 [B], 0 for clips that do not count.
        """
        with torch.autocast(frames.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            tokens = self.model.embed(frames)
            if lam is not None and partner is not None and blend is not None:
                tokens = blend_tokens(tokens, Mix(lam, partner, blend))
            logits = self.model.classify(tokens)
        mix = None if lam is None or partner is None or blend is None else Mix(lam, partner, blend)
        return scale * mixed_cross_entropy(logits, labels, mix, self.smoothing, weight)
