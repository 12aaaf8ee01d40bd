"""From a folder or list of videos to a set that loads fast: every video small, re-encoded for decoding, in tar shards.

    python -m videomae.data.prepare IN OUT

Killed at any moment, it goes on with the same command. `shards.py` says what the set holds, `prepare_set.py` how work
goes on, `prepare_sample.py` how one video is encoded, `prepare_estimate.py` how the disk that it takes is foreseen.
"""

import argparse
import json
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import cast

import av
from tqdm import tqdm

from kernels.launch import check
from videomae.command_line import Parser, run_main
from videomae.data.dataset import ROOT_HELP, find_videos
from videomae.data.labelled import CLASSES
from videomae.data.pool import Outcome, available_cpus, perform_all
from videomae.data.prepare_estimate import check_space, estimate, gigabytes
from videomae.data.prepare_sample import Encoding, Preparing, Task, refuse, write_text
from videomae.data.prepare_set import Plan, finish, join, keys_of, locked, source_names, sweep, undone
from videomae.data.shards import is_prepared
from videomae.wording import counted

_NAMED = 20  # refused videos in the report
_SAY_EVERY = 30.0  # seconds, where no bar is drawn


class _Stopped(BaseException):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Halted(Exception):
    """The work cannot go on, and no video is to blame."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 when a set, or the part asked for, was made; 1 when no video was fit for it or the work had
    to stop; 2 and one line on stderr for wrong use; 130 or 143 when a signal came."""
    options = _options(arguments)
    try:
        with _signals():
            return _prepare(options)
    except _Stopped as stopped:
        print("\nvideomae.data.prepare: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stopped.number
    except ValueError as error:
        print(f"videomae.data.prepare: {_shown(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except (_Halted, OSError, RuntimeError) as error:
        print(f"videomae.data.prepare: {_shown(str(error))}\nthe same command goes on from here", file=sys.stderr)
        return 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "videomae.data.prepare",
        "Make a set that loads fast of the videos in a folder or list. Killed, it goes on with the same\ncommand; a "
        "finished set is left as it is.",
        example="python -m videomae.data.prepare k400/train.csv k400-prepared",
    )
    add = parser.add_argument
    add("source", metavar="IN", help="a folder of videos, or a list: `path label` or `path` a line")
    add("out", metavar="OUT", type=Path, help="the set's folder")
    add("--root", metavar="DIR", help=ROOT_HELP)
    add = parser.add_argument_group("what is stored").add_argument
    add("--short-side", type=int, default=256, metavar="PIXELS", help="of the stored frames; smaller stay (256)")
    add("--stride", type=int, default=4, metavar="S", help="the clips' frame stride: its frames lie together (4)")
    add("--phases", choices=("all", "first"), default="all", help="keep every frame (default), or each S-th only")
    add("--codec", choices=("h264-fast", "jpeg"), default="h264-fast", help="small (default), or fastest to decode")
    add("--crf", type=int, default=23, metavar="C", help="h264-fast: lower is better and larger (23)")
    add("--jpeg-quality", type=int, default=85, metavar="Q", help="higher is better and larger (85)")
    add = parser.add_argument_group("how it lies there").add_argument
    add("--layout", choices=("shards", "files"), default="shards", help="tar shards (default), or files/")
    add("--shard-videos", type=int, default=256, metavar="N", help="videos in a shard (256)")
    add = parser.add_argument_group("the work").add_argument
    add("--workers", type=int, default=available_cpus(), metavar="N", help="processes (one for each core)")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="for one video; then it is refused (600)")
    add("--shard", default="0/1", metavar="i/n", help="one of n jobs on one OUT: shards i, i + n, ..., from 0 on")
    add("--estimate", action="store_true", help="print what each choice would take on disk, and stop")
    return parser.parse_args(arguments)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise _Stopped, once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _prepare(options: argparse.Namespace) -> int:
    started = time.monotonic()
    plan, part, parts = _plan(options)
    shards = range(part, plan.num_shards, parts)
    if plan.is_finished and not options.estimate:
        plan.check_same()
        shutil.rmtree(plan.work, ignore_errors=True)  # of a process that was killed behind its last file
        print(f"{plan.out} is finished:")
        return _report(plan, None)
    if options.estimate or not plan.is_begun:
        _estimate(plan, options)
        if options.estimate:
            return 0
        if not plan.is_begun:  # by another part meanwhile
            plan.begin()
    plan.check_same()
    with locked(plan, shards) as lock:
        sweep(plan, shards)
        _copy_classes(Path(options.source).expanduser().resolve(), plan.out)
        try:
            _work(plan, shards, options)
        finally:
            sweep(plan, shards)  # of the workers that were ended at their work
        finished = finish(plan, lock)
    if finished:
        return _report(plan, time.monotonic() - started)
    done = sum(plan.is_done(shard) for shard in range(plan.num_shards))
    of_all = counted(plan.num_shards, "shard")
    print(f"part {part}/{parts} is done; {done} of {of_all} of the set are, the others' jobs remain")
    return 0


def _copy_classes(source: Path, out: Path) -> None:
    """The classes' names go with the labels, where there are any."""
    names = (source if source.is_dir() else source.parent) / CLASSES
    if names.is_file():
        write_text(out / CLASSES, names.read_text(encoding="utf-8"))


def _plan(options: argparse.Namespace) -> tuple[Plan, int, int]:
    """What to make, and which part of it. Raises ValueError."""
    asked = re.fullmatch(r"([0-9]+)/([0-9]+)", options.shard)
    check(asked is not None and int(asked[1]) < int(asked[2]), f"--shard must be i/n, i below n; got {options.shard}")
    assert asked is not None
    check(options.workers >= 1, f"--workers must be at least 1; got {options.workers}")
    check(0 < options.timeout < 1e6, f"--timeout must be between 0 and a million seconds; got {options.timeout:g}")
    urls = [path for path in (options.source, str(options.out)) if re.match(r"[A-Za-z0-9]+:/", path)]
    check(not urls, f"IN and OUT must be on a disk, not {' and '.join(urls)}: prepare there, then copy the folder")
    source, out = Path(options.source).expanduser().resolve(), options.out.expanduser().resolve()
    check(not out.exists() or out.is_dir(), f"{out} is a file; give a folder")
    check(not is_prepared(source), f"{source} is a prepared set already")
    # its files would be found as videos the next time
    check(not (source.is_dir() and out.is_relative_to(source)), f"{out} lies inside {source}; give a folder beside it")
    known = options.codec == "jpeg" or "libx264" in av.codecs_available
    check(known, "this build of PyAV has no libx264: install PyAV from its wheel, or use --codec jpeg")
    encoding = Encoding(**{field.name: getattr(options, field.name) for field in fields(Encoding)})
    videos = find_videos(source, options.root)
    home = source.parent if options.root is None else Path(options.root).expanduser().resolve()
    names = source_names(videos, source if source.is_dir() else home)
    labels = videos.labels or [None] * len(videos)
    rows = zip(keys_of(names), videos.paths, names, labels, strict=True)
    tasks = tuple(Task(number, *row) for number, row in enumerate(rows))
    return Plan(out, encoding, options.layout, options.shard_videos, tasks), int(asked[1]), int(asked[2])


def _estimate(plan: Plan, options: argparse.Namespace) -> None:
    paths = [task.path for task in plan.tasks]
    known = estimate(paths, plan.encoding, workers=options.workers, timeout=options.timeout)
    disk = next(folder for folder in (plan.out, *plan.out.parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    print(known.table(plan.encoding, free), flush=True)
    check_space(known, plan.encoding, free, plan.out)


def _work(plan: Plan, shards: Sequence[int], options: argparse.Namespace) -> None:
    """Prepare and join what is not done of these shards."""
    left = undone(plan, shards)
    total = sum(len(plan.of_shard(shard)) for shard in shards)
    tasks = [plan.tasks[number] for shard in left for number in sorted(left[shard])]
    for shard in [shard for shard, numbers in left.items() if not numbers]:
        join(plan, shard)
    if not tasks:
        return
    if len(tasks) < total:
        print(f"going on: {total - len(tasks):,} of {counted(total, 'video')} are done", flush=True)
    with _Progress(total, total - len(tasks)) as progress, closing(_settled(plan, tasks, options)) as settled:
        for task in settled:
            shard = task.number // plan.shard_videos
            left[shard].remove(task.number)
            if not left[shard]:
                join(plan, shard)
            progress.advance()


def _settled(plan: Plan, tasks: Sequence[Task], options: argparse.Namespace) -> Generator[Task, None, None]:
    """The tasks, each when its sample or refusal is written."""
    service = Preparing(plan.encoding, plan.work)
    killed: list[Task] = []
    for last_try in (False, True):
        doing, killed = killed if last_try else list(tasks), []
        workers = min(options.workers, max(len(doing), 1))
        outcomes = perform_all(service, doing, workers=workers, timeout=options.timeout)
        with closing(cast(Generator[Outcome, None, None], outcomes)):
            for outcome in outcomes if doing else ():
                if outcome.value is not None:
                    raise _Halted(outcome.value)
                # a worker may be killed for what others did, by want of memory: its video gets a second try
                if outcome.lost and "died" in outcome.lost and not last_try:
                    killed.append(outcome.task)
                    continue
                if outcome.lost:
                    _refuse_lost(plan, outcome)
                yield outcome.task


def _refuse_lost(plan: Plan, outcome: Outcome) -> None:
    assert outcome.lost is not None
    # a killed worker's temporary file; the other workers' have other names
    for path in plan.work.glob(f".{outcome.task.number:08d}.*.tmp"):
        path.unlink(missing_ok=True)
    refuse(plan.work, outcome.task, outcome.lost)


class _Progress:
    """A bar where stderr is a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._begun = total, done, done
        self._started = self._said = time.monotonic()
        self._bar = tqdm(total=total, initial=done, unit="video", smoothing=0.05) if sys.stderr.isatty() else None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY:
            self._said = now
            rate = (self._done - self._begun) / (now - self._started)
            left = (self._total - self._done) / rate
            print(
                f"{self._done:,} of {counted(self._total, 'video')}, {rate:.2g} a second, {_time(left)} left",
                flush=True,
            )


def _report(plan: Plan, seconds: float | None) -> int:
    """What the finished set holds, and what was refused; the exit code."""
    rows = [json.loads(line) for line in (plan.out / "index.jsonl").read_text().splitlines()]
    refused = [json.loads(line) for line in (plan.out / "refused.jsonl").read_text().splitlines()]
    frames, size = sum(row["frames"] for row in rows), sum(row["size"] for row in rows)
    took = "" if seconds is None else f", in {_time(seconds)}"
    print(f"{counted(len(rows), 'video')} of {counted(frames, 'frame')}, {gigabytes(size)}{took}: {plan.out}")
    if refused:
        _report_refused(plan, refused)
    if not rows:
        print("no video was fit for the set: remove its folder before the next try")
        return 1
    print(f"next: python -m train.pretrain RECIPE --data {shlex.quote(str(plan.out))}")
    return 0


def _report_refused(plan: Plan, refused: list[dict[str, str]]) -> None:
    print(f"{len(refused):,} refused, all listed in {plan.out / 'refused.jsonl'}:")
    # numbers in a reason are the file's own
    reasons = Counter(re.sub(r"\d+", "N", row["reason"]) for row in refused)
    for reason, count in reasons.most_common():
        print(f"{count:8,}  {_shown(reason)}")
    for row in refused[:_NAMED]:
        print(f"  {_shown(row['source'])}: {_shown(row['reason'])}")
    if len(refused) > _NAMED:
        print(f"  ... and {len(refused) - _NAMED:,} more")


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def _shown(text: str) -> str:
    """Names that are no valid text, made printable."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


if __name__ == "__main__":
    run_main(main)
