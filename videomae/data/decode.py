"""Video file -> upright uint8 RGB frames, by frame number.

PyAV reads every file; a file's packets are looked at first (1 to 4 ms, remembered), so that frames have the numbers in
which they are shown. decord can be asked for, and then reads the files that it numbers rightly: those whose frames are
stored in the order they are shown, but for open GOPs (x265's default), AVI, MPEG transport and program streams, and
edit lists that drop frames. It is not the default, as it is slower (PyAV takes 0.6 to 0.98 of its time, the least with
B-frames, of which it leaves out those that nobody refers to), gives damaged frames without a word, and keeps 300 bytes
of every file that it opened. All readers give the same frames, rotation, colour range and matrix.
Readers hold C state: open them in the process that uses them.
"""

import math
import os
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

if TYPE_CHECKING:
    from videomae.data.shards import StoredVideo

try:
    import decord
except ImportError:  # nothing but --data.reader decord needs it
    decord = None

# codecs in which a frame marked as not referred to is referred to by none at all, so that leaving it out changes no
# other (in HEVC and AV1 that holds within a temporal layer only)
_SKIPPABLE = frozenset(("h264", "mpeg4", "mpeg2video"))
_B_FRAME = PictureType.B
# containers in which neither presentation times nor seeking can be relied on
_UNTIMED = frozenset(("avi", "mpeg", "mpegts"))
# from PyAV 17 on a conversion starts a thread on every core unless it is told not to; before, it could not be told
ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
# frames that decord reads at once when it reads all: 50 MB of 1080p
_AT_ONCE = 8


# what PyAV raises on damaged files: its own errors, and now and then what a damaged header leads Python to
_LIBRARY_ERRORS = (av.FFmpegError, OSError, ValueError)


class UnreadableVideo(Exception):
    """A file, or the part of it that was asked for, cannot be read; the message names the file and says why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


# auto: PyAV; the others must be asked for, and PyAV reads what they would read wrongly
ReaderName = Literal["auto", "decord", "torchcodec"]


@dataclass(frozen=True)
class Decoder:
    """Who reads video files; device: where torchcodec decodes."""

    reader: ReaderName = "auto"
    device: Literal["cpu", "cuda"] = "cpu"


_ORDINARY = Decoder()


class Video:
    """One open video file; `len` is its number of frames."""

    def __init__(self, path: str | Path, decoder: Decoder = _ORDINARY) -> None:
        """path: a file, or a video's place in a prepared set, which decoder does not concern. Raises UnreadableVideo
        when it cannot be opened, or holds no frame."""
        self.path = str(path)
        self._stored = _open_stored(self.path) if "::" in self.path else None
        if self._stored is not None:
            self._reader: _Reader = self._stored
            return
        self._index = _index(self.path)
        found: _Reader | None = None
        if decoder.reader == "torchcodec":
            found = _open_torchcodec(self.path, self._index, decoder.device)
        elif decoder.reader == "decord":
            found = _open_decord(self.path, self._index)
        self._reader = found or _PyAVReader(self.path, self._index)

    def __len__(self) -> int:
        return self._index.num_frames if self._stored is None else len(self._stored)

    @property
    def step(self) -> int:
        """1, as every frame can be read; s when only frames 0, s, 2s, ... are stored."""
        return 1 if self._stored is None else self._stored.step

    @property
    def rate(self) -> float:
        """Frames a second, on average; 25 where the file does not say."""
        return self._index.rate if self._stored is None else self._stored.rate

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        times = self._times
        return (times[-1] - times[0]) * self._index.unit + 1 / self.rate if times else len(self) / self.rate

    def at(self, seconds: float) -> int:
        """The number of the frame whose beginning is nearest to that time, counted from the first frame's; of two, the
        earlier. By times of presentation where the file has reliable ones, by the average rate otherwise."""
        times = self._times
        if not times:
            return min(max(math.ceil(seconds * self.rate - 0.5), 0), len(self) - 1)
        if len(times) == 1:
            return 0
        wanted = times[0] + seconds / self._index.unit
        after = min(max(bisect_left(times, wanted), 1), len(times) - 1)
        return after - 1 if wanted - times[after - 1] <= times[after] - wanted else after

    @property
    def _times(self) -> "array[int]":
        return array("q") if self._stored is not None else self._index.times

    @property
    def backend(self) -> str:
        """Which reader has this file."""
        return self._reader.backend

    def read(self, indices: Sequence[int], *, allow_nearest: bool = False) -> np.ndarray:
        """Frames with these numbers, uint8 [K, h, w, 3], upright; allow_nearest: in place of a frame that is not
        stored, the nearest that is.

        Raises UnreadableVideo when a frame, or one that it is predicted from, is damaged; IndexError for a number out
        of range; ValueError for one that is not stored.
        """
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f"{self.path} has frames 0 to {len(self) - 1}; asked for {min(indices)} to {max(indices)}")
        if self._stored is not None:
            return self._stored.read(indices, allow_nearest=allow_nearest)
        try:
            return self._reader.read(indices)
        except _DecordCannot:
            self._reader = _PyAVReader(self.path, self._index)
            return self._reader.read(indices)

    def stream(self) -> Iterator[np.ndarray]:
        """Every frame (every stored one) in order, uint8 [h, w, 3], in one pass; a few frames are in memory at a time.

        Raises UnreadableVideo at the first that is damaged.
        """
        done = 0
        try:
            for frame in self._reader.stream():
                yield frame
                done += 1
        except _DecordCannot:
            self._reader = _PyAVReader(self.path, self._index)
            yield from islice(self._reader.stream(), done, None)


def _open_stored(path: str) -> "StoredVideo | None":
    """None when path is a file whose name has two colons."""
    from videomae.data import shards  # which imports this module

    return shards.StoredVideo(path) if shards.is_locator(path) else None


def _open_torchcodec(path: str, index: "_Index", device: str) -> "_Reader | None":
    """None when torchcodec would number this file's frames wrongly."""
    from videomae.data import torchcodec_reader  # which imports this module

    if not torchcodec_reader.suits_torchcodec(path):
        return None
    return torchcodec_reader.open_torchcodec(path, index.num_frames, device)


class _Index(NamedTuple):
    """What a file's packets say before anything is decoded."""

    num_frames: int
    suits_decord: bool
    times: array  # of presentation, in order, in the stream's unit; empty where they cannot be relied on
    keys: tuple[tuple[int, int], ...]  # (presentation, decoding) times of the key frames, in order
    rate: float  # frames a second
    unit: float  # seconds, of times

    @property
    def bytes(self) -> int:
        """That it takes, about."""
        return 1000 + 8 * len(self.times) + 150 * len(self.keys)


class _Indexes:
    """What was read of files, but for those used longest ago when there are too many: a file is read again in every
    epoch."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._held = limit_bytes, 0
        self._found: OrderedDict[tuple[str, int, int], _Index] = OrderedDict()
        self._lock = Lock()

    def get(self, path: str, changed: int, size: int) -> _Index:
        """The name may have become another file's, of another time or size. Raises UnreadableVideo."""
        key = path, changed, size
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        found = _read_index(path)
        with self._lock:
            if key not in self._found:
                self._found[key] = found
                self._held += found.bytes
            while self._held > self._limit and len(self._found) > 1:
                self._held -= self._found.popitem(last=False)[1].bytes
        return found


# with a key frame in 250, some 25,000 clips of 300 frames, or 400 movies of a quarter of an hour
_indexes = _Indexes(100_000_000)


def _index(path: str) -> _Index:
    """Raises UnreadableVideo when the file is missing, is no video, or has no frame to show."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise UnreadableVideo(path, "no such file") from error
    except (OSError, ValueError) as error:
        raise UnreadableVideo(path, _reason(error)) from error
    return _indexes.get(path, found.st_mtime_ns, found.st_size)


def _read_index(path: str) -> _Index:
    try:
        with av.open(path, metadata_errors="replace") as container:
            stream = _stream(path, container)
            found = [p for p in container.demux(stream) if p.size > 0]
            while found and found[-1].is_corrupt:
                found.pop()  # cut off in the middle: what it decodes to is the frame before
            timed = container.format.name not in _UNTIMED and all(p.pts is not None for p in found)
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            unit = float(stream.time_base or 1)
    except _LIBRARY_ERRORS as error:
        raise UnreadableVideo(path, _reason(error)) from error
    shown = [p for p in found if not p.is_discard]
    if not shown:
        raise UnreadableVideo(path, "no video frames")
    if not timed:
        return _Index(len(shown), False, array("q"), (), rate, unit)
    times = [p.pts or 0 for p in shown]
    in_order = all(earlier < later for earlier, later in pairwise(times))
    keys = sorted((p.pts or 0, (p.pts if p.dts is None else p.dts) or 0) for p in found if p.is_keyframe)
    suits_decord = in_order and len(shown) == len(found)
    return _Index(len(shown), suits_decord, array("q", sorted(times)), tuple(keys), rate, unit)


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

    def stream(self) -> Iterator[np.ndarray]: ...


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

    def stream(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._video), _AT_ONCE):
            yield from self.read(range(start, min(start + _AT_ONCE, len(self._video))))


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
        self._path, self._times, self._keys, self._num_frames = path, index.times, index.keys, index.num_frames

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

    def stream(self) -> Iterator[np.ndarray]:
        count, shape = 0, None
        try:
            with av.open(self._path, metadata_errors="replace") as container:
                reformatter = VideoReformatter()
                for name, frame in self._frames(container, _stream(self._path, container), None):
                    if count == self._num_frames or name != (self._times[count] if self._times else count):
                        # frames that an edit list leaves out; one that is missing is found out below
                        continue
                    if frame.is_corrupt:
                        raise UnreadableVideo(self._path, f"damaged: frame {count}")
                    image = self._image(frame, reformatter)
                    shape = shape or image.shape
                    if image.shape != shape:
                        raise UnreadableVideo(self._path, f"its frames have different sizes: {shape}, {image.shape}")
                    yield image
                    count += 1
        except _LIBRARY_ERRORS as error:
            raise UnreadableVideo(self._path, f"damaged: {_reason(error)}") from error
        if count < self._num_frames:
            raise UnreadableVideo(self._path, f"damaged: frame {count} of {self._num_frames} does not decode")

    @staticmethod
    def _image(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
        return np.rot90(reformatter.reformat(frame, format="rgb24", **ONE_THREAD).to_ndarray(), frame.rotation // 90)

    def _decode(self, wanted: set[int], *, seek: bool) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        with av.open(self._path, metadata_errors="replace") as container:
            stream = _stream(self._path, container)
            if seek and (before := bisect_right(self._keys, (min(wanted), 1 << 62))):
                # the key frame's decoding time: by presentation time a seek can land on a later one
                container.seek(self._keys[before - 1][1], stream=stream)
            reformatter = VideoReformatter()  # keeps its tables from frame to frame, where a frame's own does not
            damaged, found_here = False, 0  # since the last key frame
            for name, frame in self._frames(container, stream, wanted if seek else None):
                if frame.key_frame:
                    damaged, found_here = False, 0
                # a frame may be predicted from any other since the key frame
                damaged = damaged or frame.is_corrupt
                is_wanted = name is not None and name in wanted
                if damaged and (is_wanted or found_here):
                    raise UnreadableVideo(self._path, "damaged: a frame of the clip, or one it is predicted from")
                if is_wanted:
                    assert name is not None
                    found[name] = self._image(frame, reformatter)
                    found_here += 1
                # a B-frame is predicted from the frame behind it too
                if len(found) == len(wanted) and frame.pict_type != _B_FRAME:
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
