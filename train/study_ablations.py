"""The paper's ablations in small: on clips of the demo's kind, 16 frames of 32 x 32, every line of every table is
an encoder pre-trained in its own way, then fine-tuned on a few labelled clips and probed as it is. See study_tables.py.

Lines that share a pre-training share its run, so that all tables together cost little more than their parts.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kernels.launch import check
from train.finetune_recipes import FINETUNE
from train.study_jobs import Job
from train.study_rows import StudyConfig, last_value
from train.study_tables import Before, Line, Table
from videomae.data.demo import Look, make_demo

FRAMES = 20  # of a video
# classes of each motion, from slow to fast: the motions alone are told apart by every start that has learned anything
PACES = 2
TEST = 960  # clips
LABELS, EPOCHS = 504, 5.0  # labelled clips, an equal number of every class; epochs over them
FINETUNE_RATES = (1.0, 3.0, 10.0)  # times the recipe's
CHOSEN = 1  # of them, where a line is fine-tuned at one


@dataclass(frozen=True)
class Method:
    """How a verb pre-trains here, beside its demo recipe."""

    videos: int  # a step, of which each gives two clips
    base_lr: float
    steps: int
    flags: Mapping[str, str] = field(default_factory=dict)


# steps of the same time, as measured on one core; rates as the table of rates has found them (bench/NOTES.md)
METHODS = {
    "train.pretrain": Method(16, 3.2e-2, 2400, {"--mask.ratio": "0.9"}),
    # of so few steps a momentum of 0.99 would leave half of the encoder of keys as it was drawn
    "train.moco": Method(32, 1.6e-2, 440, {"--contrast.momentum": "0.9"}),
}
STEPS = METHODS["train.pretrain"].steps


@dataclass(frozen=True)
class Found:
    """A line's results, a value for each seed."""

    line: Line
    tuned: tuple[float, ...]  # top-1, %
    linear: tuple[float, ...]
    rate: float  # at which it was fine-tuned
    minutes: float = 0.0  # of pre-training with the first seed, one core
    clips: float = 0.0  # seen in it
    peak: int = 0  # bytes of a step, estimated
    loss: float = 0.0  # over its last tenth

    @property
    def mean(self) -> float:
        return statistics.fmean(self.tuned)


class Ablations:
    """Some of the tables, with the runs that they need."""

    def __init__(self, tables: Sequence[Table], config: StudyConfig, folder: Path) -> None:
        """folder: of the runs."""
        self.tables, self.config, self.folder = tuple(tables), config, folder
        self._jobs: dict[str, Job] = {}

    @property
    def steps(self) -> int:
        return self.config.steps or STEPS

    @property
    def settings(self) -> dict[str, float]:
        """Steps of pre-training and clips of a step, labelled clips, epochs over them."""
        config = self.config
        moco = METHODS["train.moco"]
        return {
            "steps": self.steps,
            "clips": 2 * METHODS["train.pretrain"].videos,
            "moco_steps": max(round(moco.steps * self.steps / STEPS), 1),
            "moco_clips": 2 * moco.videos,
            "labels": config.labels or LABELS,
            "epochs": config.epochs or EPOCHS,
        }

    def seeds(self, line: Line) -> range:
        return range(min(self.config.seeds, line.seeds or self.config.seeds))

    # -- the runs

    def jobs(self) -> list[Job]:
        """Every command once, table by table; of each pre-training first, the longest of it at the beginning."""
        self._jobs = {}
        ordered: list[Job] = []
        for table in self.tables:
            for line in table.lines:
                for seed in self.seeds(line):
                    self._of(line, seed)
            own = list(self._jobs.values())[len(ordered) :]
            ordered += sorted(own, key=lambda job: (bool(job.needs), -_length(job)))
        return ordered

    def _of(self, line: Line, seed: int) -> None:
        before = None if line.before is None else self._before(line.before, seed)
        usual = int(self.settings["labels"])
        labels = line.labels or usual
        labelled = self._labelled(line.look, labels)
        # as many steps on fewer clips as on more
        epochs = self.settings["epochs"] * usual / labels
        start = () if before is None else ("--weights", str(before))
        needs = () if before is None else (before.name,)
        geometry = self._geometry(line.before)
        for i in self.rates(line):
            rate = FINETUNE["demo"]().optim.base_lr * FINETUNE_RATES[i]
            flags = (*_flags(_GEOMETRY), "--epochs", f"{epochs:.6g}", "--optim.base-lr", f"{rate:.6g}")
            flags += ("--validate-every", "1000")  # at the end alone
            fresh = ("--positions", "fresh") if before is not None and geometry != _GEOMETRY else ()
            tune = ("train.finetune", "demo", "--data", str(labelled), *flags, *start, *fresh)
            self._add(self.tune_run(line, i, seed), tune, seed, needs)
        if before is not None and geometry == _GEOMETRY:
            probe = ("train.probe", "--weights", str(before), "--data", str(labelled), "--method", "linear")
            self._add(self.probe_run(line, seed), probe, seed, needs)

    def _before(self, before: Before, seed: int) -> Path:
        run, data = self.pretrain_run(before, seed), self._unlabelled(before.look, before.videos)
        method = METHODS[before.verb]
        steps = max(round(method.steps * before.length * self.steps / STEPS), 1)
        length = {"--batch-size": f"{method.videos}", "--steps": f"{steps}"}
        rate = {"--optim.base-lr": f"{method.base_lr * before.rate:.6g}"}
        flags = {**self._geometry(before), **method.flags, **before.flags, **length, **rate}
        self._add(run, (before.verb, "demo", "--data", str(data), *_flags(flags)), seed)
        return run

    def _add(self, run: Path, arguments: tuple[str, ...], seed: int, needs: tuple[str, ...] = ()) -> None:
        log = () if arguments[0] == "train.probe" else ("--log.tensorboard", "false")
        common = ("--seed", str(seed), *log, "--workers", "1", "--out", str(run))
        job = Job(run.name, (*arguments, *common), needs)
        check(self._jobs.setdefault(run.name, job) == job, f"two commands are called {run.name}")

    def _geometry(self, before: Before | None) -> dict[str, str]:
        return {**_GEOMETRY, **{k: v for k, v in (before.flags if before else {}).items() if k in _GEOMETRY}}

    # -- folders of runs, which all tables share

    def rates(self, line: Line) -> Sequence[int]:
        return range(len(FINETUNE_RATES)) if line.tuned else (CHOSEN,)

    def pretrain_run(self, before: Before, seed: int) -> Path:
        return self.folder / f"{before.name}-{seed}"

    def tune_run(self, line: Line, rate: int, seed: int) -> Path:
        return self.folder / f"{_line_name(line)}-tuned-{rate}-{seed}"

    def probe_run(self, line: Line, seed: int) -> Path:
        return self.folder / f"{_line_name(line)}-linear-{seed}"

    # -- data

    def _unlabelled(self, look: Look, videos: int | None) -> Path:
        return self._part(look, "train", videos, self.folder / f"videos-{look}-{videos or 'all'}.csv")

    def _labelled(self, look: Look, labels: int) -> Path:
        home = self.folder / f"labelled-{look}-{labels}"
        self._part(look, "train", labels, home / "train.csv")
        self._part(look, "test", None, home / "test.csv")
        (home / "classes.txt").write_text((self._rendered[look].parent / "classes.txt").read_text())
        return home

    def _part(self, look: Look, split: str, most: int | None, path: Path) -> Path:
        """A list of the first videos, whose classes take turns."""
        lines = self._lines(look, split)
        check(most is None or most <= len(lines), f"labels must be at most {len(lines):,}; got {most}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines[:most]))
        return path

    def _lines(self, look: Look, split: str) -> list[str]:
        """Of a rendered list, with whole paths."""
        rendered = self._rendered[look].with_name(f"{split}.csv")
        return [f"{rendered.parent}/{line}\n" for line in rendered.read_text().splitlines()]

    @cached_property
    def _rendered(self) -> Mapping[Look, Path]:
        looks = {line.look for table in self.tables for line in table.lines}
        looks |= {line.before.look for table in self.tables for line in table.lines if line.before}
        return {
            look: make_demo(Path(f"data/study-{look}"), frames=FRAMES, look=look, paces=PACES, test=TEST)
            for look in looks
        }

    # -- results

    def read(self, table: Table) -> list[Found]:
        """What the finished runs found, line by line."""
        return [self._read(line) for line in table.lines]

    def _read(self, line: Line) -> Found:
        seeds = self.seeds(line)
        tuned = {
            i: tuple(last_value(self.tune_run(line, i, seed), "val_top1") for seed in seeds) for i in self.rates(line)
        }
        best = max(tuned, key=lambda i: statistics.fmean(tuned[i]))
        found = Found(line, tuned[best], (), FINETUNE["demo"]().optim.base_lr * FINETUNE_RATES[best])
        if line.before is None:
            return found
        probes = [self.probe_run(line, seed) / "result.json" for seed in seeds]
        linear = tuple(json.loads(p.read_text())["accuracy"]["linear"]["top1"] for p in probes if p.exists())
        return replace(found, linear=linear, **_cost(self.pretrain_run(line.before, 0)))


def _cost(run: Path) -> dict[str, Any]:
    """Of a pre-training run: minutes by its usual rate, clips, bytes at a step's peak, loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plan = json.loads((run / "config.json").read_text())["plan"]
    clips = plan["steps"] * plan["clips_per_step"]
    rate = statistics.median(line["clips_per_second"] for line in lines)
    last = lines[-math.ceil(len(lines) / 10) :]
    loss = statistics.fmean(line["loss"] for line in last)
    return {"minutes": clips / rate / 60, "clips": clips, "peak": plan["peak_bytes"], "loss": loss}


_GEOMETRY = {"--model.frames": "16", "--model.cube": "2 8 8"}


def _flags(flags: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(word for flag, value in flags.items() for word in (flag, *value.split()))


def _line_name(line: Line) -> str:
    name = line.before.name if line.before else "scratch"
    name += f"-{line.labels}-labels" if line.labels else ""
    return name + (f"-on-{line.look}" if line.look != "discs" else "")


def _length(job: Job) -> int:
    return int(job.arguments[job.arguments.index("--steps") + 1]) if "--steps" in job.arguments else 0
