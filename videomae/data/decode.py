"""Video file -> upright uint8 RGB frames, by frame number.

decord reads files whose frames are stored in the order they are shown. PyAV reads the others, and what decord cannot
open: with B-frames decord is slower, since PyAV can leave out frames that nobody refers to (1.2 to 1.6 times on
Kinetics-like clips), and it numbers and seeks wrongly, without a word, in open GOPs (x265's default), without
presentation times (AVI), in MPEG transport and program streams, and where an edit list drops frames. So a file's
packets are looked at first (1 to 4 ms, remembered). Both give the same frames, rotation, colour range and matrix.
Readers hold C state: open them in the process that uses them.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter

try:
    import decord
except ImportError:  # PyAV reads everything then, more slowly
    decord = None

# codecs in which a frame marked as not referred to is referred to by none at all, so that leaving it out changes no
# other (in HEVC and AV1 that holds within a temporal layer only)
_SKIPPABLE = frozenset(("h264", "mpeg4", "mpeg2video"))
# containers in which neither presentation times nor seeking can be relied on
_UNTIMED = frozenset(("avi", "mpeg", "mpegts"))


# what PyAV raises on damaged files: its own errors, and now and then what a damaged header leads Python to
_LIBRARY_ERRORS = (av.FFmpegError, OSError, ValueError)


class UnreadableVideo(Exception):
    """A file, or the part of it that was asked for, cannot be read; the message names the file and says why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


class Video:
    """One open video file; `len` is its number of frames."""

    def __init__(self, path: str | Path) -> None:
        """Raises UnreadableVideo when it cannot be opened, or holds no frame."""
        self.path = str(path)
        self._index = _index(self.path)
        self._reader: _Reader = _open_decord(self.path, self._index) or _PyAVReader(self.path, self._index)

    def __len__(self) -> int:
        return self._index.num_frames

    @property
    def backend(self) -> str:
        """decord or pyav, whichever reads this file."""
        return self._reader.backend

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames with these numbers, uint8 [K, h, w, 3], upright.

        Raises UnreadableVideo when a frame, or one that it is predicted from, is damaged; IndexError for a number out
        of range.
        """
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f"{self.path} has frames 0 to {len(self) - 1}; asked for {min(indices)} to {max(indices)}")
        try:
            return self._reader.read(indices)
        except _DecordCannot:
            self._reader = _PyAVReader(self.path, self._index)
            return self._reader.read(indices)


class _Index(NamedTuple):
    """What a file's packets say before anything is decoded."""

    num_frames: int
    suits_decord: bool
    times: array  # of presentation, in order, in the stream's unit; empty where they cannot be relied on
    keys: tuple[tuple[int, int], ...]  # (presentation, decoding) times of the key frames, in order


# by path: a file is read again in every epoch. 8,192 of 300 frames take 20 MB
@lru_cache(maxsize=8192)
def _index(path: str) -> _Index:
    """Raises UnreadableVideo when the file is missing, is no video, or has no frame to show."""
    try:
        if not Path(path).exists():
            raise UnreadableVideo(path, "no such file")
        with av.open(path, metadata_errors="replace") as container:
            stream = _stream(path, container)
            found = [p for p in container.demux(stream) if p.size > 0]
            timed = container.format.name not in _UNTIMED and all(p.pts is not None for p in found)
    except _LIBRARY_ERRORS as error:
        raise UnreadableVideo(path, _reason(error)) from error
    shown = [p for p in found if not p.is_discard]
    if not shown:
        raise UnreadableVideo(path, "no video frames")
    if not timed:
        return _Index(len(shown), False, array("q"), ())
    times = [p.pts or 0 for p in shown]
    in_order = all(earlier < later for earlier, later in pairwise(times))
    keys = sorted((p.pts or 0, (p.pts if p.dts is None else p.dts) or 0) for p in found if p.is_keyframe)
    return _Index(len(shown), in_order and len(shown) == len(found), array("q", sorted(times)), tuple(keys))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def _stream(path: str, container: "av.container.InputContainer") -> "av.VideoStream":
    if not container.streams.video:
        raise UnreadableVideo(path, "no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise UnreadableVideo(path, "its codec is not known here")
    # one thread: the loader's workers are the parallelism
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


class _Reader(Protocol):
    backend: str

    def read(self, indices: Sequence[int]) -> np.ndarray: ...


class _DecordCannot(Exception):
    """decord failed on frames of a file that it had opened."""


class _DecordReader:
    backend = "decord"

    def __init__(self, video: "decord.VideoReader") -> None:
        self._video = video

    def read(self, indices: Sequence[int]) -> np.ndarray:
        try:
            return self._video.get_batch([int(i) for i in indices]).asnumpy()
        except decord.DECORDError as error:
            raise _DecordCannot from error


def _open_decord(path: str, index: _Index) -> _DecordReader | None:
    """None when decord is missing, does not suit the file, cannot open it, or counts its frames otherwise."""
    if decord is None or not index.suits_decord:
        return None
    # libav would write its complaints to stderr; what matters comes back as an exception
    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(path, num_threads=1)
    except (decord.DECORDError, RuntimeError):
        return None
    return _DecordReader(video) if len(video) == index.num_frames else None


class _PyAVReader:
    backend = "pyav"

    def __init__(self, path: str, index: _Index) -> None:
        self._path, self._times, self._keys = path, index.times, index.keys

    def read(self, indices: Sequence[int]) -> np.ndarray:
        # a frame's name: its time of presentation; without times, its count from the start
        names = [self._times[i] if self._times else i for i in indices]
        try:
            found = self._decode(set(names), seek=bool(self._times))
            if len(found) < len(set(names)) and self._times:
                found = self._decode(set(names), seek=False)  # the container's seek table is wrong
        except _LIBRARY_ERRORS as error:
            raise UnreadableVideo(self._path, f"damaged: {_reason(error)}") from error
        if missing := len(set(names)) - len(found):
            raise UnreadableVideo(self._path, f"damaged: {missing} of {len(set(names))} frames do not decode")
        if len(shapes := {image.shape[:2] for image in found.values()}) > 1:
            raise UnreadableVideo(self._path, f"its frames have different sizes: {sorted(shapes)}")
        return np.stack([found[name] for name in names])

    def _decode(self, wanted: set[int], *, seek: bool) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        with av.open(self._path, metadata_errors="replace") as container:
            stream = _stream(self._path, container)
            if seek and (before := bisect_right(self._keys, (min(wanted), 1 << 62))):
                # the key frame's decoding time: by presentation time a seek can land on a later one
                container.seek(self._keys[before - 1][1], stream=stream)
            reformatter = VideoReformatter()  # keeps its tables from frame to frame, where a frame's own does not
            for name, frame in self._frames(container, stream, wanted if seek else None):
                if name is not None and name in wanted:
                    if frame.is_corrupt:
                        raise UnreadableVideo(self._path, "damaged: a frame of the clip is marked corrupt")
                    image = reformatter.reformat(frame, format="rgb24").to_ndarray()
                    found[name] = np.rot90(image, frame.rotation // 90)
                if len(found) == len(wanted):
                    break
        return found

    def _frames(
        self, container: "av.container.InputContainer", stream: "av.VideoStream", wanted: set[int] | None
    ) -> Iterator[tuple[int | None, av.VideoFrame]]:
        """Frames with their names, in order; with wanted given, others may be missing."""
        codec = stream.codec_context
        count = 0
        for packet in container.demux(stream):
            if wanted is not None and codec.name in _SKIPPABLE:
                is_wanted = packet.pts is None or packet.pts in wanted
                codec.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            for frame in codec.decode(packet):
                yield (frame.pts if self._times else count), frame
                count += 1
