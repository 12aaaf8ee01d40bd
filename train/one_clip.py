"""One clip of a video, from where and at what pace it is wanted, and the times of its frames."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import check
from videomae.data.augment import Crop, crop_resize
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.sampling import Sampling, num_starts, pretrain_frames
from videomae.model import Input


class Moments(NamedTuple):
    """Where a clip's frames are in their video: numbers from 0 on, and seconds."""

    frames: Sequence[int]
    seconds: Sequence[float]


class Clip(NamedTuple):
    """frames: uint8 [1, T, H, W, 3]. rate, num_frames: of the video, frames a second and their number."""

    frames: Tensor
    moments: Moments
    num_frames: int
    rate: float


@dataclass(frozen=True)
class Start:
    """A clip's first frame: a frame's number, or seconds."""

    value: float
    is_seconds: bool

    @classmethod
    def parse(cls, text: str) -> "Start":
        """`48` or `2.5s`; ValueError for anything else."""
        found = re.fullmatch(r"(\d{1,12})|(\d{1,9}(?:\.\d*)?|\.\d+)s", text)
        if found is None:
            raise ValueError(f"start must be a frame's number, or seconds as 2.5s; got {text}")
        return cls(float(found[1] or found[2]), found[1] is None)

    def __str__(self) -> str:
        return f"{self.value:g} s" if self.is_seconds else f"frame {self.value:.0f}"


def read_clip(path: str, input: Input, sampling: Sampling, start: Start | None = None) -> Clip:
    """The clip of a video that a model's input takes; of every frame the largest middle part of that aspect, resized.
    start: the middle if not given, and not heeded by uniform sampling. Raises UnreadableVideo; ValueError for a start
    that the video does not have."""
    video = Video(path)
    count = len(video)
    if count < 2:
        raise UnreadableVideo(path, "a single frame, not a video")
    is_dense = sampling.kind == "dense"
    if is_dense:
        fits = sampling.stride % video.step == 0
        stored = f"{path}: only frames 0, {video.step}, {2 * video.step}, ... are stored"
        check(fits, f"{stored}, which do not suit a stride of {sampling.stride}")
        last = num_starts(count, input.frames, sampling.stride) - 1
        first = last // 2 if start is None else _frame_at(start, video, last)
        numbers = pretrain_frames(count, input.frames, sampling.stride, first // video.step * video.step)
    else:
        numbers = sampling.middle(count, input.frames)
    different = sorted(set(numbers))
    decoded = video.read(different, allow_nearest=not is_dense)
    (height, width), (wanted_height, wanted_width) = decoded.shape[1:3], input.size
    # the largest part of that aspect
    part_height = min(height, max(width * wanted_height // wanted_width, 1))
    part_width = min(width, max(height * wanted_width // wanted_height, 1))
    crop = Crop((height - part_height) // 2, (width - part_width) // 2, part_height, part_width)
    frames = crop_resize(decoded, crop, input.size)[[different.index(number) for number in numbers]]
    moments = Moments(numbers, [number / video.rate for number in numbers])
    return Clip(torch.from_numpy(frames)[None], moments, count, video.rate)


def _frame_at(start: Start, video: Video, last: int) -> int:
    """Its number, at most last."""
    seconds = len(video) / video.rate
    frame = video.at(start.value) if start.is_seconds else int(start.value)
    is_there = start.value < seconds if start.is_seconds else frame < len(video)
    has = f"{video.path} has {len(video)} frames, {seconds:.2f} s"
    check(is_there, f"{has}: there is no {start}")
    check(frame <= last, f"{has}: this clip can start at frame {last} ({last / video.rate:.2f} s) at the latest")
    return frame
