"""The fine-tuning model: the encoder over every cube, mean pooling, norm and a linear head (RECIPES A.6)."""

import torch
from torch import Tensor, nn

from kernels.launch import check
from videomae.blocks import LayerNorm
from videomae.model import Encoder, Input, Size, size_of


class Classifier(Encoder):
    """`model(frames)` gives logits [B, num_classes]. No final norm before the pooling: fc_norm takes its place.

    classes: the names by label, where they are known; saved and loaded with the weights.
    """

    classes: tuple[str, ...] | None = None

    def __init__(
        self,
        size: Size,
        input: Input,
        *,
        num_classes: int,
        drop_path: float = 0.1,
        head_dropout: float = 0.0,
        init_scale: float = 0.001,
    ) -> None:
        super().__init__(size, input, drop_path=drop_path, final_norm=False)
        check(num_classes >= 1, f"num_classes must be at least 1; got {num_classes}")
        self.fc_norm = LayerNorm(size.width)
        self.fc_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(size.width, num_classes)
        self.apply(init_linear_normal)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)

    def forward(self, frames: Tensor) -> Tensor:  # type: ignore[override]
        """Logits [B, num_classes] of frames [B, T, H, W, 3], uint8 or floating point and already normalised."""
        return self.classify(self.embed(frames))

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits [B, num_classes] of what `embed` gives, [B, N, D]: training may mix clips in between."""
        return self.head(self.fc_dropout(self.fc_norm(self.blocks.pooled(tokens))))


def init_linear_normal(module: nn.Module) -> None:
    """Of a linear layer: as fine-tuning begins (RECIPES A.6)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-2, b=2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def classifier(
    size: str,
    *,
    num_classes: int,
    frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    cube: tuple[int, int, int] = (2, 16, 16),
    drop_path: float = 0.1,
    head_dropout: float = 0.0,
    init_scale: float = 0.001,
) -> Classifier:
    """A freshly initialised classifier; ValueError for an unknown size or sides the cube does not divide."""
    return Classifier(
        size_of(size),
        Input(frames, image_size, cube),
        num_classes=num_classes,
        drop_path=drop_path,
        head_dropout=head_dropout,
        init_scale=init_scale,
    )
