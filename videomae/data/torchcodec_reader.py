"""Frames through torchcodec, a third reader, which must be asked for; it can use a GPU's video decoder.

Untested on a GPU, and with torchcodec 0.14 and newer, whose Linux wheels need CUDA: neither was there where it was
written; opt-in. On the CPU, 0.12 and 0.13 gave the ordinary reader's pixels for all test videos that they read.
torchcodec numbers frames wrongly in AVI and where an edit list drops key frames: such files are left to the ordinary
reader, and every frame's time of presentation is compared with the one that its number stands for. It is not told of
frames that FFmpeg repaired, so damage that the ordinary reader refuses can come through. Rotation is applied from 0.11
on.

torchcodec is imported by the first call, not with this module.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import av
import numpy as np
import torch

from kernels.launch import check
from videomae.data.decode import UnreadableVideo, Video, _index

MOST_DIFFERENCE = 2.0  # grey levels, on average; on the CPU there was none at all
_INSTALL = (
    "pip install 'videomae-engine[torchcodec]'; it needs FFmpeg's shared libraries, and from 0.14 on torch's CUDA"
)
_AT_ONCE = 8  # frames that are decoded at once when all are read: 50 MB of 1080p
_PARITY_FRAMES, _PARITY_FILES = 16, 5

# of torchcodec: RuntimeError for a file that does not open or decode, ValueError without a video stream, IndexError for
# a frame past the end
_FILE_ERRORS = (RuntimeError, ValueError, IndexError)
# RuntimeErrors too, but a GPU that fails or is full says nothing of the file
_GPU_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)


def suits_torchcodec(path: str) -> bool:
    """Whether torchcodec numbers a file's frames as the ordinary reader does, by what the packets say.

    Raises UnreadableVideo when the file is missing or no video.
    """
    return _unsuited(path) is None


def _unsuited(path: str) -> str | None:
    index = _index(path)
    if not index.times:
        return "torchcodec needs presentation times, which this file lacks"
    for shown, _ in index.keys:
        place = bisect_left(index.times, shown)
        if place == len(index.times) or index.times[place] != shown:
            return "torchcodec does not number its frames rightly, as an edit list drops a key frame"
    return None


class TorchcodecReader:
    """One open file; made by open_torchcodec."""

    def __init__(self, path: str, decoder: Any, device: str) -> None:
        self._path, self._decoder = path, decoder
        self._times, self._unit = _index(path).times, _time_unit(path)
        self.backend = "torchcodec" if device == "cpu" else "torchcodec-cuda"

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames with these numbers, uint8 [K, h, w, 3], upright, in host memory.

        Raises UnreadableVideo when one does not decode, or another comes in its place.
        """
        numbers = [int(i) for i in indices]
        batch = _attempt(self._path, lambda: self._decoder.get_frames_at(numbers))
        for i, came in zip(numbers, batch.pts_seconds.tolist(), strict=True):
            due = self._times[i] * self._unit
            if abs(came - due) > self._unit / 2:
                raise UnreadableVideo(
                    self._path, f"torchcodec gives the frame of {came:.4f} s for frame {i}, which is shown at {due:.4f}"
                )
        return np.ascontiguousarray(batch.data.cpu().numpy())

    def stream(self) -> Iterator[np.ndarray]:
        """Every frame in order, uint8 [h, w, 3]; a few are in memory at a time. Raises what read raises."""
        numbers = iter(range(len(self._times)))
        while some := list(islice(numbers, _AT_ONCE)):
            yield from self.read(some)


def open_torchcodec(path: str, num_frames: int, device: str = "cpu") -> TorchcodecReader:
    """A reader of a file with num_frames frames. device: cpu, cuda, or cuda:1; a process that uses a GPU takes about
    0.5 GB of its memory.

    Raises UnreadableVideo when torchcodec cannot open the file, counts its frames otherwise, or would number them
    wrongly; ValueError when torchcodec or the GPU is missing.
    """
    check(device.split(":")[0] in ("cpu", "cuda"), f"torchcodec decodes on cpu or cuda; got {device}")
    check(device == "cpu" or torch.cuda.is_available(), f"torchcodec should decode on {device}, and there is no GPU")
    decoder_class = _decoder_class()
    if reason := _unsuited(path):
        raise UnreadableVideo(path, reason)
    decoder = _attempt(
        path,
        # exact: it scans the packets, as decode.py does, instead of trusting the header. One thread: the loader's
        # workers are the parallelism
        lambda: decoder_class(path, dimension_order="NHWC", seek_mode="exact", device=device, num_ffmpeg_threads=1),
    )
    check(
        hasattr(decoder.metadata, "rotation"), f"torchcodec is older than 0.11, which turns videos upright: {_INSTALL}"
    )
    if decoder.metadata.num_frames != num_frames:
        raise UnreadableVideo(path, f"torchcodec counts {decoder.metadata.num_frames} frames, its packets {num_frames}")
    return TorchcodecReader(path, decoder, device)


def parity(path: str, device: str = "cpu") -> float:
    """Mean absolute difference, in grey levels, between torchcodec and the ordinary reader, over up to 16 frames spread
    over a file.

    Raises UnreadableVideo when either cannot read it; ValueError as open_torchcodec, and when the shapes differ.
    """
    video = Video(path)
    numbers = sorted({round(i) for i in np.linspace(0, len(video) - 1, _PARITY_FRAMES)})
    ours, theirs = video.read(numbers), open_torchcodec(path, len(video), device).read(numbers)
    check(ours.shape == theirs.shape, f"torchcodec gives {path} the shape {theirs.shape}, others {ours.shape}")
    return float(np.abs(ours.astype(np.int16) - theirs).mean())


def check_parity(paths: Sequence[str], device: str = "cpu") -> float:
    """The parity of the first of up to 5 files that both readers read.

    Raises ValueError when it is over 2 grey levels, no file can be compared, or torchcodec or the GPU is missing.
    """
    check(bool(paths), "there is no video to compare torchcodec with the ordinary reader on")
    reasons = []
    for path in paths[:_PARITY_FILES]:
        try:
            difference = parity(path, device)
        except UnreadableVideo as error:
            reasons.append(str(error))
            continue
        check(
            difference <= MOST_DIFFERENCE,
            f"torchcodec on {device} differs from the ordinary reader by {difference:.1f} grey levels on average in "
            f"{path}; at most {MOST_DIFFERENCE:g} are allowed",
        )
        return difference
    raise ValueError(f"torchcodec could be compared on none of the first {len(reasons)} videos: {'; '.join(reasons)}")


def _decoder_class() -> Callable[..., Any]:
    try:
        import torchcodec  # type: ignore[import-not-found]
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    except (ImportError, OSError, RuntimeError) as error:  # not there; its or FFmpeg's libraries do not load
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"torchcodec does not load ({reason}): {_INSTALL}") from error
    # from 0.16 on it can be imported without FFmpeg
    check(getattr(torchcodec, "ffmpeg_major_version", 0) is not None, f"torchcodec finds no FFmpeg: {_INSTALL}")
    return VideoDecoder


def _attempt(path: str, call: Callable[[], Any]) -> Any:
    """The call's result; what torchcodec says against the file as UnreadableVideo."""
    try:
        return call()
    except _FILE_ERRORS as error:
        if isinstance(error, _GPU_ERRORS):
            raise
        # the first line, without the place in torchcodec's source
        reason = re.sub(r"^\w+, \S+:\d+, ", "", next(iter(str(error).splitlines()), type(error).__name__))
        raise UnreadableVideo(path, f"torchcodec: {reason}") from error


# by path, like decode.py's index
@lru_cache(maxsize=8192)
def _time_unit(path: str) -> float:
    """Seconds, of a file's presentation times."""
    with av.open(path, metadata_errors="replace") as container:
        return float(container.streams.video[0].time_base or 1)
