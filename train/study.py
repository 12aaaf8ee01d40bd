"""Small experiments that show the method at work, each from one command: `python -m train.study [NAME]`.

A study is a list of the project's own commands by several seeds, run side by side and gone on with where it was
stopped, and ends in a table and a plot.

learns: on the demo's clips, pre-training without labels, then fine-tuning on a few labelled ones, against training on
those alone with the same number of steps and the best of three learning rates; and what nearest neighbours and a linear
classifier make of the frozen features, trained and untrained.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from kernels.launch import check
from train.checkpoint import checkpoints
from train.cli import parse_flags, user_errors
from train.record import surroundings
from train.run import demo_list
from train.study_jobs import Job, JobFailed, Terminated, run_jobs
from videomae.data.dataset import find_videos
from videomae.data.pool import available_cpus

PROG = "python -m train.study"
# for training from nothing, times the fine-tuning recipe's learning rate; the best of them counts
_SCRATCH_RATES = (1.0, 3.0, 10.0)
# and once more for so many times as many steps, at the middle rate: what the labels could give
_LONGER = 8


@dataclass(frozen=True)
class StudyConfig:
    """A study."""

    name: Annotated[Literal["learns"], tyro.conf.Positional] = "learns"
    seeds: int = 3
    labels: int = 504  # labelled clips, an equal number of every class
    epochs: float = 5.0  # over the labelled clips
    steps: int | None = None  # of pre-training; the demo recipe's if not given
    runs: str = "runs/study"  # folder of the runs
    out: str = "results"  # folder of the table and the plot
    jobs: int | None = None  # commands at a time; as many as cores, or one on a GPU, if not given

    def __post_init__(self) -> None:
        check(self.seeds >= 1, f"seeds must be at least 1; got {self.seeds}")
        check(self.labels >= 1, f"labels must be at least 1; got {self.labels}")
        check(0 < self.epochs < 1e9, f"epochs must be positive and finite; got {self.epochs}")
        check(self.steps is None or self.steps >= 1, f"steps must be at least 1; got {self.steps}")
        check(self.jobs is None or self.jobs >= 1, f"jobs must be at least 1; got {self.jobs}")


@dataclass(frozen=True)
class Row:
    """One line of the table: top-1 in per cent of every seed."""

    name: str
    values: tuple[float, ...]
    note: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 a run failed, 2 wrong use, 130 and 143 stopped by Ctrl-C, SIGTERM."""
    about = "Small experiments on the demo's clips, each ending in a table and a plot."
    given = sys.argv[1:] if arguments is None else arguments
    config = parse_flags(given, StudyConfig, prog=PROG, about=about)
    begin = time.monotonic()
    folder = Path(config.runs) / config.name
    gpu = torch.cuda.is_available()
    at_once = config.jobs or (1 if gpu else available_cpus())
    with user_errors(PROG):
        jobs = learns(config, folder)
    print(f"study {config.name}: {len(jobs)} runs, {at_once} at a time, in {folder}")
    try:
        seconds = run_jobs(jobs, folder, at_once=at_once, threads=max(available_cpus() // at_once, 1))
    except JobFailed as error:
        print(f"{PROG}: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"{PROG}: stopped; the same command goes on", file=sys.stderr)
        return 143 if isinstance(stopped, Terminated) else 130
    rows = read_rows(config, folder)
    _write(config, jobs, rows, seconds, time.monotonic() - begin)
    return 0


def learns(config: StudyConfig, folder: Path) -> list[Job]:
    """The runs of the study."""
    labelled = _labelled_part(config, folder)
    data = ("--data", str(labelled))
    budget = ("--epochs", f"{config.epochs:g}")
    steps = () if config.steps is None else ("--steps", str(config.steps))
    jobs = []
    for seed in range(config.seeds):
        common = ("--seed", str(seed), "--log.tensorboard", "false", "--workers", "1")
        before = folder / f"pretrain-{seed}"
        jobs.append(
            Job(before.name, ("train.pretrain", "demo", "--out", str(before), *steps, *common)),
        )
        tune = ("train.finetune", "demo", *data, *budget, *common)
        jobs.append(
            Job(
                f"finetune-{seed}",
                (*tune, "--weights", str(before), "--out", str(folder / f"finetune-{seed}")),
                (before.name,),
            )
        )
        for i, factor in enumerate(_SCRATCH_RATES):
            name = f"scratch-{i}-{seed}"
            rate = ("--optim.base-lr", f"{factor * _base_rate():.6g}")
            jobs.append(Job(name, (*tune, *rate, "--out", str(folder / name))))
        out, middle = folder / f"longer-{seed}", f"{_SCRATCH_RATES[1] * _base_rate():.6g}"
        longer = ("--epochs", f"{_LONGER * config.epochs:g}", "--optim.base-lr", middle, "--out", str(out))
        jobs.append(Job(out.name, ("train.finetune", "demo", *data, *longer, *common)))
        jobs += _probes(seed, before, labelled, folder)
    # the long ones first: the others fill the gaps
    return sorted(jobs, key=lambda job: not job.name.startswith("pretrain"))


def _base_rate() -> float:
    from train.finetune_recipes import demo

    return demo().optim.base_lr


def _probes(seed: int, before: Path, labelled: Path, folder: Path) -> list[Job]:
    """Nearest neighbours and linear classifier on frozen features, pre-trained and untrained."""
    jobs = []
    for name, flags in (("probe", ()), ("untrained", ("--random",))):
        out = folder / f"{name}-{seed}"
        arguments = ("train.probe", "--weights", str(before), *flags, "--data", str(labelled))
        arguments += ("--method", "knn", "linear", "--seed", str(seed), "--workers", "1", "--out", str(out))
        jobs.append(Job(out.name, arguments, (before.name,)))
    return jobs


def _labelled_part(config: StudyConfig, folder: Path) -> Path:
    """A folder of lists: the first labelled clips of the demo, whose classes take turns, and its test clips."""
    home = folder / "labelled"
    home.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", config.labels), ("test", None)):
        videos = find_videos(demo_list(split))
        check(most is None or most <= len(videos), f"labels must be at most {len(videos)}; got {most}")
        assert videos.labels is not None
        pairs = list(zip(videos.paths, videos.labels, strict=True))[:most]
        (home / f"{split}.csv").write_text("".join(f"{video} {label}\n" for video, label in pairs))
    (home / "classes.txt").write_text((demo_list().with_name("classes.txt")).read_text())
    return home


def read_rows(config: StudyConfig, folder: Path) -> list[Row]:
    """What the finished runs found."""
    seeds = range(config.seeds)
    rates = [f"{factor * _base_rate():.3g}" for factor in _SCRATCH_RATES]
    scratch = [tuple(_top1(folder / f"scratch-{i}-{seed}") for seed in seeds) for i in range(len(rates))]
    best = max(range(len(rates)), key=lambda i: statistics.fmean(scratch[i]))
    probes = {
        name: [json.loads((folder / f"{name}-{seed}" / "result.json").read_text()) for seed in seeds]
        for name in ("probe", "untrained")
    }

    def probed(name: str, method: str) -> tuple[float, ...]:
        return tuple(result["accuracy"][method]["top1"] for result in probes[name])

    rows = [
        Row("pre-trained, fine-tuned", tuple(_top1(folder / f"finetune-{seed}") for seed in seeds)),
        Row("from scratch", scratch[best], f"base rate {rates[best]}, the best of three"),
    ]
    rows += [
        Row("from scratch", values, f"base rate {rate}")
        for i, (rate, values) in enumerate(zip(rates, scratch, strict=True))
        if i != best
    ]
    longer = tuple(_top1(folder / f"longer-{seed}") for seed in seeds)
    rows.append(Row("from scratch", longer, f"base rate {rates[1]}, {_LONGER} times the steps"))
    for method, title in (("linear", "linear classifier"), ("knn", "nearest neighbours")):
        rows.append(Row(f"pre-trained, frozen: {title}", probed("probe", method)))
        rows.append(Row(f"untrained, frozen: {title}", probed("untrained", method)))
    return rows


def _top1(run: Path) -> float:
    """The validation's at the end of a run."""
    return json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["val_top1"]


def _write(config: StudyConfig, jobs: Sequence[Job], rows: list[Row], seconds: dict[str, float], took: float) -> None:
    out = Path(config.out) / config.name
    out.mkdir(parents=True, exist_ok=True)
    around = surroundings()
    folder = Path(config.runs) / config.name
    settings = {job.name: json.loads((folder / job.name / "config.json").read_text())["config"] for job in jobs[:1]}
    record: dict[str, Any] = {
        "command": [PROG, *sys.argv[1:]],
        "seconds": round(took, 1),
        "rows": [{"name": row.name, "note": row.note, "top1": list(row.values)} for row in rows],
        "runs": {job.name: {"command": list(job.arguments), "seconds": seconds[job.name]} for job in jobs},
        "config": settings,
        **around,
    }
    (out / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "README.md").write_text(_page(config, rows, seconds, around, folder))
    _plot(rows, out / "accuracy.png", config)
    for row in rows:
        note = f"  ({row.note})" if row.note else ""
        print(f"{row.name:<42} {row.mean:5.1f} ± {row.deviation:.1f}{note}")
    print(f"written: {out / 'README.md'}, {out / 'accuracy.png'}, {out / 'study.json'}")


def _page(config: StudyConfig, rows: list[Row], seconds: dict[str, float], around: dict[str, Any], folder: Path) -> str:
    steps = checkpoints(folder / "pretrain-0" / "checkpoints")[0].name.removeprefix("step_")
    table = "\n".join(
        f"| {row.name}{f' ({row.note})' if row.note else ''} | {row.mean:.1f} ± {row.deviation:.1f} "
        f"| {', '.join(f'{value:.1f}' for value in row.values)} |"
        for row in rows
    )
    gap = rows[0].mean - rows[1].mean
    longer = next(row for row in rows if row.note.endswith("times the steps"))
    versions = around["versions"]
    longest = max(taken for name, taken in seconds.items() if name.startswith("pretrain"))
    return "\n".join(
        (
            "# Does it learn?",
            "",
            f"Top-1 accuracy in per cent on the demo's {len(find_videos(demo_list('test')))} test clips, 12 motions, "
            f"{config.seeds} seeds: mean and standard deviation, then",
            "each seed. Fine-tuning and training from scratch see the same "
            f"{config.labels} labelled clips for {config.epochs:g} epochs; pre-training sees the demo's",
            f"clips without labels for {int(steps):,} steps. Pre-trained is **{gap:.1f} points** above scratch, "
            "which has the best of three learning rates.",
            f"With {_LONGER} times the steps scratch comes to {longer.mean:.1f}.",
            "",
            "| | top-1 | seeds |",
            "| --- | --- | --- |",
            table,
            "",
            "![accuracy](accuracy.png)",
            "",
            f"Made by `{PROG} {config.name}`: {sum(seconds.values()) / 60:.0f} minutes of one core, all runs together, "
            f"of which pre-training {longest / 60:.1f} a seed.",
            f"torch {versions['torch']}, {around['gpu'] or 'CPU'}, commit {around['commit']}. "
            "Every command and its time: `study.json`.",
            "",
        )
    )


def _plot(rows: list[Row], path: Path, config: StudyConfig) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.55 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows), 0, -1)
    colours = ["tab:blue" if row.name.startswith("pre-trained") else "tab:grey" for row in rows]
    axes.barh(places, [row.mean for row in rows], color=colours, alpha=0.6)
    for place, row in zip(places, rows, strict=True):
        axes.plot(row.values, [place] * len(row.values), "o", color="black", markersize=4)
        axes.text(min(max(row.values) + 1.5, 95), place, f"{row.mean:.1f}", va="center")
    labels = [f"{row.name}\n({row.note})" if row.note else row.name for row in rows]
    axes.set_yticks(list(places), labels)
    axes.axvline(100 / 12, color="black", linestyle=":", linewidth=1)
    axes.set(xlim=(0, 100), xlabel=f"top-1, %; dots: seeds; dotted: chance; {config.labels} labelled clips")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
