"""What `train.features` leaves behind: a file for each video, an index of the finished ones, the card of the settings.

Every file is whole or not there: rows go to a temporary one, which is flushed, then renamed, then entered in the index.
A video is finished when the index names it, so that a command that was killed at any moment goes on where it was.
"""

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kernels.launch import check
from videomae.weight_files import write_atomically

CARD = "features.json"
_NAMES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}  # safetensors'


def safetensors_header(arrays: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """How a safetensors file begins whose data are these arrays (dtype, shape), one after the other."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in arrays.items():
        end = begin + int(np.prod(shape)) * np.dtype(dtype).itemsize
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return len(text).to_bytes(8, "little") + text


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """How an npy file begins."""
    out = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


class FeatureFile:
    """A video's features on their way to disk, a few windows at a time; not there until `finish`."""

    def __init__(self, path: Path, begin: bytes, rows: int) -> None:
        """begin: what stands before the rows."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._missing = path, rows
        # a name of any length has a short one
        self._temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
        self._file: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115  # closed by finish or abandon
        self._file.write(begin)

    def add(self, rows: np.ndarray) -> bool:
        """Append rows; whether these were the last."""
        self._file.write(np.ascontiguousarray(rows).data)
        self._missing -= len(rows)
        return self._missing == 0

    def finish(self) -> None:
        assert self._missing == 0
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _name(stem: str, part: int, parts: int) -> str:
    return f"{stem}.jsonl" if parts == 1 else f"{stem}-{part}-of-{parts}.jsonl"


class Ledger:
    """Which videos are finished, and which could not be read, of one part of the work."""

    def __init__(self, out: Path, part: int, parts: int) -> None:
        self._out, self._index = out, out / _name("index", part, parts)
        self.unreadable = out / _name("unreadable", part, parts)
        _drop_half_a_line(self._index)
        # by all parts, however many there were
        lines = (line for path in sorted(out.glob("index*.jsonl")) for line in _lines(path))
        self._files = {line["video"]: line["file"] for line in lines}
        self.unreadable.unlink(missing_ok=True)  # they are tried again
        self.num_unreadable = 0

    def is_done(self, video: str) -> bool:
        return video in self._files and (self._out / self._files[video]).is_file()

    def add(self, line: Mapping[str, Any]) -> None:
        _append(self._index, line)

    def add_unreadable(self, video: str, reason: str) -> None:
        self.num_unreadable += 1
        _append(self.unreadable, {"video": video, "reason": reason})


def join_parts(out: Path, parts: int, order: Sequence[str]) -> Path:
    """Make of the lists of all parts, which are done, those that one would have left, in the videos' order. Returns
    where those stand that could not be read."""
    index, lost = out / _name("index", 0, 1), out / _name("unreadable", 0, 1)
    # of earlier commands too, which may have been shared otherwise; what they could not read was tried again
    done = _in_order([index, *sorted(out.glob("index-*-of-*.jsonl"))], order)
    unread = _in_order([out / _name("unreadable", part, parts) for part in range(parts)], order)
    write_atomically(index, lambda file: file.write_text(done))
    lost.unlink(missing_ok=True)
    if unread:
        write_atomically(lost, lambda file: file.write_text(unread))
    for stem in ("index", "unreadable"):
        for path in out.glob(f"{stem}-*-of-*.jsonl"):
            path.unlink()
    return lost


def _in_order(paths: Sequence[Path], order: Sequence[str]) -> str:
    """The last line of each video in these files."""
    place = {video: number for number, video in enumerate(order)}
    lines = {line["video"]: line for path in paths if path.exists() for line in _lines(path)}
    found = sorted(lines.values(), key=lambda line: place.get(line["video"], len(place)))
    return "".join(json.dumps(line) + "\n" for line in found)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # else of another part, being written
            yield json.loads(line)


def _drop_half_a_line(path: Path) -> None:
    """What a process was writing when it was killed."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


def settle_card(out: Path, card: Mapping[str, Any]) -> None:
    """Write what the features depend on, or compare with what is there. Raises ValueError when they differ."""
    path = out / CARD
    # looked at once: another part may write the card at any moment
    others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")] if out.is_dir() else []
    if CARD not in others:
        check(not others, f"{out} holds other things ({others[0] if others else ''}); give a folder of its own")
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f".{CARD}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(card, indent=2) + "\n")
        os.replace(temporary, path)
        return
    try:
        before = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    now = json.loads(json.dumps(card))
    changed = [
        f"{key}: {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)
    ]
    check(not changed, f"{out} holds features with other settings ({'; '.join(changed)}); give another --out")


@contextmanager
def locked(out: Path, videos: range) -> Iterator[None]:
    """Hold these videos of the list while inside. Raises ValueError when another process holds one of them."""
    if not videos:  # of more processes than videos
        yield
        return
    with (out / ".lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, len(videos), videos.start)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"another process is at work on some of these videos in {out}") from error
        except OSError as error:
            raise ValueError(f"{out} is on a file system that cannot lock files: {error.strerror}") from error
        yield


def begin_of(
    format: str,
    dtype: str,
    shape: tuple[int, ...],
    starts: Sequence[int],
    seconds: Sequence[float],
    metadata: Mapping[str, str],
) -> bytes:
    """What a video's file holds before its features: in safetensors the windows' starts too, in frames and seconds."""
    if format == "npy":
        return npy_header(dtype, shape)
    before = {"starts": np.array(starts, dtype="<i8"), "seconds": np.array(seconds, dtype="<f8")}
    arrays = {name: (str(array.dtype), array.shape) for name, array in before.items()}
    header = safetensors_header({**arrays, "features": (dtype, shape)}, metadata)
    return header + b"".join(array.tobytes() for array in before.values())
