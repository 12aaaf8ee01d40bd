"""The action detection model: the encoder over every cube, and for each box what it shows of the features, pooled, and
a linear head (RECIPES H.4)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.launch import check
from videomae.classifier import init_linear_normal
from videomae.clip import grid_of, interpolated_positions
from videomae.data.mix import normalize
from videomae.data.sampling import KeyFrameClip
from videomae.model import Encoder, Input, Size, size_of
from videomae.roi_align import roi_align

# the published detectors' own, which is not pre-training's (RECIPES H.3), on pixels scaled to [0, 1], red first
AVA_MEAN = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
AVA_STD = (0.225, 0.225, 0.225)

BINS = 7  # of a box, along each side
MOST_TABLES = 32  # of positions, that are kept: of ViT-B some 300 MB


class Detector(Encoder):
    """`model(frames, boxes)` gives logits [B, R, num_classes], of which any number may be true at once.

    Frames may have any height and width: they are padded to whole cubes, and the positions of `input.grid` are
    interpolated to the grid that they make; a size that it saw before is compiled, or captured in a CUDA graph, whole.
    aligned: see `roi_align`; the published detectors are not.
    classes, class_ids: names and ids by column, where they are known; key_clip: how the clips of the key frames were
    chosen when the model was trained. All are saved and loaded with the weights.
    """

    classes: tuple[str, ...] | None = None
    class_ids: tuple[int, ...] | None = None
    key_clip: KeyFrameClip | None = None

    def __init__(
        self,
        size: Size,
        input: Input,
        *,
        num_classes: int,
        drop_path: float = 0.2,
        init_scale: float = 0.001,
        aligned: bool = False,
    ) -> None:
        super().__init__(size, input, drop_path=drop_path)
        check(num_classes >= 1, f"num_classes must be at least 1; got {num_classes}")
        self.aligned = aligned
        # by grids, from and to: making one takes milliseconds, and what a captured graph reads must stay
        self._tables: dict[tuple[tuple[int, int, int], tuple[int, int, int]], Tensor] = {}
        self.head = nn.Linear(size.width, num_classes)
        self.apply(init_linear_normal)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)

    def forward(self, frames: Tensor, boxes: Tensor) -> Tensor:  # type: ignore[override]
        """Logits [B, R, num_classes] of boxes [B, R, 4] in frames [B, T, H, W, 3], uint8 or floating point and already
        normalised.

        boxes: floating point, (x1, y1, x2, y2) in pixels of these frames, the last ones included; clamped to them. A
        box changes nothing for another, so rows that only fill up may hold any finite numbers.
        """
        features = self.features(frames)
        return self.classify(features, clamped(boxes, (frames.shape[2], frames.shape[3])))

    def features(self, frames: Tensor) -> Tensor:
        """Features [B, h, w, D] of the frames: the last block's, normed, and their mean over time."""
        tokens = self.blocks(self.embed(frames), self.norm)
        grid = self._grid(frames)
        return tokens.unflatten(1, grid).mean(dim=1, dtype=torch.promote_types(tokens.dtype, torch.float32))

    def classify(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Logits [B, R, num_classes] of boxes in the frames that gave these features: clamped to them and to what they
        are padded with, which only `clamped` leaves out."""
        check(features.ndim == 4, f"features must be [B, h, w, D]; got shape {tuple(features.shape)}")
        _, down, across = self.input.cube
        rows, columns = features.shape[1:3]
        bins = roi_align(
            features,
            clamped(boxes, (rows * down, columns * across)),
            size=BINS,
            scale=(1 / down, 1 / across),
            aligned=self.aligned,
            # no box inside is wider than all columns, so that nobody has to look at the boxes
            most=math.ceil(max(rows, columns) / BINS),
        )
        # not amax, whose gradient would be shared among equal bins
        pooled = bins.flatten(2, 3).max(dim=2).values
        return self.head(pooled.to(self.head.weight.dtype))

    def embed(self, frames: Tensor, visible: Tensor | None = None) -> Tensor:
        """Tokens [B, V, D] of the visible cubes (int [B, V]; None: all) of frames [B, T, H, W, 3], of any height and
        width."""
        check(
            frames.ndim == 5 and frames.shape[1] == self.input.frames,
            f"this model takes clips [B, {self.input.frames}, H, W, C]; got {tuple(frames.shape)}",
        )
        return self._embedded(self._padded(frames), self._positions(self._grid(frames)), visible)

    def _grid(self, frames: Tensor) -> tuple[int, int, int]:
        """Of the padded frames."""
        _, down, across = self.input.cube
        height, width = frames.shape[2:4]
        return grid_of(frames.shape[1], height + -height % down, width + -width % across, self.input.cube)

    def _padded(self, frames: Tensor) -> Tensor:
        """With zeros at the right and at the bottom, up to whole cubes; normalised first, as zero is then the mean."""
        _, down, across = self.input.cube
        below, right = -frames.shape[2] % down, -frames.shape[3] % across
        if not below and not right:
            return frames
        if frames.dtype == torch.uint8:
            frames = normalize(frames, self.input.mean, self.input.std)
        return functional.pad(frames, (0, 0, 0, right, 0, below))

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        own, table = self.input.grid, self.positions
        if grid == own:
            return table
        key = (self.input.positions_of or own, grid)
        if key in self._tables:
            return self._tables[key]
        # a table first made in inference mode would be of no use in training
        with torch.inference_mode(False):
            made = interpolated_positions(*key, self.size.width).to(table.device, table.dtype)
        # what a compiled graph makes is its own
        if not torch.compiler.is_compiling():
            self._tables = dict([*self._tables.items(), (key, made)][-MOST_TABLES:])
        return made

    def _apply(self, fn: Callable, recurse: bool = True) -> "Detector":
        # moved, or of another dtype: the tables are made anew
        self._tables = {}
        return super()._apply(fn, recurse)


def clamped(boxes: Tensor, frame: tuple[int, int]) -> Tensor:
    """boxes [..., 4], (x1, y1, x2, y2), inside a frame of this height and width: from 0 to its last pixels."""
    check(boxes.shape[-1:] == (4,), f"boxes must be [..., 4]; got shape {tuple(boxes.shape)}")
    height, width = frame
    xs, ys = boxes[..., 0::2].clamp(0, width - 1), boxes[..., 1::2].clamp(0, height - 1)
    return torch.stack((xs, ys), dim=-1).flatten(-2)


def detector(
    size: str,
    *,
    num_classes: int,
    frames: int = 16,
    image_size: int | tuple[int, int] = 224,
    cube: tuple[int, int, int] = (2, 16, 16),
    drop_path: float = 0.2,
    init_scale: float = 0.001,
    aligned: bool = False,
) -> Detector:
    """A freshly initialised detector, its normalisation that of the published ones; ValueError for an unknown size or
    sides the cube does not divide."""
    return Detector(
        size_of(size),
        Input(frames, image_size, cube, AVA_MEAN, AVA_STD),
        num_classes=num_classes,
        drop_path=drop_path,
        init_scale=init_scale,
        aligned=aligned,
    )
