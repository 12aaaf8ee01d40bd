"""Videos with the class of each: where the labels and the classes' names come from, and which split is meant."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.launch import check
from videomae.data import shards, storage
from videomae.data.dataset import NoSplit, VideoList, find_videos, names_below

CLASSES = "classes.txt"
# the lists and folders that serve as a split, best first: many data sets have one of val and test
_SERVES = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}
_MOST_CLASSES = 100_000  # without names for them; more is no label but some other number
_NAMED = 5  # of many, in a message


@dataclass(frozen=True)
class LabelledVideos:
    """Videos, each with a label that is the number of its class; classes: their names by label.

    Raises ValueError when a video has no label, or one that has no name.
    """

    videos: VideoList
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        labels = self.videos.labels
        check(labels is not None, "these videos have no labels")
        assert labels is not None
        check(len(labels) == len(self.videos), f"{len(labels)} labels of {len(self.videos)} videos")
        for path, label in zip(self.videos.paths, labels, strict=True):
            if not 0 <= label < len(self.classes):
                known = f"there are {len(self.classes)} classes, 0 to {len(self.classes) - 1}"
                raise ValueError(f"{path} has the label {label}; {known if label >= 0 else 'labels count from 0'}")

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def labels(self) -> tuple[int, ...]:
        assert self.videos.labels is not None
        return self.videos.labels

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any video's name, label or class, their order or number.

        Names are relative to the folder that holds all videos: a set that moved as a whole keeps its fingerprint.
        """
        rows = [f"{label} {name}" for name, label in zip(names_below(self.videos.paths), self.labels, strict=True)]
        text = "\n".join((*self.classes, "", *rows))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_labelled(
    source: str | Path,
    split: str = "train",
    *,
    like: LabelledVideos | Sequence[str] | None = None,
    root: str | Path | None = None,
) -> LabelledVideos:
    """The labelled videos of one split: "train", "val", "test" or a name of one's own.

    source: a list (`path label` a line) or a prepared set, which are one split, whichever is asked for; a folder that
    holds SPLIT.csv, or SPLIT/ with a prepared set or a folder for each class; or class folders, the training set. val
    and test stand in for each other, which a note says. Names are those in classes.txt (one a line), beside a list or
    in the folder; or those of the class folders, sorted; or else the labels themselves as text.

    like: the training set, or only its classes. Class folders are numbered by it, as a split may lack a class; a
    list's own names must be the same, in its order. A split must not be the training set itself; videos in both are
    noted. root: of lists, as in `find_videos`. Raises ValueError, also for a video without a label; NoSplit when there
    is no such split.
    """
    check(str(source) != "", "no path to look for labelled videos in")
    names = like.classes if isinstance(like, LabelledVideos) else None if like is None else tuple(like)
    home = str(source) if storage.is_url(str(source)) else str(Path(source).expanduser())
    found = _with_note_of_empty(_find(home, split, names, root), split)
    return _apart(found, like, home, split) if isinstance(like, LabelledVideos) else found


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The names in a file, one a line. Raises ValueError when one is empty or comes twice."""
    try:
        lines = storage.read_text(str(path)).removeprefix("\ufeff").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list of classes: not text ({error.reason})") from error
    names = tuple(line.strip() for line in lines)
    check(len(names) > 0, f"{path} names no class")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        check(name != "", f"{path}:{number}: no name; line n names class n - 1")
        before = first.setdefault(name, number)
        check(before == number, f"{path}:{number}: {name} is also the name in line {before}")
    return names


def _find(home: str, split: str, names: tuple[str, ...] | None, root: str | Path | None) -> LabelledVideos:
    is_set = storage.is_url(home) or shards.is_prepared(Path(home))
    check(root is None or not is_set, f"a root is for lists; {home} is none")
    if storage.is_url(home):
        return _at_url(home, split, names)
    folder = Path(home)
    if shards.is_prepared(folder):
        return _prepared(str(folder.resolve()), split, names)
    if not folder.is_dir():
        if split != "train" and folder.stem == "train":
            raise NoSplit(
                f"{home} is the training list; give its folder if that has {split}.csv, or the list of {split}"
            )
        return _numbered(home, find_videos(folder, root), names, str(folder.parent))
    found = [name for name in ("train", "val", "test", split) if _list_or_folder(folder, name) is not None]
    for name in _SERVES.get(split, (split,)):
        if name in found:
            place = _list_or_folder(folder, name)
            assert place is not None
            return _with_note(_in_split(place, split, names, root), home, split, name)
    shown = " and ".join(str(_list_or_folder(folder, name)) for name in found)
    if found:
        raise NoSplit(f"no {split}.csv in {home}, and no {split}/ of class folders: there is {shown}")
    if split != "train" and folder.resolve().name not in _SERVES.get(split, (split,)):
        raise NoSplit(
            f"no {split} videos in {home}: add {split}.csv (`path label` a line) or {split}/ of class folders"
        )
    below = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    check(
        not {"train"} < set(below) <= {"train", "val", "test", split},
        f"no labels in {home}: {' and '.join(below)} have no folders of classes, and no {split}.csv names any",
    )
    return _in_class_folders(folder, names, root, folder)


def _list_or_folder(folder: Path, split: str) -> Path | None:
    """What holds a split: a list or a folder; a folder of videos alone is none, but a class that is called `test`."""
    if (folder / f"{split}.csv").is_file():
        return folder / f"{split}.csv"
    below = folder / split
    if below.is_dir() and (shards.is_prepared(below) or any(entry.is_dir() for entry in os.scandir(below))):
        return below
    return None


def _in_split(place: Path, split: str, names: tuple[str, ...] | None, root: str | Path | None) -> LabelledVideos:
    if place.is_file():
        return _numbered(str(place), find_videos(place, root), names, str(place.parent))
    if shards.is_prepared(place):
        check(root is None, f"a root is for lists; {place} is none")
        return _prepared(str(place.resolve()), split, names, str(place.parent))
    return _in_class_folders(place, names, root, place, place.parent)


def _at_url(url: str, split: str, names: tuple[str, ...] | None) -> LabelledVideos:
    if shards.is_prepared(url):
        return _prepared(url, split, names)
    for name in _SERVES.get(split, (split,)):
        if shards.is_prepared(below := storage.join(url, name)):
            return _with_note(_prepared(below, split, names, url), url, split, name)
    raise NoSplit(f"no prepared set at {url}, nor one for {split} below it")


def _prepared(root: str, split: str, names: tuple[str, ...] | None, *beside: str) -> LabelledVideos:
    """A prepared set: its labels, or else the class folders that it was made from."""
    found = shards.read_index(root)
    videos = VideoList(found.paths, found.labels, found.step, found.notes)
    if found.labels is not None:
        return _numbered(root, videos, names, root, *beside)
    kept, serves = _of_split(found.sources, split, root)
    videos = replace(videos, paths=tuple(videos.paths[number] for number in kept))
    inside = [found.sources[number].removeprefix(f"{serves}/") for number in kept]
    one = _by_folder(root, videos, inside, names or _named(root, *beside))
    return _with_note(one, root, split, serves or split)


def _of_split(sources: Sequence[str], split: str, root: str) -> tuple[Sequence[int], str]:
    """Which of the files that a set was made from belong to a split, and their folder; all, where it has no splits."""
    folders = {name.split("/")[0] for name in sources}
    if not folders <= {"train", "val", "test", split} or any(name.count("/") < 2 for name in sources):
        return range(len(sources)), ""
    serves = [name for name in _SERVES.get(split, (split,)) if name in folders]
    if not serves:
        raise NoSplit(f"no {split} videos in {root}: there is {' and '.join(sorted(folders))}")
    return [number for number, name in enumerate(sources) if name.startswith(f"{serves[0]}/")], serves[0]


def _numbered(source: str, videos: VideoList, names: tuple[str, ...] | None, *folders: str) -> LabelledVideos:
    """Videos whose labels are numbers already, with the names beside them; names: what these must be."""
    labels = videos.labels
    check(labels is not None, f"no labels in {source}: each line must be `path label`, with a space between")
    assert labels is not None
    own = _named(*folders)
    if names is None:
        if own is None:
            known = max(labels) < _MOST_CLASSES
            check(known, f"{source}: a label of {max(labels)} is no class; if it is, name the classes in {CLASSES}")
            own = _as_text(max(labels) + 1)
        return LabelledVideos(videos, own)
    if own is None and names != _as_text(len(names)):
        note = f"{source} has no {CLASSES}: its labels are taken for the training set's"
        videos = replace(videos, notes=(*videos.notes, note))
    if own is not None and own != names:
        raise ValueError(f"{source} has other classes than the training set: {_difference(own, names)}")
    return LabelledVideos(videos, names)


def _in_class_folders(
    folder: Path, names: tuple[str, ...] | None, root: str | Path | None, *beside: Path
) -> LabelledVideos:
    videos = find_videos(folder, root)
    start = len(str(folder.resolve()).rstrip("/")) + 1
    inside = [path[start:] for path in videos.paths]
    found = _by_folder(str(folder), videos, inside, names or _named(*map(str, beside)))
    known = {*found.classes, *(name.partition("/")[0] for name in inside)}
    folders = (entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    empty = sorted(set(folders) - known)
    return _noted(found, *([f"folders in {folder} without a video, so no classes: {_some(empty)}"] if empty else []))


def _by_folder(source: str, videos: VideoList, inside: Sequence[str], names: tuple[str, ...] | None) -> LabelledVideos:
    """Videos labelled by the first folder of their path inside the source, which names numbers if it is there."""
    loose = [name for name in inside if not name.strip("/").count("/") or name.startswith("/")]
    if loose:
        more = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
        raise ValueError(f"no labels in {source}: {loose[0]}{more} lie in no folder of a class, and no list names them")
    folders = [name.partition("/")[0] for name in inside]
    names = tuple(sorted(set(folders))) if names is None else names
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(folders) - set(names))
    check(not unknown, f"{source} has class folders that are none of the {len(names)} classes: {_some(unknown)}")
    return LabelledVideos(replace(videos, labels=tuple(numbers[name] for name in folders)), names)


def _named(*folders: str) -> tuple[str, ...] | None:
    """The names in the first of the folders that has them."""
    for folder in folders:
        if storage.exists(file := storage.join(folder, CLASSES)):
            return read_classes(file)
    return None


def _as_text(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _difference(own: Sequence[str], names: Sequence[str]) -> str:
    for label, (one, other) in enumerate(zip(own, names, strict=False)):
        if one != other:
            return f"label {label} is {one}, there {other}"
    return f"{len(own)} of them, there {len(names)}"


def _apart(found: LabelledVideos, training: LabelledVideos, home: str, split: str) -> LabelledVideos:
    """The split, which is not the training set. Raises NoSplit."""
    seen = set(training.videos.paths)
    shared = sum(path in seen for path in found.videos.paths)
    if shared == len(found):
        raise NoSplit(f"all {split} videos of {home} are training videos; give {split} videos of their own")
    return _noted(found, *([f"{shared} of {len(found)} {split} videos are training videos as well"] if shared else []))


def _with_note(found: LabelledVideos, home: str, split: str, serves: str) -> LabelledVideos:
    return found if serves == split else _noted(found, f"no {split} videos in {home}: those of {serves} serve")


def _with_note_of_empty(found: LabelledVideos, split: str) -> LabelledVideos:
    used, count = set(found.labels), len(found.classes)
    empty = [name for label, name in enumerate(found.classes) if label not in used]
    return _noted(found, f"{len(empty)} of {count} classes have no {split} video: {_some(empty)}") if empty else found


def _noted(found: LabelledVideos, *notes: str) -> LabelledVideos:
    return replace(found, videos=replace(found.videos, notes=(*found.videos.notes, *notes)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
