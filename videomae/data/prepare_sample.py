"""One video to one sample of a prepared set: read once, resized, encoded phase by phase, and written as tar members.

Frames keep the source's numbers: phase p of stride s holds frames p, p + s, p + 2s, ...
"""

import base64
import json
import os
import tarfile
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import av
import numpy as np
import simplejpeg
from av.video.reformatter import VideoReformatter

from kernels.launch import check
from videomae.data.augment import Crop, crop_resize
from videomae.data.decode import ONE_THREAD, UnreadableVideo, Video
from videomae.data.sample_facts import BLOCK, padded
from videomae.data.shards import FORMAT, GOP
from videomae.weight_files import write_atomically


@dataclass(frozen=True)
class Encoding:
    """How videos are stored. short_side: pixels, which smaller videos keep theirs below. phases: all, or first, which
    keeps frames 0, stride, 2 stride, ... only."""

    short_side: int = 256
    stride: int = 4
    phases: str = "all"
    codec: str = "h264-fast"
    crf: int = 23
    jpeg_quality: int = 85

    def __post_init__(self) -> None:
        check(
            self.short_side >= 16 and self.short_side % 2 == 0,
            f"--short-side must be even and at least 16; got {self.short_side}",
        )
        check(1 <= self.stride <= 64, f"--stride must be from 1 to 64; got {self.stride}")
        check(self.phases in ("all", "first"), f"--phases must be all or first; got {self.phases}")
        check(self.codec in ("h264-fast", "jpeg"), f"--codec must be h264-fast or jpeg; got {self.codec}")
        check(0 <= self.crf <= 51, f"--crf must be from 0 to 51; got {self.crf}")
        check(1 <= self.jpeg_quality <= 100, f"--jpeg-quality must be from 1 to 100; got {self.jpeg_quality}")

    @property
    def kept(self) -> tuple[int, ...]:
        """The phases that are stored."""
        return tuple(range(self.stride)) if self.phases == "all" else (0,)


class Task(NamedTuple):
    """One video to prepare: its place in the list, its name in the set, where it lies, and what the set says of it."""

    number: int
    key: str
    path: str
    source: str
    label: int | None


class Stage(Protocol):
    """Encodes the frames of one phase into a file."""

    @property
    def count(self) -> int: ...

    def add(self, frame: np.ndarray) -> None: ...

    def finish(self) -> None: ...


class H264Stage:
    """An mp4 of GOPs of 16 without B-frames, made for fast decoding."""

    def __init__(self, file: BinaryIO, crf: int, size: tuple[int, int], rate: Fraction) -> None:
        self.count = 0
        self._container = av.open(file, "w", format="mp4")
        options = {
            "preset": "medium",
            "tune": "fastdecode",
            "crf": str(crf),
            "g": str(GOP),
            "keyint_min": str(GOP),
            "sc_threshold": "0",
            "bf": "0",
            # one thread: the workers are the parallelism, and x264's output depends on their number
            "threads": "1",
            # the same bytes each time, on every machine: MB-tree's assembly reads memory that nobody wrote, and one
            # small video in thirty came out otherwise (x264 in PyAV 18.1)
            "x264-params": "cpu-independent=1",
        }
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        self._reformatter = VideoReformatter()

    def add(self, frame: np.ndarray) -> None:
        """uint8 [h, w, 3]"""
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = self._reformatter.reformat(picture, format="yuv420p", **ONE_THREAD)
        picture.pts = self.count
        self.count += 1
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


class JpegStage:
    """JPEG files, one behind another; sizes in bytes, and CRC-32 sums."""

    def __init__(self, file: BinaryIO, quality: int) -> None:
        self.sizes: list[int] = []
        self.sums: list[int] = []
        self._file, self._quality = file, quality

    @property
    def count(self) -> int:
        return len(self.sizes)

    def add(self, frame: np.ndarray) -> None:
        """uint8 [h, w, 3]"""
        data = simplejpeg.encode_jpeg(frame, self._quality, colorspace="RGB", colorsubsampling="420")
        self.sizes.append(self._file.write(data))
        self.sums.append(zlib.crc32(data))

    def finish(self) -> None:
        self._file.flush()


def stored_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) of the stored frames: never larger than the source, and even, as 4:2:0 colour needs.

    The long side keeps the proportions to the nearest even number; a smaller video with an odd side loses its last row
    or column.
    """
    short = min(height, width)
    if short <= short_side:
        return height // 2 * 2, width // 2 * 2
    long = 2 * round(max(height, width) * short_side / short / 2)
    return (short_side, long) if height <= width else (long, short_side)


def fit(frame: np.ndarray, short_side: int) -> np.ndarray:
    """A frame, uint8 [h, w, 3], at the size it is stored in. Raises ValueError when it has less than 2x2 pixels."""
    height, width = frame.shape[:2]
    size = stored_size(height, width, short_side)
    check(min(size) >= 2, f"only {width}x{height} pixels")
    crop = Crop(0, 0, *(size if min(height, width) <= short_side else (height, width)))
    return crop_resize(frame[None], crop, size)[0]


class Stages:
    """The phases of one video, each in a file that vanishes with its process; use it inside `with`."""

    def __init__(self, encoding: Encoding, rate: float, folder: Path) -> None:
        """rate: of the source, frames a second. folder: on whose disk the files lie."""
        # x264 spends its bits by how long a frame is shown, and some files say nonsense
        self._rate = Fraction(min(max(rate, 1), 240)).limit_denominator(100_000)
        self.encoding, self._folder = encoding, folder
        self.num_frames = 0
        self.size = self.source_size = (0, 0)
        self.phases: dict[int, tuple[Stage, BinaryIO]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, frame: np.ndarray) -> None:
        """The source's next frame, uint8 [h, w, 3]."""
        phase = self.num_frames % self.encoding.stride
        self.num_frames += 1
        if phase not in self.encoding.kept:
            return
        fitted = fit(frame, self.encoding.short_side)
        self.source_size, self.size = frame.shape[:2], fitted.shape[:2]
        if phase not in self.phases:
            file: BinaryIO = self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
            self.phases[phase] = (self._stage(file), file)
        self.phases[phase][0].add(fitted)

    def _stage(self, file: BinaryIO) -> Stage:
        encoding = self.encoding
        if encoding.codec == "jpeg":
            return JpegStage(file, encoding.jpeg_quality)
        return H264Stage(file, encoding.crf, self.size, self._rate / encoding.stride)

    def finish(self) -> None:
        for stage, file in self.phases.values():
            stage.finish()
            file.seek(0)


def encode_sample(task: Task, encoding: Encoding, out: Path) -> int:
    """Write the sample of one video to a file, tar members without the end of an archive; the source's frames.

    Raises UnreadableVideo when the video cannot be read from its first frame to its last.
    """
    video = Video(task.path)
    with Stages(encoding, video.rate, out.parent) as stages:
        for frame in video.stream():
            stages.add(frame)
        if stages.num_frames == 0:
            raise UnreadableVideo(task.path, "no frames")
        stages.finish()
        facts = {
            "format": FORMAT,
            "key": task.key,
            "source": task.source,
            **({} if task.label is None else {"label": task.label}),
            "frames": stages.num_frames,
            "fps": video.rate,
            **dict(zip(("height", "width"), stages.size, strict=True)),
            **dict(zip(("source_height", "source_width"), stages.source_size, strict=True)),
            "codec": encoding.codec,
            "stride": encoding.stride,
            "phases": list(stages.phases),
        }
        with out.open("wb") as file:
            write_sample(file, facts, _members(stages, facts))
    return stages.num_frames


def sample_path(work: Path, number: int) -> Path:
    """Where a video's finished sample waits for its shard."""
    return work / f"{number:08d}.tar"


def refusal_path(work: Path, number: int) -> Path:
    """Where it is noted that a video was refused, and why."""
    return work / f"{number:08d}.refused.json"


def refuse(work: Path, task: Task, reason: str) -> None:
    write_text(refusal_path(work, task.number), json.dumps({"source": task.source, "reason": reason}) + "\n")


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Preparing:
    """The workers' service: one video to a sample, or a refusal, in the folder work."""

    encoding: Encoding
    work: Path

    @property
    def fds(self) -> tuple[int, ...]:
        return ()

    def __call__(self, task: Task) -> str | None:
        """Why the work as a whole cannot go on, a full disk for one; None when it can."""
        try:
            path = sample_path(self.work, task.number)
            write_atomically(path, lambda temporary: encode_sample(task, self.encoding, temporary))
        except UnreadableVideo as error:
            refuse(self.work, task, error.reason)
        # decoders and encoders fail in many ways on one odd file in a hundred thousand, and hours of work on the others
        # are not lost for it: it is refused under the error's own name, for people to report
        except Exception as error:
            # reading raises UnreadableVideo: what the system refuses otherwise is to write
            if isinstance(error, OSError) and not isinstance(error, av.FFmpegError):
                return f"{self.work}: {error.strerror or error}"
            refuse(self.work, task, f"unexpected {type(error).__name__}: {error}")
        return None


class Member(NamedTuple):
    """One file of a sample: its data are the next size bytes of file."""

    name: str  # what follows KEY and a dot
    file: BinaryIO
    size: int


def _members(stages: Stages, facts: dict[str, Any]) -> list[Member]:
    """The frames' files, phase by phase; what the reader must know of them is entered in facts."""
    members = []
    stride = stages.encoding.stride
    for phase, (stage, file) in stages.phases.items():
        if isinstance(stage, JpegStage):
            facts.setdefault("sizes", []).extend(stage.sizes)
            facts["crc32"] = facts.get("crc32", "") + hexadecimal(stage.sums)
            members += [Member(f"{phase + k * stride:06d}.jpg", file, size) for k, size in enumerate(stage.sizes)]
        else:
            stream = stream_facts(file, "mp4" if len(stages.encoding.kept) == 1 else f"p{phase}.mp4")
            check(len(stream["packets"]) == stage.count, f"{len(stream['packets'])} packets of {stage.count} frames")
            facts.setdefault("streams", []).append(stream)
            members.append(Member(stream["member"], file, stream["size"]))
    return members


def stream_facts(file: BinaryIO, member: str) -> dict[str, Any]:
    """What KEY.json says of one mp4: where its packets lie. Raises ValueError when they do not lie side by side."""
    with av.open(file, "r") as container:
        stream = container.streams.video[0]
        extradata = stream.codec_context.extradata or b""
        packets = [(p.pos or 0, p.size, zlib.crc32(bytes(p))) for p in container.demux(stream) if p.size]
    for (before, size, _), (position, _, _) in pairwise(packets):
        check(position == before + size, f"{member}: a packet begins at byte {position}, not {before + size}")
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    return {
        "member": member,
        "size": total,
        "first": packets[0][0],
        "packets": [size for _, size, _ in packets],
        "crc32": hexadecimal([crc for _, _, crc in packets]),
        "extradata": base64.b64encode(extradata).decode(),
    }


def hexadecimal(sums: Sequence[int]) -> str:
    """CRC-32 sums as KEY.json holds them, 8 digits each."""
    return "".join(f"{crc:08x}" for crc in sums)


def write_sample(out: BinaryIO, facts: Mapping[str, Any], members: Sequence[Member]) -> None:
    """Append a sample to out, facts becoming KEY.json, with the offsets that only this function knows.

    members: the frames' files, in stored order; for H.264 those that facts["streams"] lists.
    """
    small = [("cls", str(facts["label"]).encode())] if "label" in facts else []
    begin = sum(member_bytes(len(data)) for _, data in small) + BLOCK
    offsets = list(accumulate((member_bytes(m.size) for m in members), initial=begin))
    if "streams" in facts:
        streams = [{**stream, "offset": offset} for stream, offset in zip(facts["streams"], offsets, strict=False)]
        facts = {**facts, "streams": streams}
    else:
        facts = {**facts, "offset": begin}
    small.insert(0, ("json", json.dumps(facts, separators=(",", ":")).encode()))
    for name, data in small:
        out.write(_header(f"{facts['key']}.{name}", len(data)) + data + _padding(len(data)))
    for member in members:
        out.write(_header(f"{facts['key']}.{member.name}", member.size))
        copy(member.file, out, member.size)
        out.write(_padding(member.size))


def copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    """The next size bytes of source, to out. Raises OSError when there are fewer."""
    while size:
        data = source.read(min(size, 1 << 20))
        if not data:
            raise OSError("a file of the preparation is shorter than it was")
        out.write(data)
        size -= len(data)


def member_bytes(size: int) -> int:
    """Bytes that a file of this size takes in a tar."""
    return BLOCK + padded(size)


def _header(name: str, size: int) -> bytes:
    # owner, group and time stay zero: the same input gives the same bytes
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(padded(size) - size)
