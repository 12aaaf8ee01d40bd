"""What a detector makes of key frames: a score for every class of every box, and what these are worth."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.launch import check
from train.inference import Inference, Reading, Views, read_views
from videomae.data.box_rows import BoxRows
from videomae.data.key_frame_reader import KeyFrameReader, boxes_in_frame, resized
from videomae.data.key_frames import KeyFrames
from videomae.data.loader import Skip
from videomae.detector import Detector
from videomae.frame_map import AVA_GROUPS, Protocol
from videomae.metrics import frame_map

AT_ONCE = 16  # key frames


class NotFinite(Exception):
    """The model gives numbers that are none: there is no result."""


class Scored(NamedTuple):
    """index: of the key frame. scores: float32 [boxes, classes], of every class by itself, in [0, 1]."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks it for
    scores: np.ndarray


def score_boxes(
    inference: Inference,
    key_frames: KeyFrames,
    reader: KeyFrameReader,
    *,
    reading: Reading,
    say: Callable[[str], None],
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[list[Scored], tuple[Skip, ...]]]:
    """The boxes of every key frame, or of these, AT_ONCE at a time, and the key frames that could not be read.

    A score is the detector's times the model's (RECIPES H.4). Raises NotFinite.
    """
    paths = key_frames.videos.paths
    found = read_views(
        reader,
        paths,
        range(len(paths)) if indices is None else indices,
        views=1,
        device=inference.device,
        reading=reading,
        say=say,
        at_once=AT_ONCE,
    )
    for views in found:
        yield (
            [one for batch in _of_one_size(views, key_frames, reader) for one in _score(inference, *batch)],
            views.skips,
        )


class _Batch(NamedTuple):
    """Clips of one size, [B, T, h, w, 3], and what is in each."""

    key_frames: KeyFrames
    indices: tuple[int, ...]
    frames: Tensor
    boxes: list[np.ndarray]


def _of_one_size(views: Views, key_frames: KeyFrames, reader: KeyFrameReader) -> Iterator[_Batch]:
    """What was read, cut to its own size: a place in the loader's memory is as large as the largest."""
    short = reader.clip.short_side
    sizes = [resized(*key_frames.size_of(index), short) for index in views.indices]
    order = sorted(range(len(sizes)), key=lambda row: sizes[row])
    for (height, width), rows in groupby(order, key=lambda row: sizes[row]):
        taken = list(rows)
        indices = tuple(views.indices[row] for row in taken)
        frames = views.frames[taken, 0, :, :height, :width]
        boxes = [boxes_in_frame(key_frames.boxes_of(i), *key_frames.size_of(i), short) for i in indices]
        yield _Batch(key_frames, indices, frames, boxes)


def _score(
    inference: Inference, key_frames: KeyFrames, indices: tuple[int, ...], frames: Tensor, boxes: list[np.ndarray]
) -> Iterator[Scored]:
    padded = padded_boxes(boxes).to(inference.device)
    scores = inference(frames, None, padded).sigmoid().cpu().numpy()
    for row, index in enumerate(indices):
        own = scores[row, : len(boxes[row])]
        if not np.isfinite(own).all():
            where = f"{key_frames.names[index]} at second {key_frames.seconds[index]:g}"
            raise NotFinite(f"the model's outputs for {where} are not finite, in {inference.precision}")
        yield Scored(index, own * key_frames.scores_of(index)[:, None])


def padded_boxes(boxes: list[np.ndarray], most: int | None = None) -> Tensor:
    """float32 [B, R, 4] of ragged ones; R: the largest number, or most. Rows to fill up are whole pixels at 0."""
    out = torch.zeros(len(boxes), most or max(max(map(len, boxes), default=0), 1), 4)
    for row, own in enumerate(boxes):
        out[row, : len(own)] = torch.from_numpy(np.ascontiguousarray(own, dtype=np.float32))
    return out


@dataclass
class Detections:
    """Every box with a score of every class, as it is gathered."""

    key_frames: KeyFrames

    def __post_init__(self) -> None:
        self._found: dict[int, np.ndarray] = {}

    def add(self, scored: list[Scored]) -> None:
        self._found |= {one.index: one.scores for one in scored}

    def scores_of(self, index: int) -> np.ndarray | None:
        """[boxes, classes]; None for a key frame that could not be read."""
        return self._found.get(index)

    def rows(self) -> BoxRows:
        """A row for every box and class, boxes as they were given: what an AVA file of detections has."""
        frames = self.key_frames
        order = sorted(self._found)
        counts = np.array([len(self._found[i]) for i in order], dtype=np.int64)
        classes = np.asarray(frames.class_ids, dtype=np.int32)
        names = tuple(dict.fromkeys(frames.names[i] for i in order))
        code = {name: number for number, name in enumerate(names)}
        each = np.repeat(np.arange(len(order)), counts * len(classes))
        boxes = [frames.boxes_of(i) for i in order]
        flat = np.concatenate(boxes) if boxes else np.zeros((0, 4), np.float32)
        scores = [self._found[i].reshape(-1) for i in order]
        return BoxRows(
            names=names,
            video=np.array([code[frames.names[i]] for i in order], dtype=np.int32)[each],
            second=np.array([frames.seconds[i] for i in order])[each],
            box=np.repeat(flat.astype(np.float32), len(classes), axis=0),
            label=np.tile(classes, int(counts.sum())),
            score=(np.concatenate(scores) if scores else np.zeros(0)).astype(np.float32),
        )

    def measure(self, *, iou: float, protocol: Protocol) -> dict[str, Any]:
        """Frame mAP, see `frame_map`; by groups where the classes are AVA's."""
        frames = self.key_frames
        check(len(frames.ground_truth.label) > 0, "no annotated boxes to compare with")
        return frame_map(
            frames.ground_truth,
            self.rows(),
            classes=frames.evaluated,
            iou=iou,
            protocol=protocol,
            excluded=frames.excluded,
            groups=AVA_GROUPS if frames.class_ids == tuple(range(1, 81)) else {},
        )


def inference_of(model: Detector, key_frames: KeyFrames, short_side: int, **options: Any) -> Inference:
    """An Inference whose micro-batches are of the frames that a test has, which are larger than training's."""
    sizes = {resized(int(h), int(w), short_side) for h, w in key_frames.sizes}
    largest = max(h * w for h, w in sizes)
    _, rows, columns = model.input.cube
    cubes = model.input.grid[0] * -(-largest // (rows * columns))
    return Inference(model, cubes=cubes, **options)
