"""How much disk each way of preparing a list of videos would take: some of them are encoded for their first seconds."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels.launch import check
from videomae.data.decode import Video
from videomae.data.pool import perform_all
from videomae.data.prepare_sample import Encoding, JpegStage, Stages, fit, member_bytes
from videomae.data.shards import GOP
from videomae.wording import counted

_SAMPLED = 12  # videos
_PATIENCE = 60.0  # seconds for one of them


class Choice(NamedTuple):
    """One way of storing: a line of the table."""

    codec: str
    stride: int
    phases: str

    def of(self, encoding: Encoding) -> Encoding:
        return replace(encoding, codec=self.codec, stride=self.stride, phases=self.phases)

    def __str__(self) -> str:
        if self.stride == 1:
            kept = "every frame"
        elif self.phases == "first":
            kept = f"frames 0, {self.stride}, {2 * self.stride}, ... only"
        else:
            kept = f"every frame, in {self.stride} phases"
        return f"--codec {self.codec:9} --stride {self.stride} --phases {self.phases:5}   {kept}"


def choices(encoding: Encoding) -> list[Choice]:
    """The ways to choose from, the chosen one among them."""
    stride = encoding.stride
    out = [Choice(codec, stride, phases) for codec in ("h264-fast", "jpeg") for phases in ("all", "first")]
    out.append(Choice("h264-fast", 1, "all"))
    if stride == 1:
        out = [Choice(codec, 1, encoding.phases) for codec in ("h264-fast", "jpeg")]
    return out


class Estimate(NamedTuple):
    """source: bytes of the videos as they are. bytes: of each choice, None where no video could be read. unread: how
    many of the sampled could not be."""

    videos: int
    source: int
    bytes: dict[Choice, int] | None
    sampled: int
    unread: int

    def table(self, chosen: Encoding, free: int) -> str:
        """For people; free: bytes on the set's disk."""
        lines = [
            f"{counted(self.videos, 'video')}, {gigabytes(self.source)}; free where the set goes: {gigabytes(free)}"
        ]
        if self.bytes is None:
            return f"{lines[0]}\nno estimate: none of {self.sampled} sampled videos could be read"
        lines.append(f"estimated from the first seconds of {counted(self.sampled - self.unread, 'video')}:")
        for choice, size in self.bytes.items():
            mark = "->" if choice == (chosen.codec, chosen.stride, chosen.phases) else "  "
            lines.append(f" {mark} {gigabytes(size):>9}   {choice}")
        return "\n".join(lines)


def gigabytes(size: float) -> str:
    """A number of bytes for people."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1e3:.3g} kB"


def estimate(paths: Sequence[str], encoding: Encoding, *, workers: int, timeout: float) -> Estimate:
    """Bytes that a set of these videos takes, from some that are spread over the list."""
    sizes = [_size(path) for path in paths]
    total, ways = sum(sizes), choices(encoding)
    count = min(_SAMPLED, len(paths))
    sampled = [(paths[k], sizes[k]) for k in (i * len(paths) // count for i in range(count))]
    measured: dict[Choice, float] = defaultdict(float)
    source = unread = 0
    limit = min(timeout, _PATIENCE)
    for outcome in perform_all(Measure(encoding), sampled, workers=min(workers, count), timeout=limit):
        if outcome.value is None:
            unread += 1
            continue
        source += outcome.task[1]
        for way in ways:
            measured[way] += outcome.value[way]
    known = {way: round(measured[way] * total / source) for way in ways} if source else None
    return Estimate(len(paths), total, known, count, unread)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # refused when its turn comes
        return 0


@dataclass(frozen=True)
class Measure:
    """The workers' service: what a video takes in each way, to judge by its first seconds."""

    encoding: Encoding

    @property
    def fds(self) -> tuple[int, ...]:
        return ()

    def __call__(self, task: tuple[str, int]) -> dict[Choice, float] | None:
        """(path, its bytes) -> the bytes it would take; None when it cannot be read."""
        try:
            return self._measure(task[0])
        # one video of a list: whatever is wrong with it shows when it is prepared, and is reported then
        except Exception:
            return None

    def _measure(self, path: str) -> dict[Choice, float]:
        video = Video(path)
        # one group of pictures in every phase
        first = islice(video.stream(), GOP * max(self.encoding.stride, 2))
        frames = [fit(frame, self.encoding.short_side) for frame in first]
        ways = choices(self.encoding)
        return {way: _encoded(way.of(self.encoding), video.rate, frames) * len(video) / len(frames) for way in ways}


def _encoded(encoding: Encoding, rate: float, frames: Sequence[np.ndarray]) -> float:
    """Bytes of these frames in a tar."""
    with Stages(encoding, rate, Path(tempfile.gettempdir())) as stages:
        for frame in frames:
            stages.add(frame)
        stages.finish()
        total = 0
        for stage, file in stages.phases.values():
            sizes = stage.sizes if isinstance(stage, JpegStage) else [file.seek(0, os.SEEK_END)]
            total += sum(map(member_bytes, sizes))
    return total


def check_space(known: Estimate, encoding: Encoding, free: int, out: Path) -> None:
    """Raises ValueError when the chosen way does not fit."""
    need = (known.bytes or {}).get(Choice(encoding.codec, encoding.stride, encoding.phases), 0)
    check(
        need <= free,
        f"the set would take about {gigabytes(need)}, and {out} has {gigabytes(free)} free: choose another way from "
        "the table, a smaller --short-side, or another disk",
    )
