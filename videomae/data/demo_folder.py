"""Folders of demo videos, made once: complete or not at all, made again where damaged or made with other parameters.

A folder has the videos in `train/` and `test/`, a list of each, `train.csv` and `test.csv`, the classes' names in
`classes.txt`, and its parameters in a file that is also the mark of who made it.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np

FRAME_RATE = 8

_SPLITS = ("train", "test")
_CLASSES = "classes.txt"

# of the split (0 train, 1 test), the number in it and the path in the folder: RGB frames, and lines for the list
MakeVideo = Callable[[int, int, str], tuple[np.ndarray, Sequence[str]]]


def make_folder(
    folder: Path,
    video: MakeVideo,
    *,
    parameters: Mapping[str, Any],
    mark: str,
    classes: Sequence[str],
    header: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The path of `train.csv` in a folder of demo videos, made there unless it is there already.

    `parameters` are all that the files depend on, `train` and `test` (numbers of videos) among them; the file `mark`
    keeps them. Each list begins with `header`, if there is one. `progress` is called with the videos done and the
    videos to make. Several processes may call this at once: one makes the folder, the others wait. ValueError if the
    folder holds anything else.
    """
    train, test = parameters["train"], parameters["test"]
    if train < 1 or test < 0:
        raise ValueError(f"train must be at least 1 and test at least 0, got {train} and {test}")
    folder = Path(folder).absolute()
    if _is_complete(folder, parameters, mark):
        return folder / "train.csv"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not _is_complete(folder, parameters, mark):
            _refuse_others(folder, mark)
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            _remove(unfinished)
            _write_splits(unfinished, video, parameters, header, progress)
            (unfinished / _CLASSES).write_text("".join(f"{name}\n" for name in classes))
            (unfinished / mark).write_text(json.dumps(parameters, indent=1) + "\n")
            _publish(unfinished, folder)
    return folder / "train.csv"


def _write_splits(
    folder: Path,
    video: MakeVideo,
    parameters: Mapping[str, Any],
    header: str | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    done, total = 0, sum(parameters[split] for split in _SPLITS)
    for which, split in enumerate(_SPLITS):
        (folder / split).mkdir(parents=True)
        lines = [] if header is None else [header]
        for index in range(parameters[split]):
            path = f"{split}/{split}_{index:05d}.mp4"
            pixels, rows = video(which, index, path)
            _encode(folder / path, pixels)
            lines += rows
            done += 1
            if progress is not None:
                progress(done, total)
        (folder / f"{split}.csv").write_text("".join(f"{line}\n" for line in lines))


def _encode(path: Path, video: np.ndarray) -> None:
    """Lossless RGB H.264, a key frame every fourth frame, so that a clip may start anywhere at little cost."""
    options = {"qp": "0", "g": "4", "preset": "ultrafast", "tune": "fastdecode"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=FRAME_RATE, options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.thread_count = 1
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _is_complete(folder: Path, parameters: Mapping[str, Any], mark: str) -> bool:
    try:
        if json.loads((folder / mark).read_text()) != parameters or not (folder / _CLASSES).is_file():
            return False
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return all(
        (folder / f"{split}.csv").is_file() and len(list((folder / split).glob("*.mp4"))) == parameters[split]
        for split in _SPLITS
    )


def _refuse_others(folder: Path, mark: str) -> None:
    """ValueError unless everything in `folder` can be replaced: nothing, or what an earlier call put there."""
    if not folder.exists():
        return
    known = {mark, _CLASSES, *_SPLITS, *(f"{split}.csv" for split in _SPLITS)}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in known) if folder.is_dir() else ["it"]
    if foreign:
        raise ValueError(f"{folder} must be new, empty or a folder of demo videos, but it holds {foreign[0]}")


def _publish(unfinished: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    _remove(old)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the kernel frees it when the process ends, however it ends."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
