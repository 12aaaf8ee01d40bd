"""The record of clips that could not be read: `skipped.jsonl` in the run folder, its limit, and its replay on
resume."""

import json
from collections.abc import Iterable
from pathlib import Path

from videomae.data.dataset import Sample
from videomae.data.loader import Skip

_SHARE, _FILES = 0.01, 10  # a run stops when more than this share and more than this number of its files are unreadable


class TooManyUnreadable(Exception):
    """So many videos cannot be read that something else must be wrong; the message lists them."""


class Skipped:
    """Counts files of which no clip could be read yet."""

    def __init__(self, path: Path, num_videos: int) -> None:
        """Reads what an earlier part of the run wrote to path."""
        self._path, self._num_videos = path, num_videos
        self.known: dict[Sample, str] = {}
        self._reasons: dict[str, str] = {}  # by path
        self._indices: dict[str, int] = {}
        self._readable: set[int] = set()
        self.clips = 0
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            sample = Sample(entry["epoch"], entry["index"], entry["view"])
            self._note(Skip(sample, entry["path"], entry["reason"]))

    @property
    def files(self) -> int:
        """Distinct files with a skipped clip."""
        return len(self._reasons)

    def _note(self, skip: Skip) -> None:
        self.known[skip.sample] = skip.reason
        self._reasons[skip.path] = skip.reason
        self._indices[skip.path] = skip.sample.index

    def see(self, samples: Iterable[Sample], skips: Iterable[Skip], step: int) -> None:
        """Record a batch; raises TooManyUnreadable past the limit."""
        skips = list(skips)
        skipped = {skip.sample for skip in skips}
        self._readable.update(sample.index for sample in samples if sample not in skipped)
        if not skips:
            return
        self.clips += len(skips)
        new = [skip for skip in skips if skip.sample not in self.known]
        with open(self._path, "a") as file:
            for skip in new:
                entry = {"step": step, **skip.sample._asdict(), "path": skip.path, "reason": skip.reason}
                file.write(json.dumps(entry) + "\n")
        for skip in skips:
            self._note(skip)
        self._check()

    def _check(self) -> None:
        lost = [path for path, index in self._indices.items() if index not in self._readable]
        all_lost = len(lost) == self._num_videos
        if all_lost or (len(lost) > _FILES and len(lost) > _SHARE * self._num_videos):
            listing = "\n".join(f"  {path}: {self._reasons[path]}" for path in lost[:50])
            more = f"\n  ... and {len(lost) - 50} more" if len(lost) > 50 else ""
            which = "none of the videos" if all_lost else f"{len(lost)} of {self._num_videos} videos"
            verdict = "can be read" if all_lost else "cannot be read"
            raise TooManyUnreadable(f"{which} {verdict}:\n{listing}{more}\nThe whole list is in {self._path}")
