"""Who waits for whom: when a run waits for its data, the one thing to change first, with the numbers that say so."""

from dataclasses import dataclass
from math import ceil

from videomae.data.loader import Effort

LIMIT = 0.05  # share of the time that a run may wait for data without a word


@dataclass(frozen=True)
class Supply:
    """What decodes for a run. cores: that this process may use; prepared: by videomae.data.prepare."""

    workers: int
    cores: int
    views: int
    batches_ahead: int
    prepared: bool
    remote: bool


def advice(supply: Supply, *, waited: float, clips_per_second: float, effort: Effort) -> str:
    """What to change first, in one line. waited: share of the time; clips_per_second and effort: in that time.

    A clip's cost is its workers' seconds: opening, decoding and cropping all of its views.
    """
    spent, clips = effort.spent, max(effort.clips, 1)
    ms = 1000 * spent.total / clips
    wanted = clips_per_second / max(1 - waited, 0.01)
    needed = ceil(wanted / supply.views * ms / 1000)
    share = spent.waited / max(spent.total, 1e-9)
    numbers = (
        f"the step waited for data {waited:.0%} of the time, {clips_per_second:.0f} clips/s instead of {wanted:.0f}. "
        f"A video takes a worker {ms:.1f} ms (opening {1000 * spent.open / clips:.1f}, decoding "
        f"{1000 * spent.decode / clips:.1f}, cropping {1000 * spent.crop / clips:.1f}; {share:.0%} of it not computing)"
        f", so {needed} {'worker' if needed == 1 else 'workers'} would keep up; there are {supply.workers}"
    )
    return f"{numbers}. {_first(supply, needed, share)}"


def _first(supply: Supply, needed: int, share: float) -> str:
    if needed <= supply.workers:
        return f"Change first: --loader.batches-ahead {2 * supply.batches_ahead}, to bridge single slow videos"
    # a worker that waits for bytes takes no core
    cores = ceil(needed * (1 - share))
    if supply.workers < supply.cores:
        return f"Change first: --workers {min(needed, supply.cores)} ({supply.cores} cores here)"
    if share > 0.5 and supply.remote:
        return "Change first: the storage. A larger --data.cache-gb, or a copy of the set on a local disk"
    if share > 0.5:
        return "Change first: the storage. A local or faster disk; or, if other processes use these cores, more cores"
    if not supply.prepared:
        return (
            f"Change first: the files. {cores} cores would be needed, {supply.cores} are here; "
            "python -m videomae.data.prepare IN OUT makes them several times cheaper to decode"
        )
    return (
        f"Change first: --data.views-per-decode {2 * supply.views}, which decodes half as often for as many clips; "
        "--codec jpeg of videomae.data.prepare decodes fastest"
    )
