"""What a worker of `check.py` does: examine one video file, hash one, or look through a folder.

Examining decodes three frames, which is nearly all of its time; every touch of a listed file is here, since on a dead
disk even asking for its size hangs.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from videomae.data.dataset import find_videos
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.facts import facts
from videomae.data.shards import is_locator, is_prepared

_END = 1 << 16  # bytes at each end of a file that must agree before all of it is hashed


class Look(NamedTuple):
    """Task: examine this file."""

    path: str


class Hash(NamedTuple):
    """Task: hash all of this file; the answer is (digest, None), or (None, the reason why not)."""

    path: str


class Search(NamedTuple):
    """Task: the video files of this folder, to the bottom, as pairs (path, real path)."""

    folder: str


@dataclass(frozen=True)
class Examined:
    """One file, or one video of a prepared set, which has no bytes, stated, real and ends.

    reason: why status is not ok. seconds: of the frames that are there, at the average rate; stated: what the header
    says. real: the path without symbolic links. ends: digest of the file's first and last bytes.
    """

    status: Literal["ok", "missing", "unreadable", "too short"]
    reason: str | None = None
    bytes: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    codec: str | None = None
    fps: float | None = None
    seconds: float | None = None
    stated: float | None = None
    real: str | None = None
    ends: str | None = None


@dataclass(frozen=True)
class Examiner:
    """The service of `pool.py` that performs these tasks."""

    fds: tuple[int, ...] = ()

    def __call__(self, task: Look | Hash | Search) -> object:
        if isinstance(task, Look):
            return examine(task.path)
        return _hash(task.path) if isinstance(task, Hash) else _search(task.folder)


def examine(path: str) -> Examined:
    """Open the video, decode its first, middle and last frame, and say what it is; raises nothing."""
    if is_locator(path):
        return _open(path, None)
    try:
        size, real = os.stat(path).st_size, os.path.realpath(path)
    except (FileNotFoundError, NotADirectoryError):
        # a path that goes through a file is not there either
        return Examined("missing", f"a link to {os.readlink(path)}" if os.path.islink(path) else None)
    except (OSError, ValueError) as error:
        return Examined("unreadable", getattr(error, "strerror", None) or str(error))
    return replace(_open(path, size), bytes=size, real=real)


def _open(path: str, size: int | None) -> Examined:
    if size == 0 and os.path.isfile(path):
        return Examined("unreadable", "an empty file")
    try:
        return _decode(path, size)
    except UnreadableVideo as error:
        return Examined("unreadable", error.reason + _text_in(path))
    # a file that makes a library fail in a new way would end a training run: it is to be named here, with the others
    except Exception as error:
        return Examined("unreadable", f"{type(error).__name__}: {error}")


def _decode(path: str, size: int | None) -> Examined:
    video = Video(path)
    frames = len(video)
    # what is stored of a prepared video begins with frame 0 and goes on in its steps
    numbers = [number // video.step * video.step for number in (0, frames // 2, frames - 1)]
    try:
        height, width = video.read(sorted(set(numbers))).shape[1:3]
    except UnreadableVideo as error:
        raise UnreadableVideo(path, _where(video, numbers, error.reason)) from error
    codec, stated = ("prepared", None) if size is None else facts(path)
    return Examined(
        "ok" if frames > 1 else "too short",
        None if frames > 1 else "a single frame",
        frames=frames,
        height=height,
        width=width,
        codec=codec,
        fps=video.rate,
        seconds=frames / video.rate,
        stated=stated,
        ends=None if size is None else _ends(path, size),
    )


def _where(video: Video, numbers: list[int], reason: str) -> str:
    """Which of the first, middle and last frame it was that could not be read."""
    failed = []
    for name, number in zip(("first", "middle", "last"), numbers, strict=True):
        try:
            video.read([number])
        except UnreadableVideo as error:
            failed.append((name, error.reason))
    if not failed:
        return f"between the first, middle and last frame: {reason}"
    return f"{' and '.join(name for name, _ in failed)} frame: {failed[0][1]}"


def _text_in(path: str) -> str:
    """How a file begins that is text: a page that says the download failed, or a pointer of a version control."""
    try:
        with open(path, "rb") as file:
            begin = file.read(60).decode()
    except (OSError, UnicodeDecodeError):
        return ""
    words = " ".join(begin.split())
    return f" (it is text: '{words[:40]}')" if words and words.isprintable() else ""


def _ends(path: str, size: int) -> str:
    try:
        with open(path, "rb") as file:
            first = file.read(_END)
            file.seek(max(size - _END, 0))
            return hashlib.sha256(first + file.read(_END)).hexdigest()
    except OSError as error:
        raise UnreadableVideo(path, error.strerror or str(error)) from error


def _hash(path: str) -> tuple[str | None, str | None]:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        return None, error.strerror or str(error)
    return digest.hexdigest(), None


def _search(folder: str) -> list[tuple[str, str]]:
    if is_prepared(folder):
        return []
    try:
        return [(path, os.path.realpath(path)) for path in find_videos(folder).paths]
    except ValueError:  # it has none
        return []
