"""Does it detect? Pre-training on the demo's scenes without labels, then training a detector on a few with boxes and
labels, against training on those alone with the same number of steps and the best of three learning rates; and what a
detector's head alone makes of the frozen encoder, pre-trained and untrained, with the best of the same three.
"""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.launch import check
from train.checkpoint import checkpoints
from train.detect_recipes import DETECT
from train.run import demo_scenes
from train.study_jobs import Job
from train.study_rows import Row, StudyConfig, draw_rows, last_value, said_of, spread, table, write_record

_LABELS, _EPOCHS = 1200, 10.0  # scenes of two boxes each; epochs over them
# times the recipe's learning rate, which was chosen for the first row; in every other row the best of them counts
_RATES = (1.0, 3.0, 10.0)


def jobs(config: StudyConfig, folder: Path) -> list[Job]:
    """The runs of the study."""
    scenes, epochs = _budget(config)
    labelled = _labelled_part(scenes, folder)
    steps = () if config.steps is None else ("--steps", str(config.steps))
    found = []
    for seed in range(config.seeds):
        common = ("--seed", str(seed), "--log.tensorboard", "false", "--workers", "1")
        before = folder / f"pretrain-{seed}"
        found.append(Job(before.name, ("train.pretrain", "demo-scenes", "--out", str(before), *steps, *common)))
        budget = ("--epochs", f"{epochs:g}", "--validate-every", f"{epochs:g}")
        tune = ("train.detect", "demo", "--data", str(labelled), *budget, *common)
        weights, head = ("--weights", str(before)), ("--model.frozen", "true")
        found.append(_job(folder / f"detect-{seed}", (*tune, *weights), before))
        for i, factor in enumerate(_RATES):
            at_rate = (*tune, "--optim.base-lr", f"{factor * _base_rate():.6g}")
            found.append(_job(folder / f"scratch-{i}-{seed}", at_rate))
            found.append(_job(folder / f"frozen-{i}-{seed}", (*at_rate, *weights, *head), before))
            found.append(_job(folder / f"untrained-{i}-{seed}", (*at_rate, *head)))
    # the long ones first: the others fill the gaps
    return sorted(found, key=lambda job: not job.name.startswith("pretrain"))


def _job(out: Path, arguments: tuple[str, ...], before: Path | None = None) -> Job:
    return Job(out.name, (*arguments, "--out", str(out)), () if before is None else (before.name,))


def _base_rate() -> float:
    return DETECT["demo"]().optim.base_lr


def _budget(config: StudyConfig) -> tuple[int, float]:
    """Labelled scenes, and epochs over them."""
    return config.labels or _LABELS, config.epochs or _EPOCHS


def _labelled_part(scenes: int, folder: Path) -> Path:
    """A folder of lists: the first training scenes, and the test scenes."""
    home, source = folder / f"labelled-{scenes}", demo_scenes()
    home.mkdir(parents=True, exist_ok=True)
    for split, most in (("train", scenes), ("test", None)):
        with (source / f"{split}.csv").open(newline="") as file:
            header, *lines = csv.reader(file)
        paths = list(dict.fromkeys(line[0] for line in lines))
        check(most is None or most <= len(paths), f"labels must be at most {len(paths)}; got {most}")
        chosen = set(paths[:most])
        with (home / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(header)
            table.writerows((str(source.resolve() / line[0]), *line[1:]) for line in lines if line[0] in chosen)
    (home / "classes.txt").write_text((source / "classes.txt").read_text())
    return home


def read_rows(config: StudyConfig, folder: Path) -> list[Row]:
    """What the finished runs found."""
    seeds = range(config.seeds)

    def values(name: str) -> tuple[float, ...]:
        return tuple(last_value(folder / f"{name}-{seed}", "val_map") for seed in seeds)

    def at_rates(title: str, name: str) -> list[Row]:
        """The best rate's first."""
        found = sorted(
            ((values(f"{name}-{i}"), f"{factor * _base_rate():.3g}") for i, factor in enumerate(_RATES)),
            key=lambda one: -statistics.fmean(one[0]),
        )
        noted = [f"base rate {found[0][1]}, the best of three", *(f"base rate {rate}" for _, rate in found[1:])]
        return [Row(title, own, note) for (own, _), note in zip(found, noted, strict=True)]

    return [
        Row("pre-trained", values("detect"), f"base rate {_base_rate():.3g}"),
        *at_rates("from scratch", "scratch"),
        *at_rates("frozen, pre-trained", "frozen")[:1],
        *at_rates("frozen, untrained", "untrained")[:1],
    ]


def report(config: StudyConfig, folder: Path, jobs: Sequence[Job], seconds: dict[str, float], took: float) -> None:
    """Write the page, the plot and the record, and print the table."""
    rows, out = read_rows(config, folder), Path(config.out) / config.name
    around = write_record(config, jobs, rows, seconds, took, "map")
    (out / "README.md").write_text(_page(config, rows, seconds, around, folder))
    scenes, _ = _budget(config)
    draw_rows(
        rows, out / "map.png", f"mAP@0.5, %; dots: seeds; dotted: chance; {scenes} labelled scenes", chance=100 / 12
    )
    for row in rows:
        print(f"{row.title:<52} {spread(row.values)}")
    print(f"written: {out / 'README.md'}, {out / 'map.png'}, {out / 'study.json'}")


def _page(config: StudyConfig, rows: list[Row], seconds: dict[str, float], around: dict[str, Any], folder: Path) -> str:
    steps = checkpoints(folder / "pretrain-0" / "checkpoints")[0].name.removeprefix("step_")
    scenes, epochs = _budget(config)
    return "\n".join(
        (
            "# Does it detect?",
            "",
            "Frame mAP@0.5 in per cent on 480 test scenes of the demo, each of two objects that move in one of 12 "
            f"ways, their boxes given; {config.seeds} seeds:",
            "mean and standard deviation, then each seed. Every detector is trained on the same "
            f"{scenes:,} scenes with boxes and labels for {epochs:g} epochs;",
            f"pre-training sees scenes without either for {int(steps):,} steps. The test scenes are of seeds that no "
            "training saw.",
            f"Pre-trained is **{rows[0].mean - rows[1].mean:.1f} points** above scratch, which has the best of three "
            "learning rates.",
            "Frozen: the encoder stays as it is, and the head alone is trained.",
            "",
            table(rows, "mAP@0.5"),
            "",
            "![mAP](map.png)",
            "",
            said_of(config, seconds, around),
            "",
        )
    )
