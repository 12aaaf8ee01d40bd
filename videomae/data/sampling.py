"""Which frames of a video make a clip: integers only (RECIPES F)."""


def num_starts(num_frames: int, length: int, stride: int) -> int:
    """In how many places a pre-training clip of that length and stride can start."""
    return max(num_frames - length * stride, 0) + 1


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
