"""Features of whole videos: windows that slide over a video, and what a frozen model makes of each.

    model, _ = videomae.model_from("runs/pretrain-demo/checkpoints/step_1000")
    features = videomae.video_features(model, "video.mp4", stride=4)  # [windows, D]

`python -m train.features` does the same to a folder, decoding ahead of the model.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kernels.launch import check
from videomae.classifier import Classifier
from videomae.data import storage
from videomae.data.augment import crop_offsets, resize_short
from videomae.data.dataset import Sample
from videomae.data.decode import Decoder, UnreadableVideo, Video
from videomae.data.readers import Spent
from videomae.data.sampling import Sampling, pretrain_frames
from videomae.model import Encoder, Input, VideoMAE

# clip: one vector for each window, the mean of its tokens; token: one for each cube
Level = Literal["clip", "token"]
LEVELS: tuple[Level, ...] = ("clip", "token")
_DEFAULT = Sampling("dense", 4)  # where the weights do not say
_AT_ONCE = 128 << 20  # bytes of decoded frames in memory, of windows that are read together


@dataclass(frozen=True)
class Windows:
    """Which clips of a video are looked at.

    Dense sampling: clips of `length` frames, stride apart, every hop frames (length * stride if not given: side by
    side), as many as fit; where the last one ends before the video does, one more that ends with it. A video shorter
    than one has a single clip, which repeats its last frame as in pre-training. Uniform sampling: one clip, spread
    over the whole video.
    """

    length: int
    sampling: Sampling = _DEFAULT
    hop: int | None = None

    def __post_init__(self) -> None:
        check(self.length >= 1, f"a clip has at least one frame; got {self.length}")
        check(self.hop is None or self.hop >= 1, f"hop must be at least 1 frame; got {self.hop}")
        sliding = self.sampling.kind == "dense"
        check(sliding or self.hop is None, "uniform sampling makes one clip of a whole video: no hop; give a stride")

    @classmethod
    def of(cls, input: Input, *, stride: int | None = None, hop: int | None = None) -> "Windows":
        """A model's: sampled as it was trained unless a stride is given."""
        sampling = (input.sampling or _DEFAULT) if stride is None else Sampling("dense", stride)
        return cls(input.frames, sampling, hop)

    @property
    def span(self) -> int:
        """Frames that a dense clip stands for."""
        return self.length * self.sampling.stride

    def starts(self, num_frames: int, step: int = 1) -> list[int]:
        """The first frame of every clip, ascending, multiples of step: of a set that stores only such frames.

        Raises ValueError when the clips would need others.
        """
        check(num_frames >= 1, f"no clip can be read from a video of {num_frames} frames")
        if self.sampling.kind == "uniform":
            return [0]
        hop = self.hop or self.span
        for name, value in (("stride", self.sampling.stride), ("hop", hop)):
            stored = f"only frames 0, {step}, {2 * step}, ... are stored"
            check(value % step == 0, f"{stored}, which do not suit a {name} of {value}")
        last = max(num_frames - self.span, 0) // step * step
        starts = list(range(0, last + 1, hop))
        return starts if starts[-1] == last else [*starts, last]

    def frames(self, num_frames: int, start: int) -> list[int]:
        """Frame numbers of the clip that starts there."""
        if self.sampling.kind == "uniform":
            return self.sampling.middle(num_frames, self.length)
        return pretrain_frames(num_frames, self.length, self.sampling.stride, start)


@dataclass(frozen=True)
class WindowReader:
    """Reads windows of a video; sample.view is a window's number. The short side becomes the model's, the middle
    square stays."""

    windows: Windows
    size: tuple[int, int]
    decoder: Decoder = Decoder()
    seed: int = 0  # nothing is drawn

    def __post_init__(self) -> None:
        check(self.size[0] == self.size[1], f"windows are square; the model takes {self.size[0]} x {self.size[1]}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.windows.length, *self.size, 3)

    def read_into(self, path: str, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> Spent:
        begin = time.perf_counter()
        video = Video(path, self.decoder)
        spent = Spent(open=time.perf_counter() - begin)
        starts = self.windows.starts(len(video), video.step)
        if max(sample.view for sample in samples) >= len(starts):
            raise UnreadableVideo(path, f"it has {len(video)} frames, fewer than a moment ago")
        wanted = [self.windows.frames(len(video), starts[sample.view]) for sample in samples]
        done, at_once = 0, 1
        while done < len(wanted):
            part = slice(done, done + at_once)
            took, frame_bytes = self._read(video, wanted[part], out[part])
            spent = spent.plus(took)
            done += at_once
            at_once = self._together(frame_bytes)
        return spent

    def _together(self, frame_bytes: int) -> int:
        """How many windows to read in one pass over the file."""
        # what lies between windows that are far apart would be decoded too
        if (self.windows.hop or 0) > 2 * self.windows.span:
            return 1
        return max(_AT_ONCE // (frame_bytes * self.windows.length), 1)

    def _read(self, video: Video, wanted: Sequence[list[int]], out: Sequence[np.ndarray]) -> tuple[Spent, int]:
        """Write these windows; what it took, and the bytes of one decoded frame."""
        begin = time.perf_counter()
        numbers = sorted({number for window in wanted for number in window})
        decoded = video.read(numbers, allow_nearest=self.windows.sampling.kind == "uniform")
        ready = time.perf_counter()
        side = self.size[0]
        frames = resize_short(decoded, side)
        height, width = frames.shape[1:3]
        ((top, left),) = crop_offsets(height, width, side, 1)
        for window, clip in zip(wanted, out, strict=True):
            clip[:] = frames[np.searchsorted(numbers, window), top : top + side, left : left + side]
        spent = Spent(decode=ready - begin, crop=time.perf_counter() - ready)
        return spent, decoded[0].nbytes


class Length(NamedTuple):
    """How long a video is; rate: frames a second; step: as `Video.step`; unreadable: why nothing else is known."""

    frames: int = 0
    rate: float = 0.0
    step: int = 1
    unreadable: str | None = None


@dataclass(frozen=True)
class Measure:
    """What a worker of `videomae.data.pool` does to find out how long videos are; a task is (number, path)."""

    decoder: Decoder = Decoder()
    cache: storage.CacheConfig | None = None  # of what is read from URLs

    @property
    def fds(self) -> tuple[int, ...]:
        return ()

    def __call__(self, task: tuple[int, str]) -> Length:
        storage.configure(self.cache)
        try:
            video = Video(task[1], self.decoder)
        except UnreadableVideo as error:
            return Length(unreadable=error.reason)
        if len(video) < 2:
            return Length(unreadable="a single frame, not a video")
        return Length(len(video), video.rate, video.step)


def features_of(model: Encoder, frames: Tensor, level: Level = "clip") -> Tensor:
    """Features [B, D] of clips, or [B, N, D] of their tokens, float32; frames as for the model, which is in eval mode.

    Tokens are the last block's, normed by the final norm of an encoder that has one. A clip's feature is their mean,
    and of a classifier, whose norm follows the pooling, the norm of that mean: what its head sees.
    """
    tokens = model.blocks(model.embed(frames), model.norm)
    if level == "token":
        return tokens.float()
    pooled = tokens.mean(dim=1, dtype=torch.float32)
    return model.fc_norm(pooled).float() if isinstance(model, Classifier) else pooled


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients inside; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def video_features(
    model: VideoMAE | Encoder,
    path: str | Path,
    *,
    stride: int | None = None,
    hop: int | None = None,
    level: Level = "clip",
    at_once: int = 8,
) -> Tensor:
    """What `features_of` gives for every window of a video (see `Windows`), on the CPU: float32 [windows, D], or
    [windows, N, D] at level "token".

    stride: frames from one of a clip's to the next, those that the model was trained with (4 if unknown) if not given.
    hop: frames from one window to the next. at_once: windows in memory. The model works where it is, in its own
    precision, and is left in the mode it was in. Raises UnreadableVideo; ValueError for what does not fit.
    """
    check(level in LEVELS, f"level must be one of {', '.join(LEVELS)}; got {level!r}")
    check(at_once >= 1, f"at_once must be at least 1; got {at_once}")
    encoder = model.encoder if isinstance(model, VideoMAE) else model
    reader = WindowReader(Windows.of(encoder.input, stride=stride, hop=hop), encoder.input.size)
    video = Video(path)
    count = len(reader.windows.starts(len(video), video.step))
    clips = np.empty((min(at_once, count), *reader.shape), dtype=np.uint8)
    device, parts = encoder.positions.device, []
    with frozen(encoder):
        for first in range(0, count, at_once):
            samples = [Sample(0, 0, view) for view in range(first, min(first + at_once, count))]
            reader.read_into(str(path), samples, list(clips[: len(samples)]))
            frames = torch.from_numpy(clips[: len(samples)]).to(device)
            parts.append(features_of(encoder, frames, level).cpu())
    return torch.cat(parts)
