"""Who waits for whom: when a run waits for its data, the one thing to change first, with the numbers that say so."""

from dataclasses import dataclass
from math import ceil

from videomae.data.loader import Effort
from videomae.wording import counted

LIMIT = 0.05  # share of the time that a run may wait for data without a word


@dataclass(frozen=True)
class Supply:
    """What decodes for a run. cores: that may decode, beside those that the step needs; stored: a prepared set; cached:
    it is read from a URL, through a cache."""

    workers: int
    cores: int
    views: int
    batches_ahead: int
    stored: bool
    cached: bool


def advice(supply: Supply, *, waited: float, clips_per_second: float, effort: Effort, elapsed: float) -> str:
    """What to change first, in one line. waited: share of the time; the others: in so many elapsed seconds.

    A video's cost is its workers' seconds: opening, decoding and cropping its views.
    """
    spent, videos = effort.spent, max(effort.clips, 1)
    working = 1 - min(waited, 0.99)  # share of the time in which the step took clips
    needed = ceil(spent.total / elapsed / working)
    share = spent.waited / max(spent.total, 1e-9)
    ms = [1000 * seconds / videos for seconds in (spent.total, spent.open, spent.decode, spent.crop)]
    numbers = (
        f"the step waited for data {waited:.0%} of the time, {clips_per_second:.0f} clips/s instead of "
        f"{clips_per_second / working:.0f}. A video takes a worker {ms[0]:.1f} ms (opening {ms[1]:.1f}, decoding "
        f"{ms[2]:.1f}, cropping {ms[3]:.1f}; {share:.0%} of it not computing), so {needed} "
        f"{'worker' if needed == 1 else 'workers'} would keep up; there {_are(supply.workers)}"
    )
    return f"{numbers}. Change first: {_first(supply, needed, share)}"


def _first(supply: Supply, needed: int, share: float) -> str:
    if needed <= supply.workers:
        return f"--loader.batches-ahead {2 * supply.batches_ahead}, to bridge single slow videos"
    if supply.workers < supply.cores:
        return f"--workers {min(needed, supply.cores)} ({counted(supply.cores, 'core')} here to decode)"
    if share > 0.5 and supply.cached:
        return "the storage. A larger --data.cache-gb, or a copy of the set on a local disk"
    if share > 0.5:
        return "the storage. A local or faster disk; or, if other processes use these cores, more cores"
    if not supply.stored:
        # a worker that waits for bytes takes no core
        cores = ceil(needed * (1 - share))
        return (
            f"the files. {counted(cores, 'core')} would be needed, here {_are(supply.cores)}; "
            "python -m videomae.data.prepare IN OUT makes them several times cheaper to decode"
        )
    return (
        f"--data.views-per-decode {2 * supply.views}, which decodes half as often for as many clips; "
        "--codec jpeg of videomae.data.prepare decodes fastest"
    )


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count}"
