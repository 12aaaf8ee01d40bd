"""What studies share: what they are asked, the rows of their tables, the record and the plot."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kernels.launch import check
from train.record import surroundings
from train.study_jobs import Job

PROG = "python -m train.study"


@dataclass(frozen=True)
class StudyConfig:
    """A study; what is not given is as the study has it."""

    # ablations: all the tables after it, which can also be asked for one by one
    name: Annotated[
        Literal[
            "learns",
            "detects",
            "ablations",
            "start",
            "clock",
            "masks",
            "ratio",
            "depth",
            "loss",
            "schedule",
            "videos",
            "labels",
            "transfer",
            "rates",
        ],
        tyro.conf.Positional,
    ] = "learns"
    seeds: int = 3
    labels: int | None = None  # labelled clips
    epochs: float | None = None  # over the labelled clips
    steps: int | None = None  # of pre-training
    runs: str = "runs/study"  # folder of the runs
    out: str = "results"  # folder of the table and the plot
    jobs: int | None = None  # commands at a time; as many as cores, or one on a GPU, if not given

    def __post_init__(self) -> None:
        check(self.seeds >= 1, f"seeds must be at least 1; got {self.seeds}")
        check(self.labels is None or self.labels >= 1, f"labels must be at least 1; got {self.labels}")
        check(self.epochs is None or 0 < self.epochs < 1e9, f"epochs must be positive and finite; got {self.epochs}")
        check(self.steps is None or self.steps >= 1, f"steps must be at least 1; got {self.steps}")
        check(self.jobs is None or self.jobs >= 1, f"jobs must be at least 1; got {self.jobs}")


@dataclass(frozen=True)
class Row:
    """One line of the table: a value in per cent of every seed."""

    name: str
    values: tuple[float, ...]
    note: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; of one value itself, of none a dash."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "–"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def table(rows: Sequence[Row], measure: str) -> str:
    """In Markdown: mean and standard deviation, then each seed."""
    lines = [f"| {row.title} | {spread(row.values)} | {each(row.values)} |" for row in rows]
    return "\n".join((f"| | {measure} | seeds |", "| --- | --- | --- |", *lines))


def write_record(
    config: StudyConfig, jobs: Sequence[Job], rows: Sequence[Row], seconds: dict[str, float], took: float, measure: str
) -> dict[str, Any]:
    """Write study.json beside the table: every command and its time, every value, the first run's whole configuration.
    Returns what it ran on."""
    folder, around = Path(config.runs) / config.name, surroundings()
    settings = {job.name: json.loads((folder / job.name / "config.json").read_text())["config"] for job in jobs[:1]}
    record: dict[str, Any] = {
        "command": [PROG, *sys.argv[1:]],
        "seconds": round(took, 1),
        "rows": [{"name": row.name, "note": row.note, measure: list(row.values)} for row in rows],
        "runs": {job.name: {"command": list(job.arguments), "seconds": seconds[job.name]} for job in jobs},
        "config": settings,
        **around,
    }
    (Path(config.out) / config.name / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    return around


def said_of(config: StudyConfig, seconds: dict[str, float], around: dict[str, Any]) -> str:
    """How the results came about, for the foot of a page."""
    longest = max(taken for name, taken in seconds.items() if name.startswith("pretrain"))
    return "\n".join(
        (
            f"Made by `{PROG} {config.name}`: {sum(seconds.values()) / 60:.0f} minutes of one core, all runs together, "
            f"of which pre-training {longest / 60:.1f} a seed.",
            f"torch {around['versions']['torch']}, {around['gpu'] or 'CPU'}, commit {around['commit']}. "
            "Every command and its time: `study.json`.",
        )
    )


def draw_rows(rows: Sequence[Row], path: Path, label: str, *, chance: float | None = None) -> None:
    """A bar for each row's mean, a dot for each seed; a dotted line at chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.55 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows), 0, -1)
    colours = ["tab:blue" if row.name.startswith("pre-trained") else "tab:grey" for row in rows]
    axes.barh(places, [row.mean for row in rows], color=colours, alpha=0.6)
    for place, row in zip(places, rows, strict=True):
        axes.plot(row.values, [place] * len(row.values), "o", color="black", markersize=4)
        axes.text(min(max(row.values) + 1.5, 95), place, f"{row.mean:.1f}", va="center")
    axes.set_yticks(list(places), [row.title.replace(" (", "\n(", 1) for row in rows])
    if chance is not None:
        axes.axvline(chance, color="black", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 100), xlabel=label)
    figure.savefig(path, dpi=110)


def last_value(run: Path, measure: str) -> float:
    """Of the validations of a run."""
    return json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])[measure]
