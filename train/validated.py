"""Kinds of training that are tested now and then: after every so many epochs, and at the end."""

import json
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from train.config import RunConfig
from train.log import RunLog
from train.run import Run
from train.verb import Verb

C = TypeVar("C", bound=RunConfig)


class ValidatedVerb(Verb[C]):
    """One kind of training with a validation set. A run that was stopped between a checkpoint and the validation of
    that step makes up for it."""

    measure: ClassVar[str]  # what every validation gives a value of, the larger the better

    @property
    @abstractmethod
    def validate_every(self) -> float:
        """Epochs; 0: never, also where there is nothing to validate on."""

    @abstractmethod
    def validate(self, run: Run, log: RunLog, done: int) -> dict[str, float]:
        """The values, `measure` among them, after so many steps; says them."""

    def is_incomplete(self, run: Run) -> bool:
        noted = any(row["step"] == run.start for row in self.validations(run.out))
        return run.start > 0 and not noted and self._is_due(run, run.start)

    def begin(self, run: Run, log: RunLog) -> None:
        if self.is_incomplete(run):
            self._validate(run, log, run.start)

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
