"""The predictions of an evaluation on disk: appended one by one, found again after a kill, shared out over processes.

predictions.jsonl has a line for each video; of n processes, each appends to a file of its own, and the last to finish
joins them. A line holds the whole probability vector, float32 in base64, so that everything can be computed from it.
"""

import base64
import fcntl
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from kernels.launch import check
from videomae.weight_files import write_atomically

_WHOLE = "predictions.jsonl"
_FILE = re.compile(r"predictions(-\d+-of-\d+)?\.jsonl")
_NAMED = 5  # classes in a line, for the eye


@dataclass(frozen=True)
class Row:
    """One video: class probabilities, float32 [C], or why it could not be read. seconds: that it took the process."""

    index: int
    path: str
    label: int
    seconds: float
    probabilities: np.ndarray | None = None
    unreadable: str | None = None

    def line(self) -> str:
        known = {"index": self.index, "path": self.path, "label": self.label}
        if self.probabilities is None:
            return json.dumps({**known, "unreadable": self.unreadable, "seconds": round(self.seconds, 4)}) + "\n"
        order = np.argsort(-self.probabilities, kind="stable")[:_NAMED]
        best = [[int(c), round(float(self.probabilities[c]), 6)] for c in order]
        vector = base64.b64encode(self.probabilities.astype("<f4").tobytes()).decode()
        made = {"predicted": best[0][0], "top5": best, "seconds": round(self.seconds, 4), "probabilities": vector}
        return json.dumps({**known, **made}) + "\n"


def parse_row(line: str, num_classes: int) -> Row | None:
    """None when the line is cut off or damaged: the video is then predicted again."""
    try:
        found = json.loads(line)
        known = (int(found["index"]), found["path"], int(found["label"]), float(found["seconds"]))
        if "unreadable" in found:
            return Row(*known, unreadable=str(found["unreadable"]))
        vector = np.frombuffer(base64.b64decode(found["probabilities"], validate=True), dtype="<f4")
    except (ValueError, KeyError, TypeError):
        return None
    return Row(*known, probabilities=vector) if len(vector) == num_classes else None


class Predictions:
    """Those of one process, which are appended, and what all have."""

    def __init__(self, out: Path, part: tuple[int, int], num_classes: int) -> None:
        """part: which of how many processes. ValueError when another process has the same part."""
        self._out, self._num_classes = out, num_classes
        self._own = out / (_WHOLE if part[1] == 1 else f"predictions-{part[0]}-of-{part[1]}.jsonl")
        with _locked(out):
            self._file = _open_own(self._own, f"{part[0]}/{part[1]}")
            self.rows = self._read()
        self._last = time.monotonic()

    def __enter__(self) -> "Predictions":
        self._last = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, made: Sequence[Row]) -> None:
        """Write rows down; they share the time since the last ones."""
        now = time.monotonic()
        share, self._last = (now - self._last) / max(len(made), 1), now
        # whoever tries again and again does not write again and again that it failed
        news = [replace(row, seconds=share) for row in made if not self._is_known_failure(row)]
        # in one piece, flushed: a kill leaves one line cut off at most
        self._file.write("".join(row.line() for row in news))
        self._file.flush()
        self.rows |= {row.index: row for row in news}

    def join(self, count: int) -> bool:
        """Whether all count videos have rows by now, of whatever process; if so they are put in one file, in order."""
        with _locked(self._out):
            self.rows = self._read()
            if len(self.rows) < count:
                return False
            lines = "".join(self.rows[index].line() for index in sorted(self.rows))
            whole = self._out / _WHOLE
            if not whole.exists() or whole.read_text(errors="replace") != lines:
                write_atomically(whole, lambda file: file.write_text(lines))
            for path in self._files():
                if path != whole:
                    path.unlink()
        return True

    def _is_known_failure(self, row: Row) -> bool:
        known = self.rows.get(row.index)
        return known is not None and row.unreadable is not None and known.unreadable == row.unreadable

    def _files(self) -> list[Path]:
        return sorted(path for path in self._out.iterdir() if _FILE.fullmatch(path.name))

    def _read(self) -> dict[int, Row]:
        """Each video's row, of all files: a prediction before that it could not be read."""
        rows: dict[int, Row] = {}
        for path in self._files():
            for row in _rows_in(path, self._num_classes):
                if row.index not in rows or rows[row.index].probabilities is None:
                    rows[row.index] = row
        return rows


def _rows_in(path: Path, num_classes: int) -> Iterator[Row]:
    for line in path.read_text(errors="replace").splitlines():
        if (row := parse_row(line, num_classes)) is not None:
            yield row


def _open_own(path: Path, part: str) -> IO[str]:
    """The file to append to, without what a kill left of its last line."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"another process is at work on part {part} of {path.parent}") from error
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """No two processes read and join at a time."""
    with (out / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def claim(out: Path, card: Mapping[str, object], surroundings: Mapping[str, object]) -> None:
    """Make out the folder of an evaluation by this protocol card. ValueError when it is that of another, saying in what
    they differ."""
    check(not out.exists() or out.is_dir(), f"{out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "protocol.json"
    with _locked(out):
        if path.exists():
            _check_same(path, card)
            return
        check(not (out / _WHOLE).exists(), f"{out} has a {_WHOLE} without a protocol.json: give another --out")
        text = json.dumps({"card": card, **surroundings}, indent=2) + "\n"
        write_atomically(path, lambda file: file.write_text(text))


def _check_same(path: Path, card: Mapping[str, object]) -> None:
    try:
        before = json.loads(path.read_text())["card"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; give another --out") from error
    changed = [f"{key}: {before.get(key)} then, {value} now" for key, value in card.items() if before.get(key) != value]
    listing = "; ".join(changed)
    check(not changed, f"{path.parent} holds an evaluation by another protocol ({listing}); give another --out")
