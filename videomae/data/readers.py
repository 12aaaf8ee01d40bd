"""What is read of a video: clips for pre-training and for fine-tuning, and the views of a test.

Every reader is a pure function of the file and (seed, epoch, index, view); frames that several views of a video need
are decoded once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from kernels.launch import check
from videomae.data.augment import (
    Augment,
    crop_offsets,
    crop_resize,
    multi_scale_crop,
    random_resized_crop,
    resize_short,
)
from videomae.data.dataset import AUGMENT, CROP, FRAMES, Sample
from videomae.data.decode import Decoder, UnreadableVideo, Video
from videomae.data.rand_augment import RandAugment
from videomae.data.sampling import Sampling, pretrain_frames, pretrain_start
from videomae.keys import Draws


class Spent(NamedTuple):
    """Seconds that reading one clip took. waited: the part of open and decode in which the processor did not work for
    this process: storage, or other processes."""

    open: float = 0.0
    decode: float = 0.0
    crop: float = 0.0
    waited: float = 0.0

    def plus(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total(self) -> float:
        return self.open + self.decode + self.crop


class Reader(Protocol):
    """What a worker of the loader reads with."""

    @property
    def seed(self) -> int: ...

    @property
    def decoder(self) -> Decoder: ...

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one clip: [T, H, W, 3]."""
        ...

    def read_into(self, path: str, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> Spent:
        """Write views of one video, all of the same epoch, into out, arrays of that shape; what it took. Raises
        UnreadableVideo."""
        ...


class _Decoded(NamedTuple):
    """Frames [K, h, w, 3] of one video, each once, and their numbers in order."""

    frames: np.ndarray
    numbers: list[int]
    spent: Spent

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        return np.searchsorted(self.numbers, numbers)

    def take(self, numbers: Sequence[int]) -> np.ndarray:
        """Frames with these numbers, [T, h, w, 3]; the decoded ones themselves where they are just those."""
        return self.frames if list(numbers) == self.numbers else self.frames[self.rows(numbers)]


def _decode(path: str, decoder: Decoder, choose: Callable[[Video], list[int]], nearest: bool = False) -> _Decoded:
    """The frames that choose wants of the video, each decoded once: a short video repeats its last, windows overlap."""
    begin, busy = time.perf_counter(), time.process_time()
    video = Video(path, decoder)
    if len(video) < 2:
        raise UnreadableVideo(path, "a single frame, not a video")
    opened = time.perf_counter()
    numbers = sorted(set(choose(video)))
    frames = video.read(numbers, allow_nearest=nearest)
    ready = time.perf_counter()
    waited = ready - begin - (time.process_time() - busy)
    return _Decoded(frames, numbers, Spent(opened - begin, ready - opened, 0.0, max(waited, 0.0)))


@dataclass(frozen=True)
class ClipReader:
    """Reads pre-training clips.

    views are spread over so many temporal windows: the first views / windows of them see the first window, and so on;
    all are decoded at once.
    """

    frames: int
    size: tuple[int, int]
    stride: int
    augment: Augment
    seed: int
    views: int = 1
    windows: int = 1
    decoder: Decoder = Decoder()

    def __post_init__(self) -> None:
        check(
            self.frames >= 1 and self.stride >= 1,
            f"frames and stride must be positive; got {self.frames}, {self.stride}",
        )
        check(
            1 <= self.windows <= self.views and self.views % self.windows == 0,
            f"views must be a multiple of windows; got {self.views} views, {self.windows} windows",
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, *self.size, 3)

    def read(self, path: str, samples: Sequence[Sample]) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] for each of several views of one clip, decoded once. Raises UnreadableVideo."""
        out = [np.empty(self.shape, dtype=np.uint8) for _ in samples]
        self.read_into(path, samples, out)
        return out

    def read_into(self, path: str, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> Spent:
        """Write the views into out, arrays like `read`'s; what it took. Raises UnreadableVideo."""
        epoch, index, _ = samples[0]
        assert all((s.epoch, s.index) == (epoch, index) for s in samples)
        numbers: list[list[int]] = []

        def choose(video: Video) -> list[int]:
            # all of them, also for a part of the views: whether a clip can be read must not depend on how they are
            # split
            numbers.extend(self._numbers(video, epoch, index, w) for w in range(self.windows))
            return [number for window in numbers for number in window]

        decoded = _decode(path, self.decoder, choose)
        begin = time.perf_counter()
        for sample, clip in zip(samples, out, strict=True):
            window = min(sample.view * self.windows // self.views, self.windows - 1)
            self._view(decoded.take(numbers[window]), sample, clip)
        return decoded.spent._replace(crop=time.perf_counter() - begin)

    def _numbers(self, video: Video, epoch: int, index: int, window: int) -> list[int]:
        """The frames of one window of the clip."""
        draws = Draws(self.seed, epoch, index, FRAMES) if window == 0 else self._later_window(epoch, index, window)
        start = pretrain_start(len(video), self.frames, self.stride, draws, video.step)
        return pretrain_frames(len(video), self.frames, self.stride, start)

    def _later_window(self, epoch: int, index: int, window: int) -> Draws:
        return Draws(self.seed, epoch, index, window, FRAMES)

    def _view(self, frames: np.ndarray, sample: Sample, out: np.ndarray) -> None:
        draws = Draws(self.seed, *sample, CROP)
        height, width = frames.shape[1:3]
        crop = multi_scale_crop(height, width, self.size, self.augment.scales, draws)
        flip = self.augment.flip and draws.below(2) == 1
        out[:] = crop_resize(frames, crop, self.size, flip=flip)


@dataclass(frozen=True)
class LabelledClipReader:
    """Reads fine-tuning clips: RandAugment on the whole frames, random resized crop, flip (RECIPES E.1).

    The views of a video are of the same frames. nearest: frames that a prepared set does not hold are replaced by the
    nearest that it does.
    """

    frames: int
    size: tuple[int, int]
    sampling: Sampling
    seed: int
    rand_augment: RandAugment | None
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    nearest: bool = False
    decoder: Decoder = Decoder()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, *self.size, 3)

    def read_into(self, path: str, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> Spent:
        epoch, index, _ = samples[0]
        numbers: list[int] = []

        def choose(video: Video) -> list[int]:
            numbers[:] = self.sampling.train(len(video), self.frames, Draws(self.seed, epoch, index, FRAMES))
            return numbers

        decoded = _decode(path, self.decoder, choose, self.nearest)
        begin = time.perf_counter()
        for sample, clip in zip(samples, out, strict=True):
            self._view(decoded, numbers, sample, clip)
        return decoded.spent._replace(crop=time.perf_counter() - begin)

    def _view(self, decoded: _Decoded, numbers: list[int], sample: Sample, out: np.ndarray) -> None:
        draws = Draws(self.seed, *sample, AUGMENT)
        # each distinct frame once: a short video repeats some
        frames = decoded.frames if self.rand_augment is None else self.rand_augment(decoded.frames, draws)
        height, width = frames.shape[1:3]
        crop = random_resized_crop(height, width, draws, area=self.area, aspect=self.aspect)
        flip = self.flip and draws.below(2) == 1
        clip = crop_resize(frames, crop, self.size, flip=flip, antialias=False)
        out[:] = clip[decoded.rows(numbers)]


@dataclass(frozen=True)
class ViewReader:
    """Reads the views of a test: `clips` times in the video x `crops` places along the longer side, the short one
    resized to the model's; sample.view is clip * crops + crop (RECIPES F.3, F.4)."""

    frames: int
    size: tuple[int, int]
    sampling: Sampling
    clips: int = 1
    crops: int = 1
    nearest: bool = False
    decoder: Decoder = Decoder()
    seed: int = 0  # nothing is drawn

    def __post_init__(self) -> None:
        check(self.clips >= 1 and self.crops >= 1, f"views must be positive; got {self.clips} x {self.crops}")
        check(self.size[0] == self.size[1], f"views are square; got {self.size[0]} x {self.size[1]}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, *self.size, 3)

    @property
    def views(self) -> int:
        return self.clips * self.crops

    def read_into(self, path: str, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> Spent:
        numbers: list[list[int]] = []

        def choose(video: Video) -> list[int]:
            if self.views == 1:
                numbers.append(self.sampling.middle(len(video), self.frames))
            else:
                numbers.extend(self.sampling.views(len(video), self.frames, self.clips))
            return [number for clip in numbers for number in clip]

        decoded = _decode(path, self.decoder, choose, self.nearest)
        begin = time.perf_counter()
        side = self.size[0]
        frames = resize_short(decoded.frames, side)
        height, width = frames.shape[1:3]
        offsets = crop_offsets(height, width, side, self.crops)
        for sample, clip in zip(samples, out, strict=True):
            which, place = divmod(sample.view, self.crops)
            top, left = offsets[place]
            clip[:] = frames[decoded.rows(numbers[which]), top : top + side, left : left + side]
        return decoded.spent._replace(crop=time.perf_counter() - begin)
