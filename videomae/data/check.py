"""The pre-flight of a data set: every video is opened, and decoded at its ends and middle.

    python -m videomae.data.check PATH [--json FILE] [--write-clean-list FILE]

PATH is a folder, a list file, a prepared set or a single video. Worker processes do the reading, so that a file that
hangs costs its time limit and not the check; it takes as long as decoding does. Exit code 0: nothing is wrong.
1: something is

    missing         listed, and not there
    unreadable      it cannot be opened, or its first, middle or last frame does not decode, or it hangs
    too short       a single frame
    duplicate       listed before, or the same bytes as an earlier file

2: wrong use. 130: interrupted. These are said, and are not wrong:

    cut short       readable, but a second and a tenth or more of what its header promises is not there
    repeats frames  shorter than --frames * --stride: its last frame gets repeated
    unlisted        PATH is a list, and this video in its folder or below is not named
"""

import argparse
import io
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kernels.launch import check
from videomae.command_line import Parser, run_main
from videomae.data.check_file import Examined, Examiner, Hash, Look, Search
from videomae.data.check_list import write_list
from videomae.data.check_report import Entry, Report
from videomae.data.dataset import ROOT_HELP, SUFFIXES, VideoList, find_videos
from videomae.data.pool import Outcome, available_cpus, perform_all
from videomae.data.shards import is_prepared
from videomae.data.storage import is_url
from videomae.wording import counted

_SLOWEST = 20e6  # bytes a second that any storage gives: a large file may take longer to hash than the time limit


@dataclass(frozen=True)
class Limits:
    """frames, stride: the clip that is to be trained on. timeout: seconds for one file."""

    frames: int = 16
    stride: int = 4
    timeout: float = 60.0
    workers: int = 1

    def __post_init__(self) -> None:
        check(self.frames >= 1 and self.stride >= 1, f"--frames and --stride must be positive; got {self}")
        check(0 < self.timeout < 1e6, f"--timeout must be between 0 and a million seconds; got {self.timeout}")
        check(self.workers >= 1, f"--workers must be at least 1; got {self.workers}")


def check_videos(source: str, videos: VideoList, limits: Limits, *, beside: str | None = None) -> Report:
    """Read every video and report; beside: the folder in which to look for videos that are not listed."""
    begin = time.monotonic()
    first = {os.path.normpath(path): number for number, path in reversed(list(enumerate(videos.paths)))}
    paths = [videos.paths[number] for number in sorted(first.values())]
    examined, there, notes = _read(paths, beside, limits)
    took = time.monotonic() - begin
    twins = _twins(paths, examined, limits)
    labels = dict(reversed(list(zip(videos.paths, videos.labels or (), strict=False))))
    entries = []
    for number, path in enumerate(videos.paths):
        label = videos.labels[number] if videos.labels else None
        earlier = first[os.path.normpath(path)]
        if earlier < number:
            entry = Entry(path, label, "duplicate", "listed before", None, videos.paths[earlier])
        else:
            entry = _judge(path, label, examined[path], twins, limits)
        entries.append(_with_label(entry, labels))
    named = {os.path.normpath(path) for path in paths} | {one.real for one in examined.values()}
    unlisted = tuple(path for path, real in there if path not in named and real not in named)
    if limits.stride % videos.step:
        notes.append(f"only every {videos.step}th frame is stored: no clips of stride {limits.stride} can be read")
    return Report(source, tuple(entries), unlisted, (*videos.notes, *notes), took, len(paths))


def _read(
    paths: Sequence[str], beside: str | None, limits: Limits
) -> tuple[dict[str, Examined], list[tuple[str, str]], list[str]]:
    """Every file examined; what there is beside them, with real paths; what else is to be said."""
    examined: dict[str, Examined] = {}
    there: list[tuple[str, str]] = []
    notes: list[str] = []
    tasks = [*([Search(beside)] if beside else []), *map(Look, paths)]
    for task, value, lost in _perform(tasks, limits.timeout, limits, "reading"):
        if isinstance(task, Look):
            examined[task.path] = Examined("unreadable", lost) if lost else value
        elif lost:
            notes.append(f"unlisted files were not looked for in {beside}: {lost}")
        else:
            there = value
    return examined, there, notes


def _perform(tasks: Sequence[Any], timeout: float, limits: Limits, what: str) -> Iterator[Outcome]:
    if not tasks:
        return
    outcomes = perform_all(Examiner(), tasks, workers=min(limits.workers, len(tasks)), timeout=timeout)
    interactive = sys.stderr.isatty()
    columns, rows = shutil.get_terminal_size((120, 24))
    yield from tqdm(
        outcomes, what, len(tasks), leave=False, disable=not interactive, ncols=columns, nrows=rows, unit=" files"
    )


def _twins(paths: Iterable[str], examined: dict[str, Examined], limits: Limits) -> dict[str, tuple[str, str]]:
    """Of every later copy, the earlier one and how they are the same; files that cannot be hashed become unreadable."""
    twins: dict[str, tuple[str, str]] = {}
    by_place: dict[str, str] = {}
    alike: dict[tuple[int | None, str], list[str]] = {}
    for path in paths:
        one = examined[path]
        if one.status != "ok" or one.real is None or one.ends is None:
            continue
        if one.real in by_place:
            twins[path] = (by_place[one.real], "the same file, by another name")
        else:
            by_place[one.real] = path
            alike.setdefault((one.bytes, one.ends), []).append(path)
    # files of one size are many in a large set: only those that also begin and end alike are read once more
    suspects = [path for group in alike.values() if len(group) > 1 for path in group]
    digests = _digests(suspects, examined, limits)
    by_digest: dict[str, str] = {}
    for path in suspects:
        if path in digests and by_digest.setdefault(digests[path], path) != path:
            twins[path] = (by_digest[digests[path]], "the same bytes")
    return twins


def _digests(paths: Sequence[str], examined: dict[str, Examined], limits: Limits) -> dict[str, str]:
    largest = max((examined[path].bytes or 0 for path in paths), default=0)
    digests = {}
    for task, value, lost in _perform([*map(Hash, paths)], limits.timeout + largest / _SLOWEST, limits, "comparing"):
        digest, reason = (None, lost) if lost else value
        if digest is None:
            examined[task.path] = Examined("unreadable", f"while being compared with others: {reason}")
        else:
            digests[task.path] = digest
    return digests


def _judge(path: str, label: int | None, one: Examined, twins: dict[str, tuple[str, str]], limits: Limits) -> Entry:
    if one.status != "ok":
        return Entry(path, label, one.status, one.reason, one)
    if path in twins:
        other, reason = twins[path]
        return Entry(path, label, "duplicate", reason, one, other)
    assert one.frames is not None
    there, promised = one.seconds or 0, one.stated or 0
    if one.seconds is not None and promised - there >= max(1, promised / 10):
        return Entry(path, label, "cut short", f"{there:.1f} of {promised:.1f} seconds are there", one)
    wanted = limits.frames * limits.stride
    if one.frames < wanted:
        return Entry(path, label, "repeats frames", f"{counted(one.frames, 'frame')}, a clip spans {wanted}", one)
    return Entry(path, label, "ok", None, one)


def _with_label(entry: Entry, labels: dict[str, int]) -> Entry:
    """The entry; where it is a copy that contradicts the label of the first one, this is said."""
    other = None if entry.duplicate_of is None else labels.get(entry.duplicate_of)
    if other is None or other == entry.label:
        return entry
    return replace(entry, reason=f"{entry.reason} (label {entry.label}, there {other})")


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code, with one line on stderr when it is 2 or 130."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that cannot show a file's name shows its codes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        print(f"videomae.data.check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("videomae.data.check: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser, cores = Parser("videomae.data.check", (__doc__ or "").strip()), available_cpus()
    parser.add_argument("path", metavar="PATH", help="a folder, a list file, a prepared set or a video")
    parser.add_argument("--root", metavar="DIR", help=ROOT_HELP)
    add = parser.add_argument_group("the clips that are to be read").add_argument
    add("--frames", type=int, default=16, help="frames of a clip (16)")
    add("--stride", type=int, default=4, help="frames from one of them to the next (4)")
    add = parser.add_argument_group("the work").add_argument
    add("--timeout", type=float, default=60.0, help="seconds that a file may take (60)")
    add("--workers", type=int, default=cores, help=f"processes (the cores there are: {cores})")
    add = parser.add_argument_group("what is written").add_argument
    add("--json", type=Path, metavar="FILE", help="what was found")
    add("--write-clean-list", type=Path, metavar="FILE", help="a list of the files that are good, first copies")
    return parser


def _run(options: argparse.Namespace) -> int:
    limits = Limits(options.frames, options.stride, options.timeout, options.workers)
    videos, what, beside = _find(options.path, options.root)
    _check_targets(options)
    if options.write_clean_list:
        check(what != "a prepared set", "a list cannot name videos of a prepared set; check what it was made from")
    print(
        f"checking  {options.path}: {what} of {counted(len(videos), 'video')}; {counted(limits.workers, 'worker')}, "
        f"at most {limits.timeout:g} s for each file\n",
        flush=True,
    )
    report = check_videos(options.path, videos, limits, beside=beside)
    print(report, flush=True)
    if options.json:
        report.write_json(options.json)
        print(f"all of it: {options.json}")
    if options.write_clean_list:
        _write_clean(options.write_clean_list, report, videos.labels is not None)
    return 0 if report.is_good else 1


def _find(source: str, root: str | None) -> tuple[VideoList, str, str | None]:
    """The videos, what kind of source it is, and the folder of a list."""
    check(source != "", "no path to check")
    path = Path(source).expanduser()
    if is_url(source) or is_prepared(path):
        return find_videos(source, root), "a prepared set", None
    if path.suffix.lower() in SUFFIXES and path.exists() and not path.is_dir():
        check(root is None, f"--root is for lists; {source} is a video")
        return VideoList((os.path.abspath(path),)), "a file", None
    videos = find_videos(path, root)
    return (
        (videos, "a folder", None)
        if path.is_dir()
        else (videos, "a list", str(Path(root or path.parent).expanduser().resolve()))
    )


def _check_targets(options: argparse.Namespace) -> None:
    """Refuse, before the long work, what would be written over the source or over a video."""
    targets = {"--json": options.json, "--write-clean-list": options.write_clean_list}
    for flag, target in targets.items():
        if target is None:
            continue
        check(not target.is_dir(), f"{flag} must be a file; {target} is a folder")
        # before hours of reading, not after
        check(os.access(target.absolute().parent, os.W_OK), f"{flag}: nothing can be written to {target.parent}")
        check(target.suffix.lower() not in SUFFIXES, f"{flag} must not be named like a video: {target}")
        source = Path(options.path).expanduser()
        same = target.exists() and source.exists() and os.path.samefile(target, source)
        check(not same, f"{flag} would overwrite {options.path}, which is being checked")
    named = [target.resolve() for target in targets.values() if target is not None]
    check(len(set(named)) == len(named), "--json and --write-clean-list must be different files")


def _write_clean(target: Path, report: Report, labelled: bool) -> None:
    good = [entry for entry in report.entries if entry.is_good]
    if not good:
        print(f"no file is good: {target} is not written")
        return
    labels = [entry.label for entry in good if entry.label is not None]
    write_list(target, [entry.path for entry in good], labels if labelled else None)
    print(f"clean list: {target}, {counted(len(good), 'video')}")


if __name__ == "__main__":
    run_main(main)
