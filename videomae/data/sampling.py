"""Which frames of a video make a clip: integers only (RECIPES F)."""

from dataclasses import dataclass
from typing import Literal

from kernels.launch import check
from videomae.keys import Draws


def num_starts(num_frames: int, length: int, stride: int) -> int:
    """In how many places a pre-training clip of that length and stride can start."""
    return max(num_frames - length * stride, 0) + 1


def pretrain_start(num_frames: int, length: int, stride: int, draws: Draws, step: int = 1) -> int:
    """Where a pre-training clip starts, drawn among the frames 0, step, 2 step, ... that can be read.

    Raises ValueError unless stride is a multiple of step: the clip would need other frames.
    """
    check(
        stride % step == 0,
        f"only frames 0, {step}, {2 * step}, ... are stored, which does not suit a stride of {stride}",
    )
    return step * draws.below((num_starts(num_frames, length, stride) - 1) // step + 1)


def pretrain_frames(num_frames: int, length: int, stride: int, start: int = 0) -> list[int]:
    """Frame numbers of a pre-training clip: start, start + stride, ... (RECIPES F.1).

    A video shorter than length * stride is read from frame 0 on, as far as it goes, and its last such frame is
    repeated.
    """
    if num_frames >= length * stride:
        return [start + stride * k for k in range(length)]
    # the official rule counts frames from 1 and advances only while the next one stays below num_frames
    last = max((num_frames - 2) // stride, 0)
    return [stride * min(k, last) for k in range(length)]


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video make a clip for a classifier: `length` frame numbers, sorted, in [0, num_frames)."""

    # dense: a window of the video; uniform: one frame from each equal part of it (TSN)
    kind: Literal["dense", "uniform"] = "dense"
    stride: int = 4  # of dense: frames of the video from one of the clip to the next

    def __post_init__(self) -> None:
        check(self.kind in ("dense", "uniform"), f"sampling.kind must be dense or uniform; got {self.kind!r}")
        check(self.stride >= 1, f"sampling.stride must be at least 1; got {self.stride}")

    def train(self, num_frames: int, length: int, draws: Draws) -> list[int]:
        """A training clip: a window anywhere in the video, or a frame drawn from each part."""
        _check_counts(num_frames, length)
        if self.kind == "dense":
            # the published draw leaves out the last place, and with it the last frame
            return self._window(num_frames, length, draws.below(max(num_frames - length * self.stride, 1)))
        part = num_frames // length
        return _one_of_each_part(num_frames, length, [draws.below(max(part, 1)) for _ in range(length)])

    def middle(self, num_frames: int, length: int) -> list[int]:
        """The clip of validation: the window in the middle of the video, or the middle frame of each part.

        Version 2's rule; version 1 validates on clips drawn as in training, which makes its accuracy noisy.
        """
        _check_counts(num_frames, length)
        if self.kind == "dense":
            return self._window(num_frames, length, max(num_frames - length * self.stride, 0) // 2)
        return _one_of_each_part(num_frames, length, [num_frames // length // 2] * length)

    def views(self, num_frames: int, length: int, clips: int) -> list[list[int]]:
        """The clips of a test, which cover the whole video.

        Dense clips take every stride-th frame, so they are a little denser than `train`'s. Of uniform ones, clip s
        takes the frame s / clips into each part. One dense clip, which the published rule cannot give, is the middle
        one.
        """
        _check_counts(num_frames, length)
        check(clips >= 1, f"a test needs at least one clip; got {clips}")
        if self.kind == "uniform":
            return [[(i * clips + s) * num_frames // (length * clips) for i in range(length)] for s in range(clips)]
        stored = list(range(0, num_frames, self.stride))
        stored += stored[-1:] * (length - len(stored))
        free = len(stored) - length
        starts = [free * k // (clips - 1) for k in range(clips)] if clips > 1 else [free // 2]
        return [stored[start : start + length] for start in starts]

    def _window(self, num_frames: int, length: int, start: int) -> list[int]:
        """`length` frames spread over length * stride ones from start on, both ends included; the last frame is
        repeated in a video shorter than that (RECIPES F.2)."""
        span = length * self.stride
        if num_frames > span:
            return [min(i, start + span - 1) for i in _spread(start, start + span, length)]
        spread = _spread(0, num_frames, num_frames // self.stride)
        return [min(i, num_frames - 1) for i in spread + [num_frames] * (length - len(spread))]


@dataclass(frozen=True)
class KeyFrameClip:
    """How a detector sees the moment of a key frame: a clip with it in the middle (RECIPES H.2)."""

    stride: int = 4  # frames of the video from one of the clip to the next
    # frames a second at which the video is seen, the nearest of its own; None: all that it has
    rate: float | None = 25.0
    short_side: int = 256  # pixels, of the frames in a test; training crops them

    def __post_init__(self) -> None:
        check(self.stride >= 1, f"clip.stride must be at least 1; got {self.stride}")
        check(self.rate is None or 0 < self.rate <= 1000, f"clip.rate must be in (0, 1000]; got {self.rate}")
        check(1 <= self.short_side <= 8192, f"clip.short-side must be in [1, 8192]; got {self.short_side}")

    def span(self, length: int) -> int:
        """Frames that the clip is spread over."""
        return length * self.stride

    def offsets(self, before: int, after: int, length: int) -> list[int]:
        """`length` frame numbers counted from the key frame, of a video with so many frames before it, and after it
        with the key frame itself.

        Of 16 frames 4 apart: -31, -27, ..., -3, 1, ..., 29, so the key frame is not among them. Where one side is
        shorter than half of the span, the other is cut to it, and the first and last frames repeat.
        """
        is_inside = before >= 0 and after >= 1
        check(is_inside, f"a key frame must be in its video; got {before} frames before, {after} after")
        half = min(before, after)
        start = (2 * half - self.span(length)) // 2 + (self.stride - 1) // 2
        return [min(max(start + self.stride * i, 0), max(2 * half - 1, 0)) - half for i in range(length)]


def _check_counts(num_frames: int, length: int) -> None:
    check(num_frames >= 1 and length >= 1, f"no clip of {length} frames can be read from a video of {num_frames}")


def _spread(start: int, end: int, count: int) -> list[int]:
    """count numbers from start to end, both included, rounded down."""
    return [start + (end - start) * i // max(count - 1, 1) for i in range(count)]


def _one_of_each_part(num_frames: int, length: int, offsets: list[int]) -> list[int]:
    """The frame at its offset into each of `length` parts; the last num_frames % length frames are in none.

    A video with fewer frames than parts gives all of them, after repeats of the first (version 2's rule; version 1
    repeats the first alone, and so shows the classifier a still).
    """
    if num_frames < length:
        return [0] * (length - num_frames) + list(range(num_frames))
    return [i * (num_frames // length) + offset for i, offset in enumerate(offsets)]
