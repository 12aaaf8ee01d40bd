"""What the ablation study says: a page of tables with the paper's figures beside ours, a plot of each, the record."""

import json
import statistics
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from train.record import surroundings
from train.study_ablations import LABELS, Ablations, Found
from train.study_jobs import Job
from train.study_rows import PROG
from train.study_tables import Table

CHANCE = 100 / 12
_STAND_IN = (
    "**These are not the paper's experiments.** They are a small stand-in: a ViT of 0.6 M parameters, clips of 16 "
    "frames of 32 x 32 pixels, drawn by a program, in which one object moves in one of 12 ways. What carries over is "
    "the code that runs and the kind of difference each choice makes; the numbers do not, and the order may not: the "
    "paper's figures stand beside ours, and where the order differs it is said."
)


def write(study: Ablations, jobs: Sequence[Job], seconds: dict[str, float], took: float, out: Path) -> list[str]:
    """Write README.md, a plot for each table and study.json into out; the lines that a terminal is told."""
    out.mkdir(parents=True, exist_ok=True)
    found = {table.name: study.read(table) for table in study.tables}
    around = surroundings()
    parts = [_head(study, seconds, around)]
    said = []
    for table in study.tables:
        rows = found[table.name]
        parts.append(section(table, rows))
        said += ["", table.title, *_plain(rows)]
        _draw(table, rows, out / f"{table.name}.png")
    (out / "README.md").write_text("\n".join(parts) + "\n")
    record = {
        "command": [PROG, *sys.argv[1:]],
        "seconds": round(took, 1),
        "tables": {table.name: [_recorded(row) for row in found[table.name]] for table in study.tables},
        "runs": {job.name: {"command": list(job.arguments), "seconds": seconds[job.name]} for job in jobs},
        **around,
    }
    (out / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    return [*said, "", f"written: {out / 'README.md'}, {len(study.tables)} plots, {out / 'study.json'}"]


def _head(study: Ablations, seconds: dict[str, float], around: dict[str, Any]) -> str:
    name = study.config.name
    return "\n".join(
        (
            "# The paper's ablations, in small" if len(study.tables) > 1 else f"# {study.tables[0].title}",
            "",
            _STAND_IN,
            "",
            f"Pre-training: {study.steps:,} steps of 32 clips of the 4,800 without labels, tube mask of 90 %, decoder "
            "of 2 blocks, where a line",
            f"says nothing else. Then {study.config.labels or LABELS} labelled clips for {study.epochs:g} epochs; top-1"
            " in per cent of 480 test clips (chance: 8.3),",
            "fine-tuned and by a linear classifier on the frozen features. ± is the standard deviation over seeds, "
            "which are listed; lines without",
            "it are of one seed, and differences of a few points mean nothing there.",
            "",
            f"Made by `{PROG} {name}`: {len(seconds)} runs, {sum(seconds.values()) / 3600:.1f} hours of one core in "
            "all.",
            f"torch {around['versions']['torch']}, {around['gpu'] or 'CPU'}, commit {around['commit']}. Every command "
            "and its time: `study.json`.",
            "",
        )
    )


def section(table: Table, rows: Sequence[Found]) -> str:
    """A table with the paper's columns, its plot, and how the order compares."""
    titles = ["", "fine-tuned", "seeds", "linear", *(("memory", "minutes") if table.costs else ())]
    titles += [f"paper, {title}" for title in table.paper]
    lines = [f"## {table.title}", "", table.about, "", _row(titles), _row(["---"] * len(titles))]
    for row in rows:
        cells = [row.line.title, _value(row.tuned), ", ".join(f"{v:.1f}" for v in row.tuned), _value(row.linear)]
        if table.costs:
            cells += [f"{row.peak / 1e6:.0f} MB" if row.peak else "–", f"{row.minutes:.1f}" if row.minutes else "–"]
        cells += row.line.paper or ["–"] * len(table.paper)
        lines.append(_row(cells))
    if table.costs:
        lines += ["", "Memory: of a step of pre-training, estimated; minutes: of pre-training, on one core."]
    lines += ["", f"![{table.title}]({table.name}.png)", ""]
    verdicts = [verdict(first, second, rows) for first, second in table.order]
    lines += [f"- {text}" for text in verdicts]
    if table.why:
        lines += ["", table.why] if verdicts else [table.why]
    return "\n".join([*lines, ""])


def verdict(first: str, second: str, rows: Sequence[Found]) -> str:
    """Whether ours are in the paper's order: first above second."""
    better, worse = (next(row for row in rows if row.line.title == title) for title in (first, second))
    gap = better.mean - worse.mean
    seeds = min(len(better.tuned), len(worse.tuned))
    if seeds > 1:
        error = statistics.fmean((better.deviation**2, worse.deviation**2)) ** 0.5 * (2 / seeds) ** 0.5
        doubt = f", within twice its standard error ({error:.1f})" if abs(gap) < 2 * error else ""
    else:
        doubt = ", one seed"
    how = "as in the paper" if gap > 0 else "**not as in the paper**"
    return f"{first} over {second}: {gap:+.1f} points, {how}{doubt}."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _plain(rows: Sequence[Found]) -> list[str]:
    width = max(len(row.line.title) for row in rows)
    return [f"  {row.line.title:<{width}}  {_value(row.tuned):>12}  linear {_value(row.linear):>12}" for row in rows]


def _recorded(row: Found) -> dict[str, Any]:
    return {
        "title": row.line.title,
        "paper": list(row.line.paper),
        "top1": list(row.tuned),
        "linear": list(row.linear),
        "base_lr": row.rate,
        "minutes": round(row.minutes, 2),
        "clips": row.clips,
        "peak_bytes": row.peak,
    }


def _draw(table: Table, rows: Sequence[Found], path: Path) -> None:
    from matplotlib.figure import Figure

    height = 4.2 if table.axis else 0.55 * len(rows) + 1.6
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    (_curves if table.axis else _bars)(axes, table, rows)
    axes.set_title(table.title, loc="left")
    figure.savefig(path, dpi=110)


def _bars(axes: Any, table: Table, rows: Sequence[Found]) -> None:
    places = [len(rows) - i for i in range(len(rows))]
    axes.barh(
        [p + 0.18 for p in places], [row.mean for row in rows], 0.36, color="tab:blue", alpha=0.7, label="fine-tuned"
    )
    linear = [statistics.fmean(row.linear) if row.linear else 0.0 for row in rows]
    axes.barh([p - 0.18 for p in places], linear, 0.36, color="tab:orange", alpha=0.7, label="linear, frozen")
    for place, row in zip(places, rows, strict=True):
        axes.plot(row.tuned, [place + 0.18] * len(row.tuned), "o", color="black", markersize=3)
        axes.plot(row.linear, [place - 0.18] * len(row.linear), "o", color="black", markersize=3)
        axes.text(max(row.tuned) + 1, place + 0.18, f"{row.mean:.1f}", va="center", fontsize=8)
    axes.set_yticks(places, [row.line.title for row in rows])
    axes.axvline(CHANCE, color="black", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 100), xlabel="top-1, %; dots: seeds; dotted: chance")
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)


def _curves(axes: Any, table: Table, rows: Sequence[Found]) -> None:
    ticks: list[float] = []
    for name, points in groupby(rows, key=lambda row: row.line.curve):
        curve = list(points)
        places = [row.line.x or 0.0 for row in curve]
        label = name or "fine-tuned"
        (drawn,) = axes.plot(places, [row.mean for row in curve], "o-", label=label)
        if all(row.linear for row in curve):
            values = [statistics.fmean(row.linear) for row in curve]
            frozen = f"{name}, linear, frozen" if name else "linear, frozen"
            axes.plot(places, values, "s--", color=drawn.get_color(), alpha=0.6, label=frozen)
        ticks = sorted({*ticks, *places})
    if max(ticks) / min(ticks) >= 8:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:,g}" for x in ticks])
    axes.minorticks_off()
    axes.axhline(CHANCE, color="black", linestyle=":", linewidth=1)
    axes.set(ylim=(0, 100), xlabel=table.axis, ylabel="top-1, %; dotted: chance")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
