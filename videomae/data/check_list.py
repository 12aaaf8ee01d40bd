"""Writing a list of videos that `find_videos` reads back as it was meant."""

import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from kernels.launch import check
from videomae.data.dataset import find_videos
from videomae.weight_files import write_atomically


def write_list(target: Path, paths: Sequence[str], labels: Sequence[int] | None) -> None:
    """Write `path label` or `path` lines, whole or not at all; paths below the list's folder are relative to it.

    ValueError, naming the file, for a path that no line of a list can say.
    """
    folder = target.parent.resolve()
    shown: Sequence[int | None] = [None] * len(paths) if labels is None else labels
    lines = [_line(path, label, folder) for path, label in zip(paths, shown, strict=True)]

    def write(file: Path) -> None:
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        # the only proof that it says what it should
        found = find_videos(file)
        for path, back in zip_longest(paths, found.paths):
            check(path == back, f"{path!r} cannot be written in a list: it would be read as {back!r}")
        check(found.labels == (None if labels is None else tuple(labels)), f"{target}: labels do not read back")

    write_atomically(target, write)


def _line(path: str, label: int | None, folder: Path) -> str:
    # no Path: for 250,000 lines that takes two seconds
    name = path.removeprefix(f"{folder}/")
    # spaces at its beginning would be dropped, and so would the mark of an encoding
    name = f"./{name}" if name[0].isspace() or name[0] == "\ufeff" else name
    check(_is_sayable(name), f"{path!r} cannot be written in a list: its name is no text of one line")
    if label is not None:
        return f"{name} {label}"
    # a number at its end would be taken for a label: VideoMAE V2's form has none
    return f"{name} 0 -1" if re.search(r"\s-?\d+$", name) else name


def _is_sayable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return len(name.splitlines()) == 1 and name == name.rstrip()
