"""What `check.py` found, as a page of text and as JSON."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from videomae.data.check_file import Examined
from videomae.weight_files import write_atomically
from videomae.wording import counted

# the kinds of findings, in the order they are printed: what makes the command fail, and what is only said
WRONG = ("missing", "unreadable", "too short", "duplicate")
NOTED = ("cut short", "repeats frames", "unlisted")
_MEASURED = ("frames", "fps", "width", "height", "codec", "seconds", "bytes")
_MOST = 20  # paths that are printed of each kind


@dataclass(frozen=True)
class Entry:
    """A video of the source, in its place. status: ok, or a kind of finding; only the first that holds. examined: None
    where nothing is known, since it hung or had been listed before."""

    path: str
    label: int | None
    status: str
    reason: str | None = None
    examined: Examined | None = None
    duplicate_of: str | None = None

    @property
    def is_good(self) -> bool:
        return self.status not in WRONG


@dataclass(frozen=True)
class Report:
    """unlisted: files beside a list that it does not name. notes: what else is to be said. seconds: that reading took,
    for so many files."""

    source: str
    entries: tuple[Entry, ...]
    unlisted: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    files_read: int

    @property
    def is_good(self) -> bool:
        return all(entry.is_good for entry in self.entries)

    @property
    def counts(self) -> dict[str, int]:
        """How many files there are, and how many of each status."""
        found = Counter(entry.status for entry in self.entries)
        statuses = {kind: found[kind] for kind in ("ok", *WRONG, *NOTED)}
        return {"files": len(self.entries), **statuses, "unlisted": len(self.unlisted)}

    def write_json(self, path: Path) -> None:
        """Write the file whole or not at all."""
        files = [_as_json(entry) for entry in self.entries]
        content = {"path": self.source, "ok": self.is_good, "counts": self.counts, "notes": list(self.notes)}
        text = json.dumps({**content, "files": files, "unlisted": list(self.unlisted)}, indent=1)
        write_atomically(path, lambda file: file.write_text(text + "\n"))

    def __str__(self) -> str:
        lines = [*_totals(self.entries), *_ranges(self.entries), *_kinds(self.entries)]
        for kind in (*WRONG, *NOTED):
            found = [(e.path, _reason(e, self._root)) for e in self.entries if e.status == kind]
            found += [(path, "") for path in self.unlisted] if kind == "unlisted" else []
            lines += _listing(kind, found, self._root) if found else []
        lines += ["", *(f"note: {printable(note)}" for note in self.notes)] if self.notes else []
        good = sum(entry.is_good for entry in self.entries)
        wrong = len(self.entries) - good
        rate = self.files_read / max(self.seconds, 1e-9)
        verdict = "nothing wrong" if not wrong else f"{wrong:,} wrong"
        speed = f"{counted(self.files_read, 'file')} read in {self.seconds:.0f} s, {rate:.1f} a second"
        return "\n".join([*lines, "", f"{good:,} good, {verdict}; {speed}"])

    @property
    def _root(self) -> str:
        """The folder that printed paths are relative to."""
        source = os.path.abspath(self.source)
        return source if os.path.isdir(source) else os.path.dirname(source)


def printable(text: str) -> str:
    """The text with everything escaped that could move a terminal's cursor, colour it, or not be written at all."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _as_json(entry: Entry) -> dict[str, Any]:
    known = {} if entry.examined is None else {name: getattr(entry.examined, name) for name in _MEASURED}
    out = {"path": entry.path, "label": entry.label, "status": entry.status, "reason": entry.reason, **known}
    return {name: value for name, value in {**out, "duplicate_of": entry.duplicate_of}.items() if value is not None}


def _readable(entries: Iterable[Entry]) -> list[Examined]:
    return [entry.examined for entry in entries if entry.examined is not None and entry.examined.frames is not None]


def _totals(entries: Sequence[Entry]) -> list[str]:
    seconds = sum(examined.seconds or 0 for examined in _readable(entries))
    size = sum(entry.examined.bytes or 0 for entry in entries if entry.examined is not None)
    minutes, whole = divmod(round(seconds), 60)
    return [
        f"files     {len(entries):,}",
        f"duration  {minutes // 60:,}:{minutes % 60:02d}:{whole:02d}",
        *([f"bytes     {size:,} ({_short(size)})"] if size else []),
    ]


def _short(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _ranges(entries: Iterable[Entry]) -> list[str]:
    lines = [f"{'':10}{'min':>10}{'median':>10}{'max':>10}"]
    for name in ("frames", "fps", "seconds"):
        values = [value for examined in _readable(entries) if (value := getattr(examined, name)) is not None]
        if values:
            low, middle, high = (f"{round(value, 2):,g}" for value in (min(values), median(values), max(values)))
            lines.append(f"{name:10}{low:>10}{middle:>10}{high:>10}")
    return lines if len(lines) > 1 else []


def _kinds(entries: Iterable[Entry], most: int = 6) -> list[str]:
    readable = _readable(entries)
    counted: dict[str, Counter[str]] = {
        "size": Counter(f"{examined.width}x{examined.height}" for examined in readable),
        "codec": Counter(f"{examined.codec}" for examined in readable),
    }
    lines = []
    for name, counter in counted.items():
        parts = [f"{value} ({count:,})" for value, count in counter.most_common(most)]
        parts += [f"{len(counter) - most:,} others"] if len(counter) > most else []
        lines += [f"{name:10}{', '.join(parts)}"] if parts else []
    return lines


def _reason(entry: Entry, root: str) -> str:
    reason = entry.reason or ""
    is_other = entry.duplicate_of not in (None, entry.path)
    return f"{reason}: {_shown(entry.duplicate_of or '', root)}" if is_other else reason


def _listing(kind: str, found: Sequence[tuple[str, str]], root: str) -> list[str]:
    lines = ["", f"{kind}: {len(found):,}{'' if kind in WRONG else ' (not counted as wrong)'}"]
    names = [_shown(path, root) for path, _ in found[:_MOST]]
    width = min(max(map(len, names)), 60)
    for name, (_, reason) in zip(names, found, strict=False):
        lines.append(f"  {name:{width}}  {printable(reason)}".rstrip())
    return lines + ([f"  and {len(found) - _MOST:,} more"] if len(found) > _MOST else [])


def _shown(path: str, root: str) -> str:
    """The path as it is printed: relative to root if it is below."""
    return printable(os.path.relpath(path, root) if path.startswith(os.path.join(root, "")) else path)
