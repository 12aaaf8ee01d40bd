"""Which videos there are, and in which order their clips come."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.launch import check
from videomae.data import shards, storage
from videomae.keys import key, keys

SUFFIXES = frozenset(
    (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv")
)

ROOT_HELP = "of a list: the folder that its paths start from and may not leave; without it a list may name any file"

# what a draw is for: the last number of its key
ORDER, FRAMES, CROP, MASK, AUGMENT, BOXES = range(6)


class NoSplit(ValueError):
    """There is no data of the split that was asked for, as opposed to some that is wrong."""


class Sample(NamedTuple):
    """With the run's seed, all that a clip depends on. index: the video's place in the list; view: which crop and mask
    of the clip."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a sample for
    view: int


@dataclass(frozen=True)
class VideoList:
    """Videos by absolute path, or by their place in a prepared set; labels is None where the source has none.

    step: only frames 0, step, 2 step, ... of each video can be read. notes: what is wrong with the set as a whole.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    step: int = 1
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any video's name, their order or number; a set that moved keeps them."""
        return hashlib.sha256("\n".join(names_below(self.paths)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def names_below(paths: Sequence[str]) -> list[str]:
    """Paths relative to the folder that holds them all."""
    start = os.path.commonprefix([min(paths), max(paths)]).rfind("/") + 1 if paths else 0
    return [path[start:] for path in paths]


def find_videos(source: str | Path, root: str | Path | None = None) -> VideoList:
    """The videos of a folder (searched to the bottom, in sorted order), of a list file, or of a prepared set: its
    folder, or its URL (`s3://...`).

    A list has one video a line: `path label`, `path`, or VideoMAE V2's `path 0 -1`. Paths may hold spaces, are relative
    to the list's folder, and get `.mp4` where their name has no dot. A list may name any file, as published ones do.

    root: for lists, the folder that paths are relative to, and that none of them may leave: by `..` or in full; its
    symbolic links may. Raises ValueError when there is no such thing, or no video in it.
    """
    check(str(source) != "", "no path to look for videos in")
    if storage.is_url(str(source)) or shards.is_prepared(Path(source).expanduser()):
        check(root is None, f"a root is for lists; {source} is none")
        return _prepared(str(source))
    source = Path(source).expanduser()
    if source.is_dir():
        check(root is None, f"a root is for lists; {source} is a folder")
        found, notes = _walk(source.resolve())
        check(len(found) > 0, f"no videos in {source} (looked for {' '.join(sorted(SUFFIXES))})")
        return VideoList(tuple(sorted(found)), notes=tuple(notes))
    check(source.exists(), f"no such file or folder: {source}")
    check(source.is_file() or source.is_fifo(), f"{source} is neither a folder nor a list of videos")
    check(source.suffix.lower() not in SUFFIXES, f"{source} is a video; give its folder, or a list of videos")
    return _read_list(source, None if root is None else Root.of(root))


def find_named(sources: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Every video of several sources, each once: videos, folders of them, prepared sets; and which frames of all can be
    read: 0, step, 2 step, ... ValueError for a folder without one."""
    paths: list[str] = []
    step = 1
    for source in sources:
        check(source != "", "a video's name is empty")
        path = Path(source).expanduser()
        if path.is_dir():
            found = find_videos(path)
            paths += found.paths
            step = max(step, found.step)
        else:
            paths.append(source if shards.is_locator(source) else os.path.abspath(path))
    return tuple(dict.fromkeys(paths)), step


def _prepared(root: str) -> VideoList:
    if not storage.is_url(root):
        root = str(Path(root).expanduser().resolve())
    found = shards.read_index(root)
    return VideoList(found.paths, found.labels, found.step, found.notes)


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Video files below root, through symbolic links, but into no folder twice; and folders that cannot be searched."""
    found, seen = [], set()
    notes: list[str] = []

    def note(error: OSError) -> None:
        notes.append(f"{error.filename} could not be searched: {error.strerror}")

    for folder, below, names in os.walk(root, followlinks=True, onerror=note):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        # what a Mac leaves beside every file has the file's suffix
        below[:] = [name for name in below if not _is_hidden(name)]
        names = [name for name in names if not _is_hidden(name)]
        found += [os.path.join(folder, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return found, notes


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


@dataclass(frozen=True)
class Root:
    """The folder that a list's paths must stay in: as it was given, and without symbolic links."""

    given: str
    real: str

    @classmethod
    def of(cls, root: str | Path) -> "Root":
        """Raises ValueError where it is no folder."""
        given = os.path.abspath(Path(root).expanduser())
        check(str(root) != "" and os.path.isdir(given), f"the root of a list must be a folder; {root!s} is none")
        return cls(given, os.path.realpath(given))

    def place(self, path: str) -> str | None:
        """The path in full, without `..`: the name that was looked at is the one that is opened. None for one
        outside."""
        # no Path: for 250,000 lines that takes seconds
        full = os.path.normpath(os.path.join(self.real, path))
        return full if full.startswith((os.path.join(self.real, ""), os.path.join(self.given, ""))) else None

    def refusal(self, path: str) -> str:
        return f"{path} lies outside of the root, {self.given}"


def _read_list(source: Path, root: Root | None) -> VideoList:
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no list of videos: not text ({error.reason})") from error
    rows = [(line.strip(), f"{source}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    entries = [_parse_line(*row) for row in rows]
    check(len(entries) > 0, f"no videos in {source}: the list is empty")
    labels = [label for _, label in entries]
    labelled = sum(label is not None for label in labels)
    check(labelled in (0, len(labels)), f"{source}: {labelled} of {len(labels)} lines have a label; all must, or none")
    names = [path if "." in os.path.basename(path) else f"{path}.mp4" for path, _ in entries]
    if root is None:
        folder = source.parent.resolve()
        paths = tuple(str(folder / name) for name in names)
    else:
        paths = tuple(_placed(root, name, where) for name, (_, where) in zip(names, rows, strict=True))
    return VideoList(paths, tuple(label for label in labels if label is not None) if labelled else None)


def _placed(root: Root, path: str, where: str) -> str:
    found = root.place(path)
    if found is None:
        raise ValueError(f"{where}: {root.refusal(path)}")
    return found


def _parse_line(line: str, where: str) -> tuple[str, int | None]:
    """(path, label or None) of one line of a list."""
    if whole := re.fullmatch(r"(.*\S)\s+(\d+)\s+(-?\d+)", line):
        path, start, total = whole[1], int(whole[2]), int(whole[3])
        if (start, total) == (0, -1):
            return path, None
        # two trailing numbers after a video's name can only be V2's form for folders of frames
        is_video = os.path.splitext(path)[1].lower() in SUFFIXES
        check(not is_video and total != -1, f"{where}: only whole videos (`path 0 -1`) can be read, not `{line}`")
    if labelled := re.fullmatch(r"(.*\S)\s+(-?\d+)", line):
        return labelled[1], int(labelled[2])
    name, comma, rest = line.rpartition(",")
    is_comma = bool(comma) and os.path.splitext(name)[1].lower() in SUFFIXES and rest.strip().lstrip("-").isdigit()
    check(not is_comma, f"{where}: path and label are parted by a space, not a comma: `{line}`")
    return line, None


class Order:
    """In which order clips come: every epoch's own permutation of the videos, one after another without a gap."""

    def __init__(self, num_videos: int, seed: int, views: int = 1) -> None:
        check(num_videos > 0, "no videos to order")
        check(views >= 1, f"views must be at least 1; got {views}")
        self._num_videos, self._seed, self._views = num_videos, seed, views
        # batches cross from one epoch into the next, so two are kept
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> torch.Tensor:
        scores = keys(self._seed, epoch, torch.arange(self._num_videos), ORDER)
        return torch.argsort(scores, stable=True)

    def samples(self, start: int, count: int) -> list[Sample]:
        """Clips start ... start + count - 1 of the run; the views of one clip are neighbours."""
        out = []
        for position in range(start, start + count):
            item, view = divmod(position, self._views)
            epoch, place = divmod(item, self._num_videos)
            out.append(Sample(epoch, int(self._permutation(epoch)[place]), view))
        return out


def mask_keys(seed: int, samples: Sequence[Sample]) -> torch.Tensor:
    """int64 [B], one key per clip for `videomae.masking`."""
    return torch.tensor([key(seed, *sample, MASK) for sample in samples], dtype=torch.int64)
