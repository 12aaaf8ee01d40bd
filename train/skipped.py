"""The record of clips that could not be read: `skipped.jsonl` in the run folder, its limit, and its replay on
resume."""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from train.log import Lines, forget_after, goes_on, whole_lines
from videomae.data.dataset import Sample
from videomae.data.loader import Skip
from videomae.weight_files import write_atomically
from videomae.wording import counted

# a run stops when more than this share and more than this number of its files are unreadable
_SHARE, _FILES = 0.01, 10
# and when so many clips one after another are, also of files that could be read before: their storage is gone
_IN_A_ROW = 100


def part_of(path: Path, rank: int) -> Path:
    """What a process but the first writes."""
    return path.with_suffix(f".{rank}{path.suffix}")


def merge_parts(path: Path, start: int) -> None:
    """The parts of earlier processes into the record, of steps up to start."""
    parts = sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))
    if parts:
        # a kill can leave parts beside a record that has them
        lines = dict.fromkeys(line for file in (path, *parts) for line in whole_lines(file))
        write_atomically(path, lambda file: file.write_text("".join(lines)))
    for part in parts:
        part.unlink()
    forget_after(path, start)


class TooManyUnreadable(Exception):
    """So many videos cannot be read that something else must be wrong; the message lists them."""


class Skipped:
    """Skips of the whole run, and the files of which this part of it could read no clip."""

    def __init__(self, path: Path, paths: Sequence[str], start: int, rank: int = 0) -> None:
        """path: the record. start: steps done before; what was skipped in them is replayed, what came later tried
        again. rank: of several processes; all but the first write to a part of the record of their own."""
        if rank == 0:
            merge_parts(path, start)
        self._path, self._num_videos = path, len(set(paths))
        self.known: dict[Sample, str] = {}
        self._lost: dict[str, str] = {}  # path -> reason
        self._readable: set[str] = set()
        self._in_a_row = 0
        self._paths = paths
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            self.known[Sample(entry["epoch"], entry["index"], entry["view"])] = entry["reason"]
        if rank > 0:
            self._path = part_of(path, rank)
        self._record = Lines(self._path)

    def see(self, samples: Iterable[Sample], skips: Iterable[Skip], step: int) -> list[Skip]:
        """Record a batch; returns the first skip of each file that was not known to be bad.

        Raises TooManyUnreadable past the limit.
        """
        skips, samples = list(skips), list(samples)
        skipped = {skip.sample for skip in skips}
        self._readable.update(self._paths[sample.index] for sample in samples if sample not in skipped)
        fresh = [skip for skip in skips if skip.sample not in self.known]
        if not fresh:
            self._in_a_row = 0
            return []
        with goes_on(self._path.name):
            self._record.add(
                *({"step": step, **skip.sample._asdict(), "path": skip.path, "reason": skip.reason} for skip in fresh)
            )
        first = {skip.path: skip for skip in reversed(fresh) if skip.path not in self._lost}
        self.known.update((skip.sample, skip.reason) for skip in fresh)
        self._lost.update((skip.path, skip.reason) for skip in fresh)
        self._check()
        self._check_storage(samples, skipped, fresh[-1])
        return list(first.values())

    def flush(self) -> None:
        """Write what a full disk did not take before."""
        with goes_on(self._path.name):
            self._record.write()

    def _check(self) -> None:
        lost = [path for path in self._lost if path not in self._readable]
        all_lost = len(lost) == self._num_videos
        if all_lost or (len(lost) > _FILES and len(lost) > _SHARE * self._num_videos):
            listing = "\n".join(f"  {path}: {self._lost[path]}" for path in lost[:50])
            more = f"\n  ... and {len(lost) - 50} more" if len(lost) > 50 else ""
            which = "none of the videos" if all_lost else f"{len(lost)} of {counted(self._num_videos, 'video')}"
            verdict = "can be read" if all_lost else "cannot be read"
            raise TooManyUnreadable(f"{which} {verdict}:\n{listing}{more}\nThe whole list is in {self._path}")

    def _check_storage(self, samples: Sequence[Sample], skipped: Collection[Sample], last: Skip) -> None:
        for sample in samples:
            self._in_a_row = self._in_a_row + 1 if sample in skipped else 0
            if self._in_a_row >= _IN_A_ROW:
                raise TooManyUnreadable(
                    f"{_IN_A_ROW} clips one after another cannot be read, the last of {last.path}: {last.reason}; is "
                    f"its storage gone? The whole list is in {self._path}"
                )
