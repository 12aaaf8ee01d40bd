"""Which videos there are, in which order their clips come, and how one clip is read."""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kernels.launch import check
from videomae.data import shards, storage
from videomae.data.augment import Augment, crop_resize, multi_scale_crop
from videomae.data.decode import Decoder, UnreadableVideo, Video
from videomae.data.sampling import pretrain_frames, pretrain_start
from videomae.keys import Draws, key, keys

SUFFIXES = frozenset(
    (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv")
)

# what a draw is for: the last number of its key
_ORDER, _FRAMES, _CROP, _MASK = range(4)


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
        """16 hex digits that change with any path's name, their order or number."""
        return hashlib.sha256("\n".join(self.paths).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_videos(source: str | Path) -> VideoList:
    """The videos of a folder (searched to the bottom, in sorted order), of a list file, or of a prepared set: its
    folder, or its URL (`s3://...`).

    A list has one video a line: `path label`, `path`, or VideoMAE V2's `path 0 -1`. Paths may hold spaces, are relative
    to the list's folder, and get `.mp4` where their name has no dot. Raises ValueError when there is no such thing, or
    no video in it.
    """
    check(str(source) != "", "no path to look for videos in")
    if storage.is_url(str(source)) or shards.is_prepared(Path(source).expanduser()):
        return _prepared(str(source))
    source = Path(source).expanduser()
    if source.is_dir():
        found, notes = _walk(source.resolve())
        check(len(found) > 0, f"no videos in {source} (looked for {' '.join(sorted(SUFFIXES))})")
        return VideoList(tuple(sorted(found)), notes=tuple(notes))
    check(source.exists(), f"no such file or folder: {source}")
    check(source.is_file() or source.is_fifo(), f"{source} is neither a folder nor a list of videos")
    check(source.suffix.lower() not in SUFFIXES, f"{source} is a video; give its folder, or a list of videos")
    return _read_list(source)


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
        found += [os.path.join(folder, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return found, notes


def _read_list(source: Path) -> VideoList:
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no list of videos: not text ({error.reason})") from error
    folder = source.parent.resolve()
    entries = [_parse_line(line.strip(), f"{source}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    check(len(entries) > 0, f"no videos in {source}: the list is empty")
    labels = [label for _, label in entries]
    labelled = sum(label is not None for label in labels)
    check(labelled in (0, len(labels)), f"{source}: {labelled} of {len(labels)} lines have a label; all must, or none")
    paths = tuple(str(folder / (path if "." in os.path.basename(path) else f"{path}.mp4")) for path, _ in entries)
    return VideoList(paths, tuple(label for label in labels if label is not None) if labelled else None)


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
        scores = keys(self._seed, epoch, torch.arange(self._num_videos), _ORDER)
        return torch.argsort(scores, stable=True)

    def samples(self, start: int, count: int) -> list[Sample]:
        """Clips start ... start + count - 1 of the run; the views of one clip are neighbours."""
        out = []
        for position in range(start, start + count):
            item, view = divmod(position, self._views)
            epoch, place = divmod(item, self._num_videos)
            out.append(Sample(epoch, int(self._permutation(epoch)[place]), view))
        return out


class Spent(NamedTuple):
    """Seconds that reading one clip took. waited: the part of open and decode in which the processor did not work for
    this process: storage, or other processes."""

    open: float = 0.0
    decode: float = 0.0
    crop: float = 0.0
    waited: float = 0.0

    def plus(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total(self) -> float:
        return self.open + self.decode + self.crop


@dataclass(frozen=True)
class ClipReader:
    """Reads pre-training clips: a pure function of the file and (seed, epoch, index, view).

    views are spread over so many temporal windows: the first views / windows of them see the first window, and so on;
    all are decoded at once.
    """

    frames: int
    size: tuple[int, int]
    stride: int
    augment: Augment
    seed: int
    views: int = 1
    windows: int = 1
    decoder: Decoder = Decoder()

    def __post_init__(self) -> None:
        check(
            self.frames >= 1 and self.stride >= 1,
            f"frames and stride must be positive; got {self.frames}, {self.stride}",
        )
        check(
            1 <= self.windows <= self.views and self.views % self.windows == 0,
            f"views must be a multiple of windows; got {self.views} views, {self.windows} windows",
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, *self.size, 3)

    def read(self, path: str, samples: Sequence[Sample]) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] for each of several views of one clip, decoded once. Raises UnreadableVideo."""
        out = [np.empty(self.shape, dtype=np.uint8) for _ in samples]
        self.read_into(path, samples, out)
        return out

    def read_into(self, path: str, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> Spent:
        """Write the views into out, arrays like `read`'s; what it took. Raises UnreadableVideo."""
        epoch, index, _ = samples[0]
        assert all((s.epoch, s.index) == (epoch, index) for s in samples)
        begin, busy = time.perf_counter(), time.process_time()
        video = Video(path, self.decoder)
        if len(video) < 2:
            raise UnreadableVideo(path, "a single frame, not a video")
        opened = time.perf_counter()
        # all of them, also for a part of the views: whether a clip can be read must not depend on how they are split
        numbers = {w: self._numbers(video, epoch, index, w) for w in range(self.windows)}
        windows = [min(sample.view * self.windows // self.views, self.windows - 1) for sample in samples]
        # a short video repeats its last frame, and windows overlap: each frame is decoded once
        distinct = sorted(set().union(*numbers.values()))
        decoded = video.read(distinct)
        waited = time.perf_counter() - begin - (time.process_time() - busy)
        ready = time.perf_counter()
        for sample, window, clip in zip(samples, windows, out, strict=True):
            whole = decoded if numbers[window] == distinct else decoded[np.searchsorted(distinct, numbers[window])]
            self._view(whole, sample, clip)
        return Spent(opened - begin, ready - opened, time.perf_counter() - ready, max(waited, 0.0))

    def _numbers(self, video: Video, epoch: int, index: int, window: int) -> list[int]:
        """The frames of one window of the clip."""
        draws = Draws(self.seed, epoch, index, _FRAMES) if window == 0 else self._later_window(epoch, index, window)
        start = pretrain_start(len(video), self.frames, self.stride, draws, video.step)
        return pretrain_frames(len(video), self.frames, self.stride, start)

    def _later_window(self, epoch: int, index: int, window: int) -> Draws:
        return Draws(self.seed, epoch, index, window, _FRAMES)

    def _view(self, frames: np.ndarray, sample: Sample, out: np.ndarray) -> None:
        draws = Draws(self.seed, *sample, _CROP)
        height, width = frames.shape[1:3]
        crop = multi_scale_crop(height, width, self.size, self.augment.scales, draws)
        flip = self.augment.flip and draws.below(2) == 1
        out[:] = crop_resize(frames, crop, self.size, flip=flip)


def mask_keys(seed: int, samples: Sequence[Sample]) -> torch.Tensor:
    """int64 [B], one key per clip for `videomae.masking`."""
    return torch.tensor([key(seed, *sample, _MASK) for sample in samples], dtype=torch.int64)
