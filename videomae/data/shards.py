"""A prepared set: its format, the index of all its videos, and the reader of one.

A sample is a run of tar members that share a key: KEY.json, KEY.cls where there is a label, then the frames, as H.264
(one .mp4 per phase: phase p of stride s holds the source's frames p, p + s, p + 2s, ...) or as JPEG files. KEY.json
says where every packet lies, so that a clip costs two reads, and only the bytes from the key frames on. Packets go
straight into the decoder: 8.0 ms for 16 frames of 340x256 on a 2.4 GHz core, where a demuxer before it makes 10.
Any tar tool and `webdataset` read shards as well. `prepare.py` makes them.
"""

import json
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import simplejpeg
from av.video.reformatter import VideoReformatter

from kernels.launch import check
from videomae.data import storage
from videomae.data.decode import ONE_THREAD, UnreadableVideo
from videomae.data.sample_facts import BLOCK, ILL_FORMED, NOT_SAID, Stored, Stream, padded, understood

FORMAT = 1
STATE = ".work/settings.json"  # of a preparation under way
SHARD = re.compile(r"shard-\d{5,}\.tar")
GOP = 16  # frames from one key frame to the next
_HEAD = 8192  # bytes of a first read: most videos' KEY.json is shorter
_GAP = 1 << 16  # bytes that are read along rather than asked past
# no dots: nothing outside the folder can be named
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


def is_locator(path: str) -> bool:
    """Whether path names a stored video rather than a file: SHARD.tar::KEY@OFFSET or FOLDER/files::KEY."""
    home, _, name = path.rpartition("::")
    return (home.endswith(".tar") and "@" in name) or home.endswith(("/files", "\\files"))


class StoredVideo:
    """One video of a prepared set; `len` is the source's number of frames, and frames go by the source's numbers."""

    backend = "stored"

    def __init__(self, locator: str) -> None:
        """Raises UnreadableVideo when the shard is missing or cut short, or the index belongs to another."""
        self.path = locator
        self._stored = _stored(locator)
        self._by_phase = {stream.phase: stream for stream in self._stored.streams}

    def __len__(self) -> int:
        return self._stored.num_frames

    @property
    def rate(self) -> float:
        """Frames a second, of the source."""
        return self._stored.rate

    @property
    def step(self) -> int:
        """1 when every frame is stored; s when only 0, s, 2s, ... are."""
        return 1 if len(self._by_phase) == min(self._stored.stride, len(self)) else self._stored.stride

    def read(self, indices: Sequence[int], *, allow_nearest: bool = False) -> np.ndarray:
        """Frames with these numbers, uint8 [K, h, w, 3]; allow_nearest: in place of a frame that is not stored, the
        nearest that is, the earlier of two.

        Raises UnreadableVideo when they are damaged or cut off, ValueError when one is not stored, IndexError for a
        number out of range.
        """
        rows: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row, index in enumerate(indices):
            place, phase = divmod(self._stored_number(int(index), allow_nearest), self._stored.stride)
            rows[phase][place].append(row)
        out = np.empty((len(indices), *self._stored.shape, 3), dtype=np.uint8)
        wanted = [(self._by_phase[phase], places) for phase, places in sorted(rows.items())]
        read = self._read_h264 if self._stored.streams[0].extradata else self._read_jpeg
        read(wanted, out)
        return out

    def stream(self) -> Iterator[np.ndarray]:
        """Every stored frame in order, uint8 [h, w, 3]."""
        at_once = GOP * self._stored.stride
        for start in range(0, len(self), at_once):
            yield from self.read(range(start, min(start + at_once, len(self)), self.step))

    def _stored_number(self, number: int, allow_nearest: bool) -> int:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path} has frames 0 to {len(self) - 1}; asked for {number}")
        stride = self._stored.stride
        if number % stride in self._by_phase:
            return number
        if not allow_nearest:
            raise ValueError(f"{self.path}: frame {number} is not stored, only every {stride}th from 0 on is")
        before = number // stride * stride
        after = before + stride
        return after if after - number < number - before and after < len(self) else before

    def _read_h264(self, wanted: list[tuple[Stream, dict[int, list[int]]]], out: np.ndarray) -> None:
        """Decode each group of pictures that holds a wanted frame once, up to the last one wanted in it."""
        groups = []
        for stream, places in wanted:
            lasts = {place // GOP: place for place in sorted(places)}
            groups += [(stream, places, group * GOP, last) for group, last in lasts.items()]
        pieces = self._fetch([(stream, first, last) for stream, _, first, last in groups])
        decoders = {stream.phase: _Decoder(stream.extradata) for stream, _ in wanted}
        try:
            for (stream, places, first, _), packets in zip(groups, pieces, strict=True):
                decoders[stream.phase].decode(packets, first, places, out)
            found = sum(decoders[stream.phase].finish(places, out) for stream, places in wanted)
        except (av.FFmpegError, ValueError) as error:
            raise UnreadableVideo(self.path, f"damaged in its shard: {error}") from error
        if missing := sum(len(places) for _, places in wanted) - found:
            raise UnreadableVideo(self.path, f"damaged in its shard: {missing} frames do not decode")

    def _read_jpeg(self, wanted: list[tuple[Stream, dict[int, list[int]]]], out: np.ndarray) -> None:
        frames = [(stream, place, rows) for stream, places in wanted for place, rows in sorted(places.items())]
        pieces = self._fetch([(stream, place, place) for stream, place, _ in frames])
        for (stream, place, rows), (data,) in zip(frames, pieces, strict=True):
            try:
                image = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, buffer=out[rows[0]])
                check(image.shape == out.shape[1:], f"it has the shape {image.shape}")
            except ValueError as error:
                raise self._damaged(stream, place, error) from error
            out[rows[1:]] = out[rows[0]]

    def _fetch(self, spans: list[tuple[Stream, int, int]]) -> list[list[memoryview]]:
        """For each (stream, first, last) the bytes of those frames, one by one, in as few reads as pay."""
        asked: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for place, (stream, first, last) in enumerate(spans):
            name = stream.member or f"{first * self._stored.stride + stream.phase:06d}.jpg"
            path = f"{self._stored.home}.{name}" if self._stored.base is None else self._stored.home
            begin = (self._stored.base or 0) + int(stream.begins[first])
            asked[path].append((begin, begin + int(stream.sizes[first : last + 1].sum()), place))
        out: list[list[memoryview]] = [[]] * len(spans)
        for path, ranges in asked.items():
            for run in _runs(sorted(ranges)):
                start, stop = run[0][0], max(end for _, end, _ in run)
                data = memoryview(_read(self.path, path, start, stop - start, exact=True))
                for begin, end, place in run:
                    out[place] = self._frames(data[begin - start : end - start], *spans[place])
        return out

    def _frames(self, data: memoryview, stream: Stream, first: int, last: int) -> list[memoryview]:
        """The bytes of each frame from first to last, which lie side by side in data, as they were written."""
        out, begin = [], 0
        sizes, sums = stream.sizes[first : last + 1].tolist(), stream.sums[first : last + 1].tolist()
        for place, (size, crc) in enumerate(zip(sizes, sums, strict=True), first):
            out.append(data[begin : begin + size])
            begin += size
            if zlib.crc32(out[-1]) != crc:
                raise self._damaged(stream, place, "its bytes are not those that were written")
        return out

    def _damaged(self, stream: Stream, place: int, reason: object) -> UnreadableVideo:
        number = place * self._stored.stride + stream.phase
        return UnreadableVideo(self.path, f"damaged in its shard: frame {number}: {reason}")


def _runs(ranges: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """(begin, end, ...), sorted, in runs that lie close enough together to be read at once."""
    run = ranges[:1]
    for one in ranges[1:]:
        if one[0] - run[-1][1] > _GAP:
            yield run
            run = []
        run.append(one)
    yield run


class _Decoder:
    """H.264 packets of one stream to the wanted ones of their frames."""

    def __init__(self, extradata: bytes) -> None:
        self._codec = av.CodecContext.create("h264", "r")
        self._codec.extradata = extradata
        # one thread: the loader's workers are the parallelism
        self._codec.thread_count, self._codec.thread_type = 1, "NONE"
        self._codec.options = {"err_detect": "explode"}  # an error rather than a patched picture
        self._reformatter = VideoReformatter()
        self._found: set[int] = set()

    def decode(
        self, packets: Sequence[memoryview], first: int, places: Mapping[int, list[int]], out: np.ndarray
    ) -> None:
        """Take packets first, first + 1, ..., and write the frames in places to their rows of out."""
        for place, one in enumerate(packets, first):
            packet = av.Packet(bytes(one))
            packet.pts = place
            self._write(self._codec.decode(packet), places, out)

    def finish(self, places: Mapping[int, list[int]], out: np.ndarray) -> int:
        """Write what the decoder still holds; how many of the wanted frames have come."""
        if len(self._found) < len(places):
            self._write(self._codec.decode(None), places, out)
        return len(self._found)

    def _write(self, frames: Iterable[av.VideoFrame], places: Mapping[int, list[int]], out: np.ndarray) -> None:
        height, width = out.shape[1:3]
        for frame in frames:
            if frame.pts is None or frame.pts not in places:
                continue
            if frame.is_corrupt or (frame.height, frame.width) != (height, width):
                raise ValueError(f"a frame of {frame.height}x{frame.width} that is not as it was written")
            plane = self._reformatter.reformat(frame, format="rgb24", **ONE_THREAD).planes[0]
            lines = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)
            for row in places[frame.pts]:
                out[row].reshape(height, width * 3)[:] = lines[:, : width * 3]
            self._found.add(frame.pts)


def _read(locator: str, path: str, offset: int, size: int, *, exact: bool = False) -> bytes:
    """size bytes; fewer at the end of the file, unless exact. Raises UnreadableVideo."""
    try:
        data = storage.read_range(path, offset, size)
    except FileNotFoundError as error:
        raise UnreadableVideo(locator, f"missing: {path}") from error
    except OSError as error:
        raise UnreadableVideo(locator, f"{path}: {error.strerror or error}") from error
    if exact and len(data) < size:
        raise UnreadableVideo(locator, f"cut short: {path} ends {size - len(data)} bytes too early")
    return data


# for several views of one video in a row: an epoch is larger than any cache, and KEY.json costs 0.06 ms
@lru_cache(maxsize=256)
def _stored(locator: str) -> Stored:
    """Raises UnreadableVideo when KEY.json is not there, or is not what this version reads."""
    home, _, name = locator.rpartition("::")
    try:
        if home.endswith(".tar"):
            key, _, offset = name.rpartition("@")
            text, base = _json_in_tar(locator, home, key, int(offset))
        else:
            # of a list's line it may be anything
            check(_KEY.fullmatch(name) is not None, "no video of a prepared set has such a name")
            key, home, base = name, f"{home}/{name}", None
            text = _read(locator, f"{home}.json", 0, 1 << 26)
        facts = json.loads(text)
        check(facts["format"] == FORMAT, f"format {facts['format']}, where this version reads {FORMAT}")
        check(facts["key"] == key, f"it belongs to {facts['key']}")
        return understood(facts, home, base)
    except ILL_FORMED as error:
        raise UnreadableVideo(locator, f"{name}.json is damaged: {type(error).__name__}: {error}") from error


def _json_in_tar(locator: str, shard: str, key: str, offset: int) -> tuple[bytes, int]:
    """KEY.json, and where its padded data end."""
    head = _read(locator, shard, offset, _HEAD)
    if len(head) < BLOCK:
        raise UnreadableVideo(locator, f"cut short: {shard} ends before it")
    try:
        info = tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise UnreadableVideo(locator, f"the index does not match the shard: {error} at {offset}") from error
    if info.name != f"{key}.json":
        raise UnreadableVideo(locator, f"the index does not match the shard: {info.name} lies at {offset}")
    data = head[BLOCK : BLOCK + info.size]
    if more := info.size - len(data):
        data += _read(locator, shard, offset + BLOCK + len(data), more, exact=True)
    return data, offset + BLOCK + padded(info.size)


@dataclass(frozen=True)
class Prepared:
    """A set's index: everything by video, in the order of the list that it was made from.

    paths: what `Video` opens. sources: the files they were made from, relative to that list's folder. frames: of the
    source. step: 1, or s when only frames 0, s, 2s, ... of each video are stored. notes: shards that are missing or
    changed; their videos fail one by one when they are read.
    """

    root: str
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    sources: tuple[str, ...]
    frames: tuple[int, ...]
    step: int
    notes: tuple[str, ...] = ()


def is_prepared(root: str | Path) -> bool:
    """Whether a folder or URL holds a prepared set, be it an unfinished one, which `read_index` refuses."""
    if storage.is_url(str(root)):
        return storage.exists(storage.join(str(root), "dataset.json"))
    begun = Path(root, "dataset.json").is_file() or Path(root, STATE).is_file()
    return begun or any(Path(root).glob("shard-*.jsonl"))


def read_index(root: str | Path) -> Prepared:
    """The videos of a set in a folder or under a URL.

    Raises ValueError when there is none, it is unfinished, of another format, or its index contradicts itself.
    """
    root = str(root)
    try:
        facts = json.loads(storage.read_text(storage.join(root, "dataset.json")))
        check(facts["format"] == FORMAT, f"{root} has format {facts['format']}; this version reads {FORMAT}")
        layout, sizes = facts["layout"], {shard["name"]: int(shard["size"]) for shard in facts["shards"]}
        step = 1 if len(facts["phases"]) == facts["stride"] else int(facts["stride"])
        check(all(map(SHARD.fullmatch, sizes)), f"{root}/dataset.json names shards that are none: {sorted(sizes)[:3]}")
        text, count = storage.read_text(storage.join(root, "index.jsonl")), facts["videos"]
    except FileNotFoundError as error:
        raise ValueError(_incomplete(root)) from error
    except (*NOT_SAID, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{root}/dataset.json is damaged: {type(error).__name__}: {error}") from error
    except OSError as error:
        raise ValueError(f"the index of {root} cannot be read: {error.strerror or error}") from error
    rows = _rows(root, text)
    check(len(rows) == count, f"{root}/index.jsonl has {len(rows)} lines, not {count}")
    check(len(rows) > 0, f"no videos in {root}: all were refused, see refused.jsonl there")
    folder = storage.join(root, "files")
    paths = [f"{folder}::{row['key']}" for row in rows] if layout == "files" else _in_shards(root, rows, sizes)
    labels = tuple(row["label"] for row in rows if "label" in row)
    check(len(labels) in (0, len(rows)), f"{root}/index.jsonl: {len(labels)} of {len(rows)} lines have a label")
    sources, frames = tuple(row["source"] for row in rows), tuple(row["frames"] for row in rows)
    return Prepared(root, tuple(paths), labels or None, sources, frames, step, _notes(root, sizes))


def _incomplete(root: str) -> str:
    """Why dataset.json or index.jsonl is missing."""
    if storage.is_url(root) or not is_prepared(root) or Path(root, "dataset.json").exists():
        return f"no whole prepared set in {root}: dataset.json or index.jsonl is missing"
    done = len(list(Path(root).glob("shard-*.jsonl")))
    try:
        total = json.loads(Path(root, STATE).read_text())["shards"]
    except (OSError, *ILL_FORMED):
        total = "?"
    return f"{root} is not finished: {done} of {total} shards are done; run the same command again"


def _rows(root: str, text: str) -> list[dict[str, Any]]:
    """The index's lines, each checked."""
    lines = text.splitlines()
    try:
        # as one document: half the time of line by line
        rows = json.loads(f"[{','.join(lines)}]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) != len(lines):
        rows = [_row(line) for line in lines]
    for number, row in enumerate(rows):
        try:
            known = type(row["frames"]) is int and type(row["source"]) is str and type(row.get("label", 0)) is int
            known = known and _KEY.fullmatch(row["key"]) is not None
        except (KeyError, TypeError):
            known = False
        check(known, f"{root}/index.jsonl, line {number + 1}, says of no video where it lies: {lines[number][:200]}")
    return rows


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _in_shards(root: str, rows: list[dict[str, Any]], sizes: dict[str, int]) -> list[str]:
    names = {int(name[6:-4]): name for name in sizes if SHARD.fullmatch(name)}
    check(len(names) == len(sizes), f"{root}/dataset.json names shards that are none: {sorted(sizes)[:3]}, ...")
    homes = {number: (storage.join(root, name), sizes[name]) for number, name in names.items()}
    paths = []
    for number, row in enumerate(rows):
        try:
            home, size = homes[row["shard"]]
            offset = row["offset"]
            inside = type(offset) is int and 0 <= offset < offset + row["size"] <= size
        except (KeyError, TypeError):
            inside = False
        check(inside, f"{root}/index.jsonl, line {number + 1}, points outside the shards: {row}")
        paths.append(f"{home}::{row['key']}@{offset}")
    return paths


def _notes(root: str, sizes: dict[str, int]) -> tuple[str, ...]:
    paths = [storage.join(root, name) for name in sizes]
    # every look-up of an object is a request
    with ThreadPoolExecutor(16 if storage.is_url(root) else 1) as pool:
        found = pool.map(storage.size_of, paths)
        rows = [row for row in zip(paths, found, sizes.values(), strict=True) if row[1] != row[2]]
    wrong = "{} has {} bytes, not {}: its videos may be damaged"
    return tuple(f"{row[0]} is missing" if row[1] is None else wrong.format(*row) for row in rows)
