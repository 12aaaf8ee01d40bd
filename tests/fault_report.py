"""What came of a fault campaign: its kills, its runs, and the page of figures."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fault_runs import Setup
from train.record import surroundings
from videomae.data.pool import available_cpus


@dataclass(frozen=True)
class Kill:
    """place: start, training or write. ended: seconds until all of the run was gone. resumed: seconds from the next
    start to its first step."""

    setup: Setup
    victim: str
    how: str
    place: str
    ended: float
    resumed: float | None = None

    @property
    def counts(self) -> bool:
        return self.place != "start"


@dataclass
class Story:
    """A run from its first start to its last step, with all that befell it."""

    name: str
    setup: Setup
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    starts: int = 0
    read: int = 0  # checkpoints, after kills
    workers_killed: int = 0
    identical: bool = False
    difference: float = float("inf")  # the largest of a tensor, relative

    def fault(self, text: str) -> None:
        last = self.kills[-1] if self.kills else None
        where = f"after {last.how} of {last.victim} in {last.place}" if last else "unharmed"
        self.faults.append(f"run {self.name}, start {self.starts}, {where}: {text}")

    @property
    def counted(self) -> int:
        return sum(kill.counts for kill in self.kills)

    @property
    def line(self) -> str:
        end = "the same bits" if self.identical else f"{self.difference:.1e} off"
        return f"run {self.name}: {self.counted} kills, {self.starts} starts, {end}, {len(self.faults)} faults"


def write_report(out: Path, stories: Sequence[Story], command: str, seconds: float) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(_lines(stories, command, seconds)) + "\n")


def _lines(stories: Sequence[Story], command: str, seconds: float) -> list[str]:
    kills = [kill for story in stories for kill in story.kills]
    counted = [kill for kill in kills if kill.counts]
    inside = sum(kill.place == "write" for kill in counted)
    faults = [fault for story in stories for fault in story.faults]
    machine = surroundings()
    return [
        "# Faults",
        "",
        f"**{len(counted)} kills** of {len(stories)} small pre-training runs, {inside} of them "
        f"({inside / max(len(counted), 1):.0%}) inside a checkpoint write, the others in training; "
        f"{len(kills) - len(counted)} more while a run started, and {sum(s.workers_killed for s in stories)} of data "
        f"workers, are not counted. {sum(s.starts for s in stories)} starts. **{len(faults)} faults.**",
        "",
        *_table(kills),
        "",
        *_times(counted),
        "",
        *_checks(stories),
        "",
        *(["Faults:", "", *(f"- {fault.splitlines()[0]}" for fault in faults), ""] if faults else []),
        f"Made by `{command}`: {seconds / 60:.1f} minutes. {machine['system']}, {available_cpus()} CPU cores, "
        f"torch {machine['versions']['torch']}, commit {machine['commit']}.",
    ]


def _table(kills: Sequence[Kill]) -> list[str]:
    rows = Counter((kill.setup.name, kill.victim, kill.how) for kill in kills)
    count = Counter((kill.setup.name, kill.victim, kill.how, kill.place) for kill in kills)
    return [
        "| run | killed | by | in training | in a write | while starting |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {' | '.join(row)} | {count[(*row, 'training')]} | {count[(*row, 'write')]} | {count[(*row, 'start')]} |"
            for row in sorted(rows)
        ),
    ]


def _times(kills: Sequence[Kill]) -> list[str]:
    lines = ["| seconds, median (most) | one process | 2 processes |", "| --- | --- | --- |"]
    for what, of in (
        ("from -9 until all of it is gone", lambda kill: None if kill.how == "-15" else kill.ended),
        ("from -15 until it has saved and is gone", lambda kill: kill.ended if kill.how == "-15" else None),
        ("from the next start to its first step", lambda kill: kill.resumed),
    ):
        lines.append(f"| {what} | {_of(kills, 0, of)} | {_of(kills, 2, of)} |")
    return lines


def _of(kills: Sequence[Kill], processes: int, of: Callable[[Kill], float | None]) -> str:
    found = [value for kill in kills if kill.setup.processes == processes and (value := of(kill)) is not None]
    return f"{statistics.median(found):.1f} ({max(found):.1f})" if found else ""


def _checks(stories: Sequence[Story]) -> list[str]:
    ends = {
        name: f"{sum(s.identical for s in told)} of {len(told)} runs bit for bit"
        + ("" if all(s.identical for s in told) else f", at most {max(s.difference for s in told):.1e} off")
        for name in sorted({story.setup.name for story in stories})
        if (told := [story for story in stories if story.setup.name == name])
    }
    return [
        f"After every kill: the run is gone within a minute and no process of it is left; every checkpoint there reads "
        f"back whole ({sum(s.read for s in stories):,} were read); after -15 the last step is saved within 30 s; the "
        "next start goes on from the newest checkpoint. After a data worker's: the run goes on and no clip is lost. "
        "At the end: nothing half-written is left, weights and metrics are those of a run that nobody killed: "
        + "; ".join(f"{name}, {text}" for name, text in ends.items())
        + ".",
    ]
