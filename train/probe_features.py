"""What a probe learns from and is tested on: features of two splits of labelled videos, which the processes share."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.inference import Inference, Reading, Views, read_views
from train.probe_config import ProbeConfig
from train.shares import Shares
from videomae.data.labelled import LabelledVideos
from videomae.data.loader import Skip
from videomae.data.readers import ViewReader
from videomae.features import features_of
from videomae.wording import counted

_AT_ONCE = 32  # clips that are read together
SAY_EVERY = 30.0  # seconds


class CannotProbe(Exception):
    """There is no result: videos that cannot be read, numbers that are none."""


class Split(NamedTuple):
    """One split: the videos that are used of it, in this order, and how each is read."""

    videos: LabelledVideos
    indices: tuple[int, ...]
    reader: ViewReader


class Known(NamedTuple):
    """Features float32 [K, V, D] and labels int64 [K] of the videos of a split that could be read, on the device."""

    features: Tensor
    labels: Tensor


@dataclass
class Probe:
    """All that the methods need."""

    config: ProbeConfig
    weights: str  # what was read
    inference: Inference
    train: Split
    test: Split
    reading: Reading
    shares: Shares
    unreadable: dict[str, int] = field(default_factory=dict)  # by split
    chosen: dict[str, Any] = field(default_factory=dict)  # by a method itself

    @property
    def num_classes(self) -> int:
        return len(self.train.videos.classes)

    def labels(self, split: Split, indices: Sequence[int]) -> Tensor:
        return torch.tensor([split.videos.labels[index] for index in indices], device=self.inference.device)


def features_in(probe: Probe, split: Split, name: str) -> Known:
    """Features of every view of every video of the split that can be read; in the first of several processes, of all
    of their shares."""
    own, shares = _extract(probe, split, name), probe.shares
    shares.wait(name)
    everyones = shares.gather(own)
    if not shares.world.is_first:
        return Known(own.features, probe.labels(split, own.indices))
    lost = [skip for each in everyones for skip in each.skips]
    for skip in lost[len(own.skips) :]:
        _say_lost(name, skip)
    probe.unreadable[name] = len(lost)
    failed = f"{len(lost)} of {counted(len(split.indices), f'{name} video')} cannot be read"
    if len(lost) == len(split.indices):
        raise CannotProbe(failed)
    if name == "test" and lost and probe.config.unreadable == "error":
        raise CannotProbe(f"{failed}; --unreadable wrong counts them as wrong")
    indices, features = _in_order(split.indices, everyones)
    return Known(features.to(probe.inference.device), probe.labels(split, indices))


class _Extracted(NamedTuple):
    """Of a process's share of a split: features [K, V, D] of the videos with these indices, and the others."""

    indices: list[int]
    features: Tensor
    skips: list[Skip]


def _extract(probe: Probe, split: Split, name: str) -> _Extracted:
    parts, found, lost = list[Tensor](), list[int](), list[Skip]()
    function = partial(features_of, probe.inference.model)
    views_each = split.reader.views
    mine = probe.shares.take(len(split.indices), max(_AT_ONCE // views_each, 1))
    said = time.monotonic()
    for views in read(probe, split, [split.indices[number] for number in mine]):
        for skip in views.skips:
            _say_lost(name, skip)
        lost += views.skips
        if views.indices:
            flat_views = probe.inference(views.frames.flatten(0, 1), function)
            # a plain tensor, which a head can learn from
            parts.append(flat_views.unflatten(0, views.frames.shape[:2]).clone())
            found += views.indices
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            print(f"{name}: {len(found) + len(lost):,} of {len(mine):,} {probe.shares.unit('videos')}", flush=True)
    features = torch.cat(parts) if parts else torch.empty(0, views_each, probe.inference.model.size.width)
    # several processes tell each other on the host
    return _Extracted(found, features if probe.shares.store is None else features.cpu(), lost)


def _in_order(order: Sequence[int], everyones: Sequence[_Extracted]) -> tuple[list[int], Tensor]:
    """All videos as one process would have read them: their indices and features."""
    if len(everyones) == 1:
        return everyones[0].indices, everyones[0].features
    indices = [index for each in everyones for index in each.indices]
    place = {index: number for number, index in enumerate(order)}
    rows = sorted(range(len(indices)), key=lambda row: place[indices[row]])
    return [indices[row] for row in rows], torch.cat([each.features for each in everyones])[rows]


def _say_lost(name: str, skip: Skip) -> None:
    print(f"{name}: unreadable: {skip.path}: {skip.reason}", file=sys.stderr)


def read(probe: Probe, split: Split, indices: Sequence[int], at_once: int = _AT_ONCE) -> Iterator[Views]:
    """Every view of these videos."""
    return read_views(
        split.reader,
        split.videos.videos.paths,
        indices,
        views=split.reader.views,
        device=probe.inference.device,
        reading=probe.reading,
        at_once=at_once,
    )
