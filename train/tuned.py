"""Kinds of training that start from weights, on labelled data, and are tested now and then: after every so many
epochs, and at the end."""

import json
import math
import sys
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import nn

from train.config import TunedConfig
from train.inference import find_weights
from train.log import RunLog
from train.run import Run, check_reader, warn_of, warn_of_flips
from train.verb import Verb, counts_of_tokens
from videomae.data import storage
from videomae.data.dataset import NoSplit, VideoList
from videomae.model import size_of
from videomae.weights import load_weights


class LabelledSet(Protocol):
    """What can be trained on and tested with."""

    @property
    def videos(self) -> VideoList: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...


C = TypeVar("C", bound=TunedConfig)
S = TypeVar("S", bound=LabelledSet)


class TunedVerb(Verb[C], Generic[C, S]):
    """One kind of training with a validation set. A run that was stopped between a checkpoint and the validation of
    that step makes up for it."""

    measure: ClassVar[str]  # what every validation gives a value of, the larger the better

    def __init__(self, config: C) -> None:
        super().__init__(config)
        self._train: S | None = None
        self._val: S | None = None
        self._report: list[str] = []  # on where the weights came from

    @property
    def recompute(self) -> str:
        return self.config.model.recompute

    @property
    def train_set(self) -> S:
        assert self._train is not None
        return self._train

    @property
    def validate_every(self) -> float:
        """Epochs; 0: never, also where there is nothing to validate on."""
        return self.config.validate_every if self._val is not None else 0

    # -- before the first step

    @abstractmethod
    def source(self) -> str:
        """Where the data is; the demo renders its own. ValueError when nobody said."""

    @abstractmethod
    def find(self, source: str, split: str, like: S | None = None) -> S:
        """The data of a split, classes numbered as those of like, the training set. Raises ValueError; NoSplit when
        there is none, or none but the training set."""

    def check_set(self, found: S, source: str) -> None:
        """ValueError when the recipe cannot use it."""

    def find_videos(self) -> VideoList:
        data, source = self.config.data, self.source()
        storage.configure(data.cache_of(source))
        self._train = self.find(source, "train")
        warn_of(self._train.videos)
        check_reader(data, self._train.videos)
        self.check_set(self._train, source)
        if self.config.validate_every:
            self._val = self._find_val(source)
        warn_of_flips(self._train.classes, self.config.augment.flip)
        return self._train.videos

    def _find_val(self, source: str) -> S | None:
        """The validation set; None, and a note, where there is none beside the training set."""
        given = self.config.data.val
        try:
            found = self.find(given or source, "val", like=self.train_set)
        except NoSplit as error:
            if given is not None:
                raise
            print(f"note: no validation, which --data.val may give: {error}", file=sys.stderr)
            return None
        warn_of(found.videos)
        self.check_set(found, given or source)
        return found

    def sequences(self) -> dict[str, tuple[int, int]]:
        size = size_of(self.config.model.size)
        return {"encoder": counts_of_tokens(self.input, size.width, size.heads)}

    def initialize(self, model: nn.Module) -> None:
        if self.config.weights is None:
            self._report = ["from nothing: --weights W starts from pre-training"]
            return
        report = load_weights(model, find_weights(self.config.weights), positions=self.config.positions)
        self._report = str(report).splitlines()

    def fingerprint(self, videos: VideoList) -> str:
        return self.train_set.fingerprint

    def describe_model(self, model: nn.Module, sampling: str) -> list[str]:
        """Lines of the plan. sampling: in words."""
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        height, width = self.input.size
        flip = "half of the clips mirrored" if self.config.augment.flip else "no flip"
        return [
            f"model     {self.config.model.size}: {millions:.1f} M parameters",
            *(f"weights   {line.strip()}" for line in self._report),
            f"clip      {self.config.model.frames} x {height} x {width}, {sampling}; {flip}",
        ]

    def facts(self) -> dict[str, Any]:
        return {"classes": list(self.train_set.classes), "weights": self._report}

    def to_test(self) -> list[str]:
        """Flags of the command that tests the weights: the data that was validated on, or a place for some."""
        data = self.config.data
        if data.path is None:
            return []
        beside = self._val is not None or (not self.config.validate_every and Path(data.path).expanduser().is_dir())
        return ["--data", data.val or (data.path if beside else "TEST")]

    # -- in the loop

    @abstractmethod
    def validate(self, run: Run, log: RunLog, done: int) -> dict[str, float]:
        """The values, `measure` among them, after so many steps; says them."""

    def is_incomplete(self, run: Run) -> bool:
        noted = any(row["step"] == run.start for row in self.validations(run.out))
        return run.start > 0 and not noted and self._is_due(run, run.start)

    def begin(self, run: Run, log: RunLog) -> None:
        if self.is_incomplete(run):
            self._validate(run, log, run.start)

    def looks_after(self, run: Run, done: int) -> bool:
        return self._is_due(run, done)

    def after_step(self, run: Run, log: RunLog, done: int) -> None:
        if self._is_due(run, done):
            self._validate(run, log, done)

    def validations(self, out: Path) -> list[dict[str, Any]]:
        """Those of the run so far, by step."""
        path = out / "evaluations.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # a kill can leave half a line at the end
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if self.measure in row]

    def last_and_best(self, out: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Of the validations; None before the first. Those before the run was stopped and gone on with are among
        them."""
        found = self.validations(out)
        return (found[-1], max(found, key=lambda one: one[self.measure])) if found else None

    def _validate(self, run: Run, log: RunLog, done: int) -> None:
        with log.pause():
            log.evaluated(done, self.validate(run, log, done))

    def _is_due(self, run: Run, done: int) -> bool:
        """At the first step at or after each multiple, and at the end."""
        every = self.validate_every * len(run.videos) / self.config.batch_size
        if every == 0:
            return False
        return math.floor(done / every) > math.floor((done - 1) / every) or done == run.schedule.steps
