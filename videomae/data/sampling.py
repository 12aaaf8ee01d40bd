"""Which frames of a video make a clip: integers only (RECIPES F)."""

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
