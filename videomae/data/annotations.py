"""From a data set's official annotation files to the lists that training reads.

    python -m videomae.data.annotations kinetics|ssv2|ucf101|hmdb51 ANNOTATIONS VIDEOS --out OUT [--split N] [--strict]

ANNOTATIONS is the folder of the official files, VIDEOS one that holds the videos, in sub-folders or not, with any
suffix of a video. Written to OUT: train.csv and val.csv or test.csv, whichever the data set has, one `path label` a
line; classes.txt, the classes' names by label; missing.txt, the videos that are named and not there. Paths are relative
where VIDEOS lies in OUT. Exit code 0: written, be it with videos missing. 1: written, and with --strict a video was
missing or of no known class. 2: wrong use, or no video found; nothing is written. 130: interrupted.
"""

import argparse
import io
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kernels.launch import check
from videomae.command_line import Parser, run_main
from videomae.data.annotation_files import (
    OFFICIAL_CLASSES,
    Annotations,
    Named,
    read_hmdb51,
    read_kinetics,
    read_ssv2,
    read_ucf101,
)
from videomae.data.check_list import write_list
from videomae.data.dataset import find_videos
from videomae.data.labelled import CLASSES
from videomae.data.prepare_sample import write_text
from videomae.wording import counted

_MISSING = "missing.txt"
_SHOWN = 3  # examples of what is wrong


@dataclass(frozen=True)
class Matched:
    """What of one split is there. duplicates: named before, in this split or an earlier one. unknown: of no class."""

    num_named: int
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


class Found(NamedTuple):
    """The splits, and files that are in none: copies, of a name that another file or no class has; and the rest."""

    splits: dict[str, Matched]
    copies: list[str]
    not_named: list[str]


class Disk:
    """The videos of a folder by stem; where several share one, the folder of the class decides, else the first."""

    def __init__(self, paths: Sequence[str], annotations: Annotations) -> None:
        self._folders = {_folder_name(name) for name in annotations.classes}
        self._key: Callable[[str], str] = str.casefold if annotations.fold_case else str
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            self._by_stem[self._key(_stem(path))].append(path)

    def find(self, video: Named) -> str | None:
        """The file of a video; none that lies in another class's folder."""
        own = _folder_name(video.class_name)
        for stem in video.stems:
            found = self._by_stem.get(self._key(stem), [])
            folders = [_folder_name(path.rpartition("/")[0].rpartition("/")[2]) for path in found]
            if own in folders:
                return found[folders.index(own)]
            for path, folder in zip(found, folders, strict=True):
                if folder not in self._folders:
                    return path
        return None

    def others(self, stems: Iterable[str], used: set[str]) -> tuple[list[str], list[str]]:
        """Of the files that are not used, those that have one of these stems, and those that have none."""
        known = {self._key(stem) for stem in stems}
        copies: list[str] = []
        not_named: list[str] = []
        for stem, paths in self._by_stem.items():
            (copies if stem in known else not_named).extend(path for path in paths if path not in used)
        return copies, not_named


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _folder_name(name: str) -> str:
    return name.replace(" ", "_")


def match(annotations: Annotations, paths: Sequence[str]) -> Found:
    """What of each split is among the files."""
    disk = Disk(paths, annotations)
    used: set[str] = set()
    splits = {}
    for split, videos in annotations.splits.items():
        splits[split] = matched = Matched(len(videos))
        for video in videos:
            _match(video, disk.find(video), matched, used)
    stems = [stem for videos in annotations.splits.values() for video in videos for stem in video.stems]
    copies, not_named = disk.others(stems, used)
    return Found(splits, copies, [path for path in not_named if _stem(path) not in annotations.unused])


def _match(video: Named, path: str | None, matched: Matched, used: set[str]) -> None:
    if video.label is None:
        matched.unknown.append(f"{video.stems[0]} ({video.class_name})")
    elif path is None:
        matched.missing.append(video.stems[0])
    elif path in used:
        matched.duplicates.append(video.stems[0])
    else:
        used.add(path)
        matched.paths.append(path)
        matched.labels.append(video.label)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code, with one line on stderr when it is 2 or 130."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that cannot show a file's name shows its codes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _convert(options)
    except (ValueError, OSError) as error:
        print(f"videomae.data.annotations: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("videomae.data.annotations: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser("videomae.data.annotations", (__doc__ or "").strip())
    parser.add_argument(
        "name", metavar="NAME", choices=tuple(OFFICIAL_CLASSES), help="the data set; Kinetics may be 400, 600 or 700"
    )
    parser.add_argument("annotations", metavar="ANNOTATIONS", type=Path, help="the folder of the official files")
    parser.add_argument("videos", metavar="VIDEOS", type=Path, help="the folder of the videos")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="the folder for the lists")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), help="of ucf101 and hmdb51 (1)")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a video is missing or of no class")
    return parser


def _convert(options: argparse.Namespace) -> int:
    folder, source, out = (path.expanduser() for path in (options.annotations, options.videos, options.out))
    check(folder.is_dir(), f"ANNOTATIONS must be the folder of the official files; {folder} is none")
    check(source.is_dir(), f"VIDEOS must be a folder; {source} is none")
    check(not out.exists() or out.is_dir(), f"--out must be a folder; {out} is a file")
    has_splits = options.name in ("ucf101", "hmdb51")
    check(has_splits or options.split is None, f"{options.name} has one split; --split is for ucf101 and hmdb51")
    # else the next run would take the lists for annotations
    check(not (out.exists() and out.samefile(folder)), f"--out must be another folder than ANNOTATIONS, {folder}")
    annotations = _read(options.name, folder, options.split or 1)
    videos = find_videos(source)
    found = match(annotations, _seen_from(out, source, videos.paths))
    num_named = sum(one.num_named for one in found.splits.values())
    there = any(one.paths for one in found.splits.values())
    check(there, f"none of the {num_named:,} videos that {folder} names is in {source}, which has {len(videos):,}")
    _check_free(out, found.splits)
    written = _write(out, annotations.classes, found.splits)
    print(_summary(options.name, annotations, found, len(videos)))
    for note in (*videos.notes, *annotations.notes, *_odd_count(options.name, annotations)):
        print(f"note: {note}")
    print(f"written to {shlex.quote(str(out))}: {', '.join(written)}")
    return int(options.strict and any(one.missing or one.unknown for one in found.splits.values()))


def _read(name: str, folder: Path, split: int) -> Annotations:
    if name == "kinetics":
        return read_kinetics(folder)
    if name == "ssv2":
        return read_ssv2(folder)
    return read_ucf101(folder, split) if name == "ucf101" else read_hmdb51(folder, split)


def _check_free(out: Path, splits: dict[str, Matched]) -> None:
    """Refuse to leave a list of another data set beside those that are written, and to write over what is no list."""
    for split in ("train", "val", "test"):
        target = out / f"{split}.csv"
        if not target.exists():
            continue
        written = split in splits and splits[split].paths
        check(bool(written), f"{target} would stay beside the new lists, which have no {split}; give another folder")
        with target.open(encoding="utf-8-sig", errors="replace") as file:
            is_list = re.search(r"\s\d+$", file.readline().strip())
        check(is_list is not None, f"{target} is there already and no list of videos with labels; give another folder")


def _seen_from(out: Path, videos: Path, paths: Sequence[str]) -> Sequence[str]:
    """The paths as seen through a link in OUT, if VIDEOS is one: then the lists can name them relative to OUT."""
    inside = os.path.relpath(os.path.abspath(videos), os.path.abspath(out))
    if inside.split(os.sep)[0] == os.pardir:
        return paths
    start, real = os.path.normpath(os.path.join(out.resolve(), inside)), str(videos.resolve())
    return paths if start == real else [start + path[len(real) :] for path in paths]


def _write(out: Path, classes: Sequence[str], splits: dict[str, Matched]) -> list[str]:
    """The lists and what goes with them; the names of the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = {CLASSES: "".join(f"{name}\n" for name in classes)}
    missing = "".join(f"{split} {name}\n" for split, one in splits.items() for name in one.missing)
    if missing:
        files[_MISSING] = missing
    else:
        (out / _MISSING).unlink(missing_ok=True)  # of an earlier run
    for split, one in splits.items():
        if one.paths:
            write_list(out / f"{split}.csv", one.paths, one.labels)
    for name, text in files.items():
        write_text(out / name, text)
    return [*(f"{split}.csv" for split, one in splits.items() if one.paths), *files]


def _summary(name: str, annotations: Annotations, found: Found, num_files: int) -> str:
    """A line of counts for each split, and what is wrong, with examples."""
    rows = [("split", "named", "written", "missing")]
    rows += [(s, f"{m.num_named:,}", f"{len(m.paths):,}", f"{len(m.missing):,}") for s, m in found.splits.items()]
    lines = [f"{name}: {counted(len(annotations.classes), 'class')}; {counted(num_files, 'file')}", ""]
    lines += ["".join((row[0].ljust(18), *(cell.rjust(12) for cell in row[1:]))) for row in rows]
    wrong = {
        "missing": [one for matched in found.splits.values() for one in matched.missing],
        "named twice": [one for matched in found.splits.values() for one in matched.duplicates],
        "of unknown class": [one for matched in found.splits.values() for one in matched.unknown],
        "second copies": found.copies,
        "files not named": found.not_named,
    }
    lines.append("")
    lines += [f"{what:18}{len(names):12,}{_examples(names)}" for what, names in wrong.items()]
    return "\n".join(lines)


def _examples(names: Sequence[str]) -> str:
    return f"  {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}" if names else ""


def _odd_count(name: str, annotations: Annotations) -> list[str]:
    count, official = len(annotations.classes), OFFICIAL_CLASSES[name]
    if count in official:
        return []
    return [
        f"{count} classes, where {name} has {' or '.join(map(str, official))}: others' checkpoints number differently"
    ]


if __name__ == "__main__":
    run_main(main)
