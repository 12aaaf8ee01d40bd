"""Video file -> upright uint8 RGB frames, by frame number.

decord is the default: 1.2 to 1.7 times as fast as PyAV on Kinetics-like clips. But it numbers and seeks wrongly,
without a word, in streams with open GOPs (x265's default), without presentation times (AVI), in MPEG transport and
program streams, and shows frames that an edit list drops. So a file's packets are looked at first (1 to 4 ms,
remembered), and PyAV reads those files, and what decord cannot open. Both give the same frames, rotation, colour range
and matrix.
Readers hold C state: open them in the process that uses them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import av
import numpy as np

try:
    import decord
except ImportError:  # PyAV reads everything then, more slowly
    decord = None

# containers in which neither presentation times nor seeking can be relied on
_UNTIMED = frozenset(("avi", "mpeg", "mpegts"))


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
        self._probe = _probe(self.path)
        self._reader: _Reader = _open_decord(self.path, self._probe) or _PyAVReader(self.path)

    def __len__(self) -> int:
        return self._probe.num_frames

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
            self._reader = _PyAVReader(self.path)
            return self._reader.read(indices)


class _Packet(NamedTuple):
    time: int  # of presentation; 0 in every packet of a stream without times
    decoding_time: int
    is_key: bool
    is_shown: bool


def _packets(path: str) -> tuple[list[_Packet], bool]:
    """The packets of the video stream, in the file's order, and whether their times can be relied on.

    Raises UnreadableVideo when the file is missing, is no video, or has no frame to show.
    """
    if not Path(path).exists():
        raise UnreadableVideo(path, "no such file")
    try:
        with av.open(path) as container:
            stream = _stream(path, container)
            timed = container.format.name not in _UNTIMED
            found = [p for p in container.demux(stream) if p.size > 0]
    except av.FFmpegError as error:
        raise UnreadableVideo(path, error.strerror or str(error)) from error
    timed = timed and all(p.pts is not None for p in found)
    packets = [
        _Packet(p.pts or 0, (p.pts if p.dts is None else p.dts) or 0, p.is_keyframe, not p.is_discard) for p in found
    ]
    if not any(packet.is_shown for packet in packets):
        raise UnreadableVideo(path, "no video frames")
    return packets, timed


class _Probe(NamedTuple):
    """What has to be known of a file before either back end opens it."""

    num_frames: int
    suits_decord: bool


# by path: a file is read again in every epoch. 65,536 of them take about 20 MB
@lru_cache(maxsize=1 << 16)
def _probe(path: str) -> _Probe:
    packets, timed = _packets(path)
    count = sum(packet.is_shown for packet in packets)
    return _Probe(count, timed and count == len(packets) and not _has_leading_frames(packets))


def _has_leading_frames(packets: list[_Packet]) -> bool:
    """Whether a frame follows a key frame in the file but comes before it on the screen (an open GOP)."""
    newest_key = packets[0].time
    for packet in packets:
        if packet.is_key:
            newest_key = packet.time
        elif packet.time < newest_key:
            return True
    return False


def _stream(path: str, container: "av.container.InputContainer") -> "av.VideoStream":
    if not container.streams.video:
        raise UnreadableVideo(path, "no video stream")
    stream = container.streams.video[0]
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


def _open_decord(path: str, probe: _Probe) -> _DecordReader | None:
    """None when decord is missing, does not suit the file, cannot open it, or counts its frames otherwise."""
    if decord is None or not probe.suits_decord:
        return None
    # libav would write its complaints to stderr; what matters comes back as an exception
    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(path, num_threads=1)
    except (decord.DECORDError, RuntimeError):
        return None
    return _DecordReader(video) if len(video) == probe.num_frames else None


class _PyAVReader:
    backend = "pyav"

    def __init__(self, path: str) -> None:
        self._path = path
        packets, timed = _packets(path)
        # a frame's name is its time of presentation; without times, its count from the start
        shown = [p.time for p in packets if p.is_shown]
        self._names = sorted(shown) if timed else list(range(len(shown)))
        keys = [p for p in packets if p.is_key] if timed else []
        self._keys = sorted((p.time, p.decoding_time) for p in keys)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        names = [self._names[i] for i in indices]
        try:
            found = self._decode(set(names), seek=True)
            if len(found) < len(set(names)) and self._keys:
                found = self._decode(set(names), seek=False)  # the container's seek table is wrong
        except av.FFmpegError as error:
            raise UnreadableVideo(self._path, f"damaged: {error.strerror or error}") from error
        if missing := len(set(names)) - len(found):
            raise UnreadableVideo(self._path, f"damaged: {missing} of {len(set(names))} frames do not decode")
        return np.stack([found[name] for name in names])

    def _decode(self, wanted: set[int], *, seek: bool) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        with av.open(self._path) as container:
            stream = _stream(self._path, container)
            if seek and (before := bisect_right(self._keys, (min(wanted), 1 << 62))):
                # the key frame's decoding time: by presentation time a seek can land on a later one
                container.seek(self._keys[before - 1][1], stream=stream)
            for count, frame in enumerate(container.decode(stream)):
                name = frame.pts if self._keys else count
                if name in wanted:
                    if frame.is_corrupt:
                        raise UnreadableVideo(self._path, f"damaged at {frame.time:.2f} s")
                    found[name] = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                if len(found) == len(wanted):
                    break
        return found
