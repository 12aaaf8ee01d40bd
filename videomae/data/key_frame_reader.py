"""Clips around key frames, for a detector: cropped and coloured in training, whole in a test, and where boxes are then.

What training does to a clip is a pure function of its draws, `training_view`, so that whoever has the boxes need not
see the pixels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kernels.launch import check
from videomae.data.augment import Crop, crop_resize
from videomae.data.boxes import cropped, enlarged, mirrored, scaled, to_pixels
from videomae.data.dataset import AUGMENT, Sample
from videomae.data.decode import Decoder, UnreadableVideo
from videomae.data.hsv import HsvShift, draw_shift, shift_hsv
from videomae.data.key_frames import KeyFrames
from videomae.data.moments import Timing, frame_at, open_moment
from videomae.data.readers import Spent
from videomae.data.sampling import KeyFrameClip
from videomae.keys import Draws


class View(NamedTuple):
    """What training does to the frames of a clip, in this order: resized to (height, width), cropped at (top, left),
    coloured, mirrored."""

    resized: tuple[int, int]
    top: int
    left: int
    colour: HsvShift
    flip: bool


def resized(height: int, width: int, short: int) -> tuple[int, int]:
    """(height, width) of frames whose short side becomes `short`; the other keeps the aspect, rounded down."""
    base = min(height, width)
    return short * height // base, short * width // base


def training_view(height: int, width: int, short: int, size: tuple[int, int], flip: bool, draws: Draws) -> View:
    """A view of frames of height x width: a crop of size (height, width) anywhere, and mirrored half of the times if
    flip (RECIPES H.3)."""
    whole = resized(height, width, short)
    check(whole[0] >= size[0] and whole[1] >= size[1], f"no crop of {size} fits in frames resized to {whole}")
    top, left = draws.below(whole[0] - size[0] + 1), draws.below(whole[1] - size[1] + 1)
    return View(whole, top, left, draw_shift(draws), flip and draws.below(2) == 1)


def boxes_in_view(fractions: np.ndarray, height: int, width: int, view: View, size: tuple[int, int]) -> np.ndarray:
    """Boxes [n, 4], from fractions of frames of height x width to pixels of a view of that size, float64."""
    whole = scaled(to_pixels(fractions, height, width), (height, width), view.resized)
    boxes = cropped(whole, view.top, view.left, size)
    return mirrored(boxes, size[1]) if view.flip else boxes


def boxes_in_frame(fractions: np.ndarray, height: int, width: int, short: int) -> np.ndarray:
    """Boxes [n, 4], from fractions of frames of height x width to pixels of them as a test sees them, float64; enlarged
    (RECIPES H.4)."""
    size = resized(height, width, short)
    return enlarged(scaled(to_pixels(fractions, height, width), (height, width), size), *size)


def key_frame_image(reader: "KeyFrameReader", path: str, index: int) -> np.ndarray:
    """A key frame itself, which the clip around it may lack: uint8 [h, w, 3] as in the video. Raises
    UnreadableVideo."""
    return frame_at(path, float(reader.seconds[index]), reader.timing, reader.decoder)


@dataclass(frozen=True, eq=False)
class KeyFrameReader:
    """Reads the clip around a key frame, whose number is a sample's index.

    size: of a training crop; None in a test: frames whole, in the upper left of a place for the largest of the set,
    with zeros beside and below, see `resized`. seconds: float64 [K]. sizes: int [K, 2], (height, width) of the videos'
    frames.
    """

    frames: int
    clip: KeyFrameClip
    seconds: np.ndarray
    sizes: np.ndarray
    timing: Timing
    size: tuple[int, int] | None
    seed: int = 0
    flip: bool = True
    colour: bool = True
    decoder: Decoder = Decoder()

    @classmethod
    def for_training(
        cls,
        key_frames: KeyFrames,
        clip: KeyFrameClip,
        frames: int,
        size: tuple[int, int],
        seed: int,
        *,
        flip: bool = True,
        colour: bool = True,
        decoder: Decoder = Decoder(),  # noqa: B008 (frozen)
    ) -> "KeyFrameReader":
        """Crops of size (height, width) of clips of `frames` frames. flip: mirror half of them. colour: shift hue,
        saturation and value."""
        check(max(size) <= clip.short_side, f"crops of {size} do not fit in frames of a short side {clip.short_side}")
        table = (key_frames.seconds, key_frames.sizes, key_frames.timing)
        return cls(frames, clip, *table, size, seed, flip, colour, decoder)

    @classmethod
    def for_test(
        cls,
        key_frames: KeyFrames,
        clip: KeyFrameClip,
        frames: int,
        *,
        decoder: Decoder = Decoder(),  # noqa: B008
    ) -> "KeyFrameReader":
        """Whole frames."""
        table = (key_frames.seconds, key_frames.sizes, key_frames.timing)
        return cls(frames, clip, *table, None, decoder=decoder)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        if self.size is not None:
            return (self.frames, *self.size, 3)
        distinct = np.unique(self.sizes, axis=0)
        seen = [resized(int(height), int(width), self.clip.short_side) for height, width in distinct]
        return (self.frames, max(height for height, _ in seen), max(width for _, width in seen), 3)

    def read_into(self, path: str, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> Spent:
        index = samples[0].index
        begin, busy = time.perf_counter(), time.process_time()
        moment = open_moment(path, float(self.seconds[index]), self.clip, self.frames, self.timing, self.decoder)
        opened = time.perf_counter()
        frames = moment.read()
        ready = time.perf_counter()
        waited = ready - begin - (time.process_time() - busy)
        self._check_size(path, index, frames)
        height, width = frames.shape[1:3]
        whole = resized(height, width, self.clip.short_side)
        frames = crop_resize(frames, Crop(0, 0, height, width), whole, antialias=False)
        for sample, clip in zip(samples, out, strict=True):
            self._write(frames, moment.rows, sample, clip)
        return Spent(opened - begin, ready - opened, time.perf_counter() - ready, max(waited, 0.0))

    def _check_size(self, path: str, index: int, frames: np.ndarray) -> None:
        height, width = map(int, self.sizes[index])
        if frames.shape[1:3] != (height, width):
            seen = f"{frames.shape[2]}x{frames.shape[1]}"
            raise UnreadableVideo(path, f"its frames are {seen}, where the first of this video is {width}x{height}")

    def _write(self, frames: np.ndarray, rows: list[int], sample: Sample, out: np.ndarray) -> None:
        """One view of frames [K, h, w, 3], whose size is the resized one."""
        height, width = frames.shape[1:3]
        if self.size is None:
            out[:, :height, :width] = frames[rows]
            out[:, height:] = 0
            out[:, :height, width:] = 0
            return
        height, width = map(int, self.sizes[sample.index])
        draws = Draws(self.seed, *sample, AUGMENT)
        view = training_view(height, width, self.clip.short_side, self.size, self.flip, draws)
        cut = frames[:, view.top : view.top + self.size[0], view.left : view.left + self.size[1]]
        if self.colour:
            cut = shift_hsv(cut, view.colour)
        # each distinct frame was coloured once: a clip at an end repeats some
        shown = torch.from_numpy(cut[rows])
        out[:] = (shown.flip(2) if view.flip else shown).numpy()
