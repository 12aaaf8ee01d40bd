"""What a step minimises: in pre-training, draw the masks from the clips' keys, predict, compare with the pixels; in
fine-tuning, classify, compare with the labels; in detection, the same for every box."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import kernels
from kernels.pixel_loss import Error
from videomae import masking
from videomae.classifier import Classifier
from videomae.data.mix import Mix, blend_tokens, mixed_cross_entropy
from videomae.detector import Detector
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
    error: Error = "mse"
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
            error=self.error,
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


@dataclass(frozen=True)
class DetectObjective:
    """What a detection step minimises: every class of every box is a question of its own (RECIPES H.4).

    The loss is the mean over classes, added up over a clip's boxes, and over sum_over clips: the mean over clips times
    that number. Published code adds up over the clips of one GPU; so it is here the same for any micro-batch.
    A function of tensors only, as `PretrainObjective`.
    """

    model: Detector
    sum_over: int = 1
    autocast: torch.dtype | None = None

    def __call__(
        self,
        frames: Tensor,
        boxes: Tensor,
        labels: Tensor,
        valid: Tensor,
        weight: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The loss, a float32 scalar, times scale.

        frames: uint8 [B, T, H, W, C]. boxes: [B, R, 4], pixels. labels: [B, R, classes], 0 or 1. valid: bool [B, R],
        which of the boxes are some. weight: float32 [B], 0 for clips that do not count.
        """
        with torch.autocast(frames.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.model(frames, boxes)
        counted = valid if weight is None else valid & (weight > 0)[:, None]
        # a clip without weight may hold inf or nan: 0 * nan would reach every gradient
        logits = torch.where(counted[:, :, None], logits.float(), 0)
        losses = binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(dim=2) * counted
        clips = len(frames) if weight is None else weight.sum().clamp_min(1)
        return scale * self.sum_over * losses.sum() / clips
