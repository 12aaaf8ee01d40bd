"""Does it learn? On the demo's clips, pre-training without labels, then fine-tuning on a few labelled ones, against
training on those alone with the same number of steps and the best of three learning rates; and what nearest neighbours
and a linear classifier make of the frozen features, trained and untrained.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.launch import check
from train.checkpoint import checkpoints
from train.finetune_recipes import FINETUNE
from train.run import demo_list
from train.study_jobs import Job
from train.study_rows import Row, StudyConfig, draw_rows, last_value, said_of, spread, table, write_record
from videomae.data.dataset import find_videos

_LABELS, _EPOCHS = 504, 5.0  # labelled clips, an equal number of every class; epochs over them
# for training from nothing, times the fine-tuning recipe's learning rate; the best of them counts
_SCRATCH_RATES = (1.0, 3.0, 10.0)
# and once more for so many times as many steps, at the middle rate: what the labels could give
_LONGER = 8


def jobs(config: StudyConfig, folder: Path) -> list[Job]:
    """The runs of the study."""
    labels, epochs = _budget(config)
    labelled = _labelled_part(labels, folder)
    data = ("--data", str(labelled))
    budget = ("--epochs", f"{epochs:g}")
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
        longer = ("--epochs", f"{_LONGER * epochs:g}", "--optim.base-lr", middle, "--out", str(out))
        jobs.append(Job(out.name, ("train.finetune", "demo", *data, *longer, *common)))
        jobs += _probes(seed, before, labelled, folder)
    # the long ones first: the others fill the gaps
    return sorted(jobs, key=lambda job: not job.name.startswith("pretrain"))


def _base_rate() -> float:
    return FINETUNE["demo"]().optim.base_lr


def _probes(seed: int, before: Path, labelled: Path, folder: Path) -> list[Job]:
    """Nearest neighbours and linear classifier on frozen features, pre-trained and untrained."""
    jobs = []
    for name, flags in (("probe", ()), ("untrained", ("--random",))):
        out = folder / f"{name}-{seed}"
        arguments = ("train.probe", "--weights", str(before), *flags, "--data", str(labelled))
        arguments += ("--method", "knn", "linear", "--seed", str(seed), "--workers", "1", "--out", str(out))
        jobs.append(Job(out.name, arguments, (before.name,)))
    return jobs


def _labelled_part(labels: int, folder: Path) -> Path:
    """A folder of lists: the first labelled clips of the demo, whose classes take turns, and its test clips."""
    home = folder / f"labelled-{labels}"
    home.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", labels), ("test", None)):
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
    scratch = [
        tuple(last_value(folder / f"scratch-{i}-{seed}", "val_top1") for seed in seeds) for i in range(len(rates))
    ]
    best = max(range(len(rates)), key=lambda i: statistics.fmean(scratch[i]))
    probes = {
        name: [json.loads((folder / f"{name}-{seed}" / "result.json").read_text()) for seed in seeds]
        for name in ("probe", "untrained")
    }

    def probed(name: str, method: str) -> tuple[float, ...]:
        return tuple(result["accuracy"][method]["top1"] for result in probes[name])

    rows = [
        Row("pre-trained, fine-tuned", tuple(last_value(folder / f"finetune-{seed}", "val_top1") for seed in seeds)),
        Row("from scratch", scratch[best], f"base rate {rates[best]}, the best of three"),
    ]
    rows += [
        Row("from scratch", values, f"base rate {rate}")
        for i, (rate, values) in enumerate(zip(rates, scratch, strict=True))
        if i != best
    ]
    longer = tuple(last_value(folder / f"longer-{seed}", "val_top1") for seed in seeds)
    rows.append(Row("from scratch", longer, f"base rate {rates[1]}, {_LONGER} times the steps"))
    for method, title in (("linear", "linear classifier"), ("knn", "nearest neighbours")):
        rows.append(Row(f"pre-trained, frozen: {title}", probed("probe", method)))
        rows.append(Row(f"untrained, frozen: {title}", probed("untrained", method)))
    return rows


def report(config: StudyConfig, folder: Path, jobs: Sequence[Job], seconds: dict[str, float], took: float) -> None:
    """Write the page, the plot and the record, and print the table."""
    rows, out = read_rows(config, folder), Path(config.out) / config.name
    around = write_record(config, jobs, rows, seconds, took, "top1")
    (out / "README.md").write_text(_page(config, rows, seconds, around, folder))
    labels, _ = _budget(config)
    label = f"top-1, %; dots: seeds; dotted: chance; {labels} labelled clips"
    draw_rows(rows, out / "accuracy.png", label, chance=100 / 12)
    for row in rows:
        note = f"  ({row.note})" if row.note else ""
        print(f"{row.name:<42} {spread(row.values)}{note}")
    print(f"written: {out / 'README.md'}, {out / 'accuracy.png'}, {out / 'study.json'}")


def _page(config: StudyConfig, rows: list[Row], seconds: dict[str, float], around: dict[str, Any], folder: Path) -> str:
    steps = checkpoints(folder / "pretrain-0" / "checkpoints")[0].name.removeprefix("step_")
    labels, epochs = _budget(config)
    gap = rows[0].mean - rows[1].mean
    longer = next(row for row in rows if row.note.endswith("times the steps"))
    return "\n".join(
        (
            "# Does it learn?",
            "",
            f"Top-1 accuracy in per cent on the demo's {len(find_videos(demo_list('test')))} test clips, 12 motions, "
            f"{config.seeds} seeds: mean and standard deviation, then",
            "each seed. Fine-tuning and training from scratch see the same "
            f"{labels} labelled clips for {epochs:g} epochs; pre-training sees the demo's",
            f"clips without labels for {int(steps):,} steps. Pre-trained is **{gap:.1f} points** above scratch, "
            "which has the best of three learning rates.",
            f"With {_LONGER} times the steps scratch comes to {longer.mean:.1f}.",
            "",
            table(rows, "top-1"),
            "",
            "![accuracy](accuracy.png)",
            "",
            said_of(config, seconds, around),
            "",
        )
    )


def _budget(config: StudyConfig) -> tuple[int, float]:
    """Labelled clips, and epochs over them."""
    return config.labels or _LABELS, config.epochs or _EPOCHS
