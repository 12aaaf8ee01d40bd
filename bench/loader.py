"""How many clips a second this machine can feed from a data set, by stage, and how many cores a GPU's rate needs.

    python -m bench.loader PATH [--views 1] [--stride 4] [--size 224] [--workers N] [--rate 500 1000 2000]

PATH: a folder, list or prepared set, as for `train.pretrain --data`. Clips are drawn as pre-training draws them. First
one core, stage by stage, then the loader with its workers.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from videomae.command_line import Parser, run_main
from videomae.wording import counted

if TYPE_CHECKING:  # the data packages are needed when it runs, not to import it
    from videomae.data.dataset import Order, VideoList
    from videomae.data.readers import ClipReader

_WARM = 5  # clips read before the clock starts
_VIEWS = (1, 2, 4)


class Stages(NamedTuple):
    """Median milliseconds a video on one core. crop: of one view."""

    open: float
    decode: float
    crop: float
    waited: float  # of open and decode, not computing

    def per_video(self, views: int) -> float:
        return self.open + self.decode + views * self.crop

    def clips_per_second(self, views: int) -> float:
        return 1000 * views / self.per_video(views)


def measure_stages(
    reader: "ClipReader", videos: "VideoList", order: "Order", seconds: float
) -> tuple[Stages, int, int]:
    """Read clips one after another on this thread for so long; the medians, and how many were read and unreadable."""
    import numpy as np

    from videomae.data.decode import UnreadableVideo

    out = [np.empty(reader.shape, dtype=np.uint8)]
    times, lost, position = [], set(), 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 2 * _WARM:
        sample = order.samples(position * reader.views, 1)[0]
        position += 1
        try:
            times.append(reader.read_into(videos.paths[sample.index], [sample], out))
        except UnreadableVideo as error:
            lost.add(sample.index)
            if len(lost) == len(videos):
                raise SystemExit(f"bench.loader: error: no video can be read; the last one: {error}") from error
    kept = times[_WARM:] or times
    opened, decode, crop, waited = (1000 * statistics.median(column) for column in zip(*kept, strict=True))
    return Stages(opened, decode, crop, waited), len(kept), len(lost)


def measure_loader(
    reader: "ClipReader", videos: "VideoList", order: "Order", *, workers: int, batch: int, seconds: float
) -> float:
    """Clips a second from so many workers, the parent only taking batches; the start of the workers is not counted."""
    from itertools import count

    from videomae.data.loader import Loader

    batches = (order.samples(k * batch, batch) for k in count())
    with Loader(reader, videos.paths, batches, batch_size=batch, workers=workers) as loader:
        for _ in range(2 + loader.num_places):  # what was made while the workers started
            taken = loader.next_batch()
            assert taken is not None
            loader.give_back(taken)
        begin, clips = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            taken = loader.next_batch()
            assert taken is not None
            clips += len(taken.samples) - len(taken.skips)
            loader.give_back(taken)
        return clips / (time.perf_counter() - begin)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("bench.loader", (__doc__ or "").strip())
    parser.add_argument("path", metavar="PATH", help="folder, list or prepared set, also by URL")
    add = parser.add_argument_group("clips").add_argument
    add("--frames", type=int, default=16, help="of a clip (16)")
    add("--stride", type=int, default=4, help="frames of the video from one of them to the next (4)")
    add("--size", type=int, default=224, help="pixels, height and width (224)")
    add("--views", type=int, default=1, help="views per decode, for the loader with its workers (1)")
    add = parser.add_argument_group("the measurement").add_argument
    add("--workers", type=int, help="decoding processes (default: every core)")
    add("--batch", type=int, default=32, help="clips of a batch (32)")
    add("--seconds", type=float, default=10.0, help="of each measurement (10)")
    add("--rate", type=float, nargs="+", default=[500, 1000, 2000], metavar="X", help="clips/s that a GPU takes")
    add("--json", type=Path, help="write the figures there as well")
    given = parser.parse_args(arguments)
    sizes = ("frames", "stride", "size", "views", "batch", "seconds")
    for name in (*sizes, *(["workers"] if given.workers is not None else [])):
        if not 0 < getattr(given, name) < 1e6:
            parser.error(f"--{name} must be positive; got {getattr(given, name)}")
    if min(given.rate) <= 0:
        parser.error("--rate takes positive numbers")
    if given.json and not os.access(given.json.absolute().parent, os.W_OK):
        parser.error(f"nothing can be written to {given.json.parent}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exit code 2 for a path that holds no videos."""
    given = _arguments(arguments)
    from videomae.data.augment import Augment
    from videomae.data.dataset import Order, find_videos
    from videomae.data.pool import available_cpus
    from videomae.data.readers import ClipReader

    torch.set_num_threads(1)
    try:
        videos = find_videos(given.path)
        size = (given.size, given.size)
        one = ClipReader(given.frames, size, given.stride, Augment(), seed=0)
        many = ClipReader(given.frames, size, given.stride, Augment(), seed=0, views=given.views)
    except (ValueError, OSError) as error:
        print(f"python -m bench.loader: error: {error}", file=sys.stderr)
        return 2
    cores, workers = available_cpus(), given.workers or available_cpus()
    prepared = "prepared, " if "::" in videos.paths[0] else ""
    frames = "every frame" if videos.step == 1 else f"frames 0, {videos.step}, {2 * videos.step}, ... only"
    print(f"{given.path}: {counted(len(videos), 'video')}, {prepared}{frames}")
    print(
        f"clips of {given.frames} x {given.size} x {given.size}, stride {given.stride}; {counted(cores, 'core')} here"
    )
    stages, count, lost = measure_stages(one, videos, Order(len(videos), 0), given.seconds)
    print(*_stage_lines(stages, count, lost), sep="\n")
    rate = measure_loader(
        many, videos, Order(len(videos), 0, given.views), workers=workers, batch=given.batch, seconds=given.seconds
    )
    alone = stages.clips_per_second(given.views)
    print(
        f"\n{counted(workers, 'worker')}, views per decode {given.views}: {rate:.0f} clips/s, "
        f"{rate / alone:.2f} times one core's"
    )
    print(*_core_lines(stages, rate / workers, given.views, given.rate), sep="\n")
    if given.json:
        figures = {
            "stages_ms": stages._asdict(),
            "clips_per_second_one_core": {views: stages.clips_per_second(views) for views in _VIEWS},
            "workers": workers,
            "views": given.views,
            "clips_per_second": rate,
        }
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _stage_lines(stages: Stages, count: int, lost: int) -> list[str]:
    lines = [f"\none core, medians of {counted(count, 'video')}" + (f", {lost} could not be read" if lost else "")]
    lines.append("stage      ms a video   clips/s by itself")
    for name in ("open", "decode", "crop"):
        ms = getattr(stages, name)
        lines.append(f"{name:<10} {ms:<12.2f} {1000 / ms if ms else float('inf'):.0f}")
    share = stages.waited / max(stages.open + stages.decode, 1e-9)
    lines.append(f"of opening and decoding, {share:.0%} is waiting for bytes or a core")
    lines.append("\nviews per decode   ms a video   clips/s a core")
    lines += [f"{v:<18} {stages.per_video(v):<12.2f} {stages.clips_per_second(v):.0f}" for v in _VIEWS]
    return lines


def _core_lines(stages: Stages, per_worker: float, views: int, rates: Sequence[float]) -> list[str]:
    header = "cores for   " + "".join(f"{f'{rate:,.0f} clips/s':<16}" for rate in rates)
    lines = ["", header, f"{'measured':<12}" + "".join(f"{-(-rate // per_worker):<16,.0f}" for rate in rates)]
    for v in _VIEWS:
        if v != views:
            # as well used as the workers that were measured
            scaled = per_worker * stages.clips_per_second(v) / stages.clips_per_second(views)
            lines.append(f"{counted(v, 'view'):<12}" + "".join(f"{-(-rate // scaled):<16,.0f}" for rate in rates))
    return lines


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_main(main)
