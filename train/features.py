"""Features of many videos: `python -m train.features VIDEOS --weights W --out DIR`.

Every video gets a file, DIR/its/path.mp4.safetensors, with its windows' features [windows, D] (--level token: [windows,
N, D]), their first frames and their times. Killed at any moment, the command goes on where it was; the windows of a
long video pass through memory a few at a time. Under torchrun the processes share the videos, on a GPU each.
"""

import contextlib
import hashlib
import itertools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from kernels.launch import check
from train.cli import parse_flags
from train.evaluation import weights_hash
from train.feature_files import FeatureFile, Ledger, begin_of, join_parts, locked, settle_card
from train.inference import Inference, encoder_of, read_model
from train.machine import decoding_cores
from train.shares import Shares, command
from videomae.command_line import run_main
from videomae.data import storage
from videomae.data.dataset import Sample, VideoList, find_videos
from videomae.data.decode import Decoder, ReaderName
from videomae.data.feed import feed
from videomae.data.loader import Loader, LoaderConfig
from videomae.data.pool import perform_all
from videomae.data.shards import is_locator, read_index
from videomae.features import Length, Level, Measure, WindowReader, Windows, features_of
from videomae.wording import counted

PROG = "python -m train.features"
_AT_ONCE = 16  # windows of a batch
_LONGEST_NAME = 255  # bytes
_SAY_EVERY = 30.0  # seconds, where no bar is drawn


@dataclass(frozen=True)
class FeaturesConfig:
    """Features of videos."""

    videos: tyro.conf.Positional[str]  # a folder of videos, a list of them, or a prepared set, also by URL
    weights: str  # a run folder, checkpoint, file, or hub id; also a Hugging Face folder
    out: str  # folder for the features
    # of a list: the folder that its paths start from and may not leave; without it a list may name any file
    root: str | None = None
    level: Level = "clip"  # clip: one vector for each window; token: one for each of its cubes
    # frames from one of a clip's to the next; if not given, as the weights say, else 4
    stride: int | None = None
    hop: int | None = None  # frames from one window to the next; a clip's length * stride, side by side, if not given
    format: Literal["safetensors", "npy"] = "safetensors"  # npy: features alone, the windows' times in index.jsonl
    dtype: Literal["float32", "float16"] = "float32"  # of the files
    shard: str = "0/1"  # i/n: the i-th of n jobs on the same videos and folder, from 0 on
    workers: int | None = None  # decoding processes; by the number of cores if not given; 0 decodes in this one
    device: Literal["cpu", "cuda"] | None = None  # cuda where there is one, if not given
    # auto: bfloat16, else float16, on a GPU; float32 on a CPU
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attention: str = "auto"  # the back end, as in train.pretrain
    micro_batch: int | None = None  # windows on the device at a time; by its memory if not given
    reader: ReaderName = "auto"  # PyAV; decord and torchcodec must be asked for
    cache: str = "~/.cache/videomae"  # folder that keeps what was read from a URL
    cache_gb: float = 50.0  # the most it may hold
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check(self.out != "", "out must not be empty")
        check(self.root != "", "root must not be empty")
        check(self.workers is None or self.workers >= 0, f"workers must not be negative; got {self.workers}")
        check(
            self.micro_batch is None or self.micro_batch >= 1, f"micro-batch must be at least 1; got {self.micro_batch}"
        )
        _ = self.part

    @property
    def part(self) -> tuple[int, int]:
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", self.shard)
        if found is None or int(found[1]) >= int(found[2]):
            raise ValueError(f"shard must be i/n, i below n; got {self.shard}")
        return int(found[1]), int(found[2])


class NotFinite(Exception):
    """A feature that is not a number, or that the files' dtype cannot hold."""


class Item(NamedTuple):
    """A video and its name in the index, which is the path of its file, too."""

    name: str
    path: str


@dataclass(frozen=True)
class Job:
    """All that the work needs."""

    config: FeaturesConfig
    out: Path
    items: tuple[Item, ...]  # of all parts
    inference: Inference
    reader: WindowReader
    cache: storage.CacheConfig | None
    shares: Shares

    @property
    def mine(self) -> range:
        """Which of the items are this part's."""
        part, parts = self.config.part
        return range(part * len(self.items) // parts, (part + 1) * len(self.items) // parts)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one window's features."""
        model = self.inference.model
        tokens = (model.input.num_cubes,) if self.config.level == "token" else ()
        return (*tokens, model.size.width)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0 done, 1 some videos could not be read or the work had to stop, 2 wrong use, 130
    stopped by Ctrl-C."""
    about = "What a frozen model makes of every window of every video."
    arguments = sys.argv[1:] if arguments is None else arguments
    example = f"{PROG} VIDEOS --weights runs/pretrain-mine --out features"
    config = parse_flags(arguments, FeaturesConfig, prog=PROG, about=about, examples=[example])
    after = "; the same command goes on from here"
    return command(partial(_begin, config), extract, prog=PROG, device=config.device, stops=NotFinite, after=after)


def _begin(config: FeaturesConfig, shares: Shares, held: contextlib.ExitStack) -> Job:
    job = prepare(replace(config, shard=shares.shard(config.shard)), shares)
    held.enter_context(locked(job.out, job.mine))
    return job


def prepare(config: FeaturesConfig, shares: Shares) -> Job:
    """Everything that can be refused. Raises ValueError."""
    cache = storage.CacheConfig(config.cache, config.cache_gb) if storage.is_url(config.videos) else None
    storage.configure(cache)
    videos = find_videos(config.videos, config.root)
    for note in videos.notes:
        print(f"warning: {note}", file=sys.stderr)
    model, report = read_model(config.weights)
    print(report)
    encoder = encoder_of(model)
    windows = Windows.of(encoder.input, stride=config.stride, hop=config.hop)
    windows.starts(1, videos.step)  # refuses what the set does not hold
    inference = Inference(
        encoder,
        device=config.device,
        precision=config.precision,
        attention=config.attention,
        micro_batch=config.micro_batch,
        world=shares.world,
    )
    reader = WindowReader(windows, encoder.input.size, Decoder(config.reader))
    out = Path(config.out).expanduser()
    check(not out.exists() or out.is_dir(), f"--out must be a folder; {out} is a file")
    job = Job(config, out, _items(config.videos, videos, config.root), inference, reader, cache, shares)
    settle_card(out, _card(job))
    return job


def _card(job: Job) -> dict[str, object]:
    """What the files depend on: a resumed command must agree."""
    config, windows, input = job.config, job.reader.windows, job.inference.model.input
    source = config.videos if storage.is_url(config.videos) else str(Path(config.videos).expanduser().resolve())
    return {
        "videos": source,
        "weights": weights_hash(job.inference.model),
        "level": config.level,
        "shape": list(job.row_shape),
        "format": config.format,
        "dtype": config.dtype,
        "frames": input.frames,
        "size": list(input.size),
        "sampling": windows.sampling.kind,
        "stride": windows.sampling.stride if windows.sampling.kind == "dense" else None,
        "hop": (windows.hop or windows.span) if windows.sampling.kind == "dense" else None,
        "mean": list(input.mean),
        "std": list(input.std),
        "precision": job.inference.precision,
    }


def _items(source: str, videos: VideoList, home: str | None = None) -> tuple[Item, ...]:
    """Every video once, named by its path below the source, or below a list's home; where two names would be one
    file's, with a hash."""
    paths = list(dict.fromkeys(videos.paths))
    if is_locator(paths[0]):
        root = source if storage.is_url(source) else str(Path(source).expanduser().resolve())
        sources = dict(zip(videos.paths, read_index(root).sources, strict=True))
        names = [sources[path] for path in paths]
        keys = [path.rpartition("::")[2].partition("@")[0] for path in paths]
    else:
        root = str(Path(home or source).expanduser().resolve())
        start = f"{root if Path(root).is_dir() else os.path.dirname(root)}{os.sep}"
        names, keys = [path.removeprefix(start) for path in paths], paths
    # neither an absolute path nor one that leaves the folder
    plain = ["/".join(part for part in name.split("/") if part not in ("", ".", "..")) for name in names]
    # folders that do not tell upper from lower case shall hold them as well
    counts = Counter(name.lower() for name in plain)
    named = [
        name if counts[name.lower()] == 1 else f"{name}~{_digest(key)}" for name, key in zip(plain, keys, strict=True)
    ]
    return tuple(map(Item, named, paths))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def extract(job: Job) -> int:
    """Do what is not done yet of this part; the exit code."""
    ledger = Ledger(job.out, *job.config.part)
    items = [job.items[number] for number in job.mine]
    todo = [item for item in items if not ledger.is_done(item.name)]
    device, shares, workers = job.inference.device, job.shares, job.config.workers
    workers = decoding_cores(device, shares.world.local_size) if workers is None else workers
    kept = f"; {len(items) - len(todo):,} are done" if len(todo) < len(items) else ""
    what = f"{len(items):,} {shares.unit('videos')}{kept}{shares.said}"
    print(f"{what}; {device}, {job.inference.precision}, {counted(workers, 'worker')}: {job.out}", flush=True)
    readable: list[tuple[Item, Length]] = []
    for item, length in zip(todo, _lengths(job, todo, workers), strict=True):
        if length.unreadable is None:
            readable.append((item, length))
        else:
            ledger.add_unreadable(item.name, length.unreadable)
    windows = _extract(job, readable, workers, ledger)
    return _report(job, ledger, len(todo) - ledger.num_unreadable, windows)


def _report(job: Job, ledger: Ledger, videos: int, windows: int) -> int:
    """What was done, in the first of several processes by all; the exit code."""
    shares, lost, listed = job.shares, ledger.num_unreadable, ledger.unreadable
    shares.wait("extracted")
    videos, windows, lost = map(sum, zip(*shares.gather((videos, windows, lost)), strict=True))
    if shares.store is not None:
        if shares.world.is_first:
            listed = join_parts(job.out, job.config.part[1], [item.name for item in job.items])
        # the others hold their videos until then: nobody begins with them
        shares.wait("joined")
    if not shares.world.is_first:
        return 0
    print(f"{counted(videos, 'video')}, {counted(windows, 'window')}: {job.out}")
    if lost:
        print(f"{lost:,} unreadable, listed in {listed}", file=sys.stderr)
    return 1 if lost else 0


def _lengths(job: Job, items: Sequence[Item], workers: int) -> list[Length]:
    """How long each video is, looked at in the workers."""
    measure, found = Measure(job.reader.decoder, job.cache), [Length()] * len(items)
    tasks = [(number, item.path) for number, item in enumerate(items)]
    with _Progress("lengths", len(items)) as progress:
        if workers == 0 or not tasks:
            for task in tasks:
                found[task[0]] = measure(task)
                progress.advance()
            return found
        timeout = job.config.loader.timeout
        for outcome in perform_all(measure, tasks, workers=min(workers, len(tasks)), timeout=timeout):
            found[outcome.task[0]] = Length(unreadable=outcome.lost) if outcome.lost else outcome.value
            progress.advance()
    return found


def _batches(counts: Sequence[int]) -> Iterator[list[Sample]]:
    """All windows of one video after the other."""
    samples = (Sample(0, index, view) for index, count in enumerate(counts) for view in range(count))
    while batch := list(itertools.islice(samples, _AT_ONCE)):
        yield batch


def _extract(job: Job, videos: Sequence[tuple[Item, Length]], workers: int, ledger: Ledger) -> int:
    """Write the features of these videos; how many windows."""
    if not videos:
        return 0
    starts = [job.reader.windows.starts(length.frames, length.step) for _, length in videos]
    inference, windows = job.inference, 0
    function = partial(features_of, inference.model, level=job.config.level)
    loader = Loader(
        job.reader,
        [item.path for item, _ in videos],
        _batches([len(each) for each in starts]),
        batch_size=min(_AT_ONCE, sum(map(len, starts))),
        workers=workers,
        config=job.config.loader,
        cache=job.cache,
    )
    with (
        _Progress("videos", len(videos)) as progress,
        _Writer(job, videos, starts, ledger, progress) as writer,
        loader,
        feed(loader, inference.device, print) as fed,
    ):
        for batch, frames, *_ in fed:
            rows = inference(frames, function).cpu().numpy()
            reasons = {skip.sample.index: skip.reason for skip in batch.skips}
            for index, group in itertools.groupby(range(len(rows)), key=lambda row: batch.samples[row].index):
                numbers = list(group)
                if index in reasons:
                    writer.give_up(index, reasons[index])
                else:
                    windows += writer.add(index, rows[numbers[0] : numbers[-1] + 1])
    return windows


class _Writer:
    """Rows to files: the windows of each video come in order, and no two videos' mixed."""

    def __init__(
        self,
        job: Job,
        videos: Sequence[tuple[Item, Length]],
        starts: Sequence[list[int]],
        ledger: Ledger,
        progress: "_Progress",
    ) -> None:
        self._job, self._videos, self._starts, self._ledger, self._progress = job, videos, starts, ledger, progress
        self._file: FeatureFile | None = None
        self._lost: set[int] = set()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._abandon()

    def _abandon(self) -> None:
        if self._file is not None:
            self._file.abandon()
            self._file = None

    def give_up(self, index: int, reason: str) -> None:
        """A part of the video cannot be read: it gets no file."""
        if index not in self._lost:
            self._lost.add(index)
            self._abandon()
            self._ledger.add_unreadable(self._videos[index][0].name, reason)
            self._progress.advance()

    def add(self, index: int, rows: np.ndarray) -> int:
        """The video's next rows; how many windows that completed."""
        if index in self._lost:
            return 0
        name, dtype = self._videos[index][0].name, self._job.config.dtype
        with np.errstate(over="ignore"):  # refused below
            rows = rows.astype(f"<{np.dtype(dtype).str[1:]}")
        if not np.isfinite(rows).all():
            raise NotFinite(f"a feature of {name} is not a finite {dtype}")
        if self._file is None:
            self._file = self._begin(index)
        if not self._file.add(rows):
            return 0
        self._file.finish()
        self._file = None
        self._ledger.add(self._line(index))
        self._progress.advance()
        return len(self._starts[index])

    def _begin(self, index: int) -> FeatureFile:
        config, (item, length), starts = self._job.config, self._videos[index], self._starts[index]
        metadata = {"video": _printable(item.name), "frames": str(length.frames), "rate": f"{length.rate:g}"}
        shape = (len(starts), *self._job.row_shape)
        begin = begin_of(config.format, config.dtype, shape, starts, _seconds(starts, length), metadata)
        return FeatureFile(self._job.out / _file_of(item, config), begin, len(starts))

    def _line(self, index: int) -> dict[str, object]:
        (item, length), starts = self._videos[index], self._starts[index]
        line = {"video": item.name, "file": _file_of(item, self._job.config), "windows": len(starts)}
        return {
            **line,
            "frames": length.frames,
            "rate": length.rate,
            "starts": starts,
            "seconds": [round(second, 6) for second in _seconds(starts, length)],
        }


def _file_of(item: Item, config: FeaturesConfig) -> str:
    """Its path below the output folder; a name that no file system takes with its ending is cut, and has a hash."""
    folder, slash, name = item.name.rpartition("/")
    if len(os.fsencode(name)) + 1 + len(config.format) > _LONGEST_NAME:
        name = f"{os.fsencode(name)[: _LONGEST_NAME // 2].decode(errors='ignore')}~{_digest(name)}"
    return f"{folder}{slash}{name}.{config.format}"


def _seconds(starts: Sequence[int], length: Length) -> list[float]:
    return [start / length.rate for start in starts]


def _printable(text: str) -> str:
    """Names that are no valid text, made such."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _Progress:
    """A bar where stderr is a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._said = what, total, 0, time.monotonic()
        self._bar = tqdm(total=total, desc=what, leave=False, disable=not sys.stderr.isatty())

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._done += 1
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._said >= _SAY_EVERY:
            self._said = time.monotonic()
            print(f"{self._what}: {self._done:,} of {self._total:,}", flush=True)


if __name__ == "__main__":
    run_main(main)
