"""What the ablation study says: a page of tables with the paper's figures beside ours, a plot of each, the record."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from train.study_ablations import PACES, TEST, Ablations, Found
from train.study_records import Record, read_records, write_record
from train.study_rows import each, spread
from train.study_tables import Table
from videomae.data.demo import MOTIONS
from videomae.wording import counted

CHANCE = 100 / (len(MOTIONS) * PACES)
_TIE = 0.05  # points, less than which a table does not show
_STUDENT = {2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228}  # of so many degrees of freedom
_STAND_IN = (
    "**These are not the paper's experiments.** They are a small stand-in: a ViT of 0.6 M parameters, clips of 16 "
    "frames of 32 x 32 pixels, drawn by a program, in which one object moves in one of 12 ways, slow or fast: 24 "
    "classes. What carries over is "
    "the code that runs and the kind of difference each choice makes; the numbers do not, and the order may not: the "
    "paper's figures stand beside ours, and where the order differs it is said."
)


def write(study: Ablations, seconds: Mapping[str, float], out: Path) -> list[str]:
    """Write the record and the plot of every table of the study into out, and README.md of all that are there; the
    lines that a terminal is told. seconds: of every run. Raises ValueError where a record there is of another study."""
    out.mkdir(parents=True, exist_ok=True)
    for table in study.tables:
        write_record(study, table, seconds, out / f"{table.name}.json")
    said = []
    records = read_records(out)
    for record in records:
        if record.table in study.tables:
            said += ["", record.table.title, *_plain(record.rows)]
            _draw(record.table, record.rows, out / f"{record.table.name}.png")
    (out / "README.md").write_text("\n".join([_head(records), *map(section, records)]) + "\n")
    return [*said, "", f"written: {out / 'README.md'} of {counted(len(records), 'table')}, a record and a plot of each"]


def _head(records: Sequence[Record]) -> str:
    runs = {name: seconds for record in records for name, seconds in record.runs.items()}
    return "\n".join(
        (
            "# The paper's ablations, in small",
            "",
            _STAND_IN,
            "",
            "Every line is an encoder that was pre-trained in its own way on the same 4,800 clips without labels: "
            "masked with tubes of 90 % and a",
            "decoder of 2 blocks, where it says nothing else. Then it was fine-tuned on labelled clips: top-1 in per "
            f"cent of {TEST} test clips",
            f"(chance: {CHANCE:.1f}); linear is a linear classifier on the frozen features. ± is the standard "
            "deviation over seeds, which are",
            "listed; lines without it are of one seed, and differences of a few points mean nothing there: of as many "
            "test clips, two standard",
            "errors are 3 points already.",
            "",
            f"Tables share runs: {len(runs)} in all, {sum(runs.values()) / 3600:.1f} hours of one core. Each has its "
            "values, every command with its time,",
            "versions and machine in its JSON file here; its command makes it again, and goes on where it was stopped.",
            "",
        )
    )


def section(record: Record) -> str:
    """A table with the paper's columns, its plot, how the order compares, and where it comes from."""
    table, rows = record.table, record.rows
    titles = ["", "fine-tuned", "seeds", "linear", *(("loss",) if table.losses else ())]
    titles += ["memory", "minutes"] if table.costs else []
    titles += [f"paper, {title}" for title in table.paper]
    lines = [f"## {table.title}", "", table.about, "", _row(titles), _row(["---"] * len(titles))]
    for row in rows:
        cells = [row.line.title, spread(row.tuned), each(row.tuned), spread(row.linear)]
        cells += [f"{row.loss:.3f}" if row.loss else "–"] if table.losses else []
        if table.costs:
            cells += [f"{row.peak / 1e6:.0f} MB" if row.peak else "–", f"{row.minutes:.1f}" if row.minutes else "–"]
        lines.append(_row([*cells, *(row.line.paper or ["–"] * len(table.paper))]))
    lines += ["", f"![{table.title}]({table.name}.png)", ""]
    notes = [verdict(first, second, rows) for first, second in table.order]
    lines += [f"- {text}" for text in notes]
    lines += ["", table.why] if table.why else []
    return "\n".join([*lines, "", _origin(record), ""])


def _origin(record: Record) -> str:
    hours, around, settings = sum(record.runs.values()) / 3600, record.around, record.settings
    costs = " Memory: of a step of pre-training, estimated; minutes: of pre-training, on one core."
    return (
        f"`{record.command}`, {record.date}: {settings['steps']:,} steps of {settings['clips']} clips (MoCo v3: "
        f"{settings['moco_steps']:,} of {settings['moco_clips']}), {settings['labels']} labelled clips for "
        f"{settings['epochs']:g} epochs; {len(record.runs)} runs, {hours:.1f} hours of one core; "
        f"torch {around['versions']['torch']}, {around['gpu'] or 'CPU'}, commits {_short(record.commits)}."
        f"{costs if record.table.costs else ''}"
    )


def _short(commits: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(commit[:7] for commit in commits)) or "unknown"


def verdict(first: str, second: str, rows: Sequence[Found]) -> str:
    """Whether ours are in the paper's order: first above second."""
    better, worse = (next(row for row in rows if row.line.title == title) for title in (first, second))
    gap = better.mean - worse.mean
    seeds = min(len(better.tuned), len(worse.tuned))
    doubt = ", one seed"
    if seeds > 1:
        variances = statistics.variance(better.tuned), statistics.variance(worse.tuned)
        most = _student(seeds) * statistics.fmean(variances) ** 0.5 * (2 / seeds) ** 0.5
        doubt = f", within its 95 % interval (± {most:.1f})" if abs(gap) <= most else ""
    how = "as in the paper" if gap > 0 else "**not as in the paper**"
    return f"{first} over {second}: {gap:+.1f} points, {'a tie' if abs(gap) < _TIE else how}{doubt}."


def _student(seeds: int) -> float:
    """What t exceeds in 5 of 100 cases, either way, for two groups of so many."""
    return _STUDENT[min(2 * seeds - 2, max(_STUDENT))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(rows: Sequence[Found]) -> list[str]:
    width = max(len(row.line.title) for row in rows)
    return [f"  {row.line.title:<{width}}  {spread(row.tuned):>12}  linear {spread(row.linear):>12}" for row in rows]


def _draw(table: Table, rows: Sequence[Found], path: Path) -> None:
    from matplotlib.figure import Figure

    # of one loss a second picture
    losses = bool(table.axis) and table.losses
    figure = Figure(figsize=(11 if losses else 8, 4.2 if table.axis else 0.55 * len(rows) + 1.6), layout="constrained")
    axes, *others = figure.subplots(1, 1 + losses, squeeze=False)[0]
    (_curves if table.axis else _bars)(axes, table, rows)
    for other in others:
        _losses(other, table, rows)
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
    _place(axes, table, ticks)
    axes.axhline(CHANCE, color="black", linestyle=":", linewidth=1)
    axes.set(ylim=(0, 100), ylabel="top-1, %; dotted: chance")
    axes.legend(fontsize=8)


def _losses(axes: Any, table: Table, rows: Sequence[Found]) -> None:
    """Of pre-training, and where a line's costs matter its minutes."""
    places = [row.line.x or 0.0 for row in rows]
    axes.plot(places, [row.loss for row in rows], "o-", color="tab:green")
    axes.set_title("loss of pre-training", loc="left", color="tab:green")
    _place(axes, table, places)
    if table.costs:
        right = axes.twinx()
        right.plot(places, [row.minutes for row in rows], "s--", color="tab:red")
        right.set_title("minutes, one core", loc="right", color="tab:red")
        right.set_ylim(bottom=0)


def _place(axes: Any, table: Table, ticks: Sequence[float]) -> None:
    if max(ticks) / min(ticks) >= 8:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:,g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(table.axis)
    axes.grid(alpha=0.3)
