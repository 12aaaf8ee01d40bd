"""What a run folder tells: its record, metrics, pictures, trouble and results, read as far as they are whole."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kernels.launch import check
from train.cli import flat
from train.detect_recipes import DETECT
from train.finetune_recipes import FINETUNE
from train.moco_recipes import MOCO
from train.recipes import PRETRAIN

RECIPES: dict[str, Mapping[str, Any]] = {"pretrain": PRETRAIN, "finetune": FINETUNE, "detect": DETECT, "moco": MOCO}
_CHUNK = 1 << 22  # bytes of a file that are parsed at a time
# seconds without a line after which a run is taken for stopped; or so many times what lay between its lines
_SILENCE, _SILENT_LINES = 120.0, 10


class Series(NamedTuple):
    """A file of numbers by step. steps float64 [n], in order; every value too, nan where a line has none."""

    steps: np.ndarray
    values: dict[str, np.ndarray]
    damaged: int = 0  # lines that could not be read
    is_torn: bool = False  # half a line at the end

    def finite(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, where there is one."""
        values = self.values.get(name, np.full(len(self.steps), np.nan))
        kept = np.isfinite(values)
        return self.steps[kept], values[kept]

    def last(self, name: str) -> float | None:
        values = self.finite(name)[1]
        return float(values[-1]) if len(values) else None


class State(NamedTuple):
    """How far a run is, when its page is made."""

    name: str  # finished, going, stopped or empty
    text: str


@dataclass(frozen=True)
class FoundRun:
    """A run folder, or a folder of results."""

    path: Path
    record: dict[str, Any]  # config.json, else what result.json and protocol.json say of their making
    result: dict[str, Any] | None
    metrics: Series
    evaluations: Series
    skipped: tuple[dict[str, Any], ...]
    nonfinite: tuple[dict[str, Any], ...]
    samples: tuple[Path, ...]  # pictures, in the order of their steps

    @property
    def is_training(self) -> bool:
        return (self.path / "config.json").exists()

    @cached_property
    def parts(self) -> list[dict[str, Any]]:
        """What is recorded of the run's beginning and of each time that it went on."""
        resumed = self.record.get("resumed")
        return [self.record, *(part for part in resumed if isinstance(part, dict))] if resumed else [self.record]

    def now(self, name: str) -> Any:
        """Of the last part: its config, plan, commit, versions, ..."""
        return self.parts[-1].get(name)

    @property
    def config(self) -> dict[str, Any]:
        return _mapping(self.now("config"))

    @property
    def plan(self) -> dict[str, Any]:
        return _mapping(self.now("plan"))

    @property
    def command(self) -> list[str]:
        found = self.record.get("command")
        return [str(word) for word in found] if isinstance(found, list) else []

    @property
    def recipe(self) -> str | None:
        found = self.config.get("recipe")
        return None if found is None else str(found)

    @cached_property
    def verb(self) -> str | None:
        """The command's name: of `python -m train.NAME`; told by its settings where something else started it."""
        if self.command and (found := re.search(r"(?:^|[/\\.])train[/\\.](\w+?)(?:\.py)?$", self.command[0])):
            return found[1]
        if not self.is_training:
            return None
        shared = {name: len(set(flat(recipes["demo"]())) & set(self.config)) for name, recipes in RECIPES.items()}
        return max(shared, key=lambda name: shared[name])

    @cached_property
    def changed(self) -> dict[str, tuple[Any, Any]] | None:
        """Settings that differ from the recipe's: theirs, and the recipe's; None where the recipe is not known."""
        make = RECIPES.get(self.verb or "", {}).get(self.recipe or "")
        if make is None:
            return None
        recipe = json.loads(json.dumps(flat(make())))
        return {
            name: (value, recipe.get(name))
            for name, value in self.config.items()
            if name not in recipe or recipe[name] != value
        }

    def state(self, now: float) -> State:
        """now: seconds since the epoch, as the metrics' `time`."""
        if not self.is_training:
            is_done = self.result is not None
            return State("finished", "finished") if is_done else State("stopped", "there is no result yet")
        steps = self.metrics.steps
        total = self.plan.get("steps")
        of = f" of {total:,}" if isinstance(total, int) else ""
        if not len(steps):
            return State("empty", f"no step{of} is reported yet")
        if of and steps[-1] >= total:
            return State("finished", f"finished, {total:,} steps")
        text = f"step {steps[-1]:,.0f}{of}" + (f" ({steps[-1] / total:.0%})" if of else "")
        times = self.metrics.finite("time")[1]
        if not len(times):
            return State("stopped", f"stopped at {text}")
        silent = max(now - times[-1], 0.0)
        usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        if silent < max(_SILENCE, _SILENT_LINES * usual):
            return State("going", f"still going when this page was made: {text}")
        return State("stopped", f"stopped at {text}; the last line is {seconds_text(silent)} older than this page")

    @property
    def seconds(self) -> float | None:
        """From each part's start to its last line, together; None where nothing tells."""
        steps, times = self.metrics.finite("time")
        if not len(times):
            found = (self.result or {}).get("seconds")
            return float(found) if isinstance(found, (int, float)) else None
        begun = [(part.get("step"), _epoch(part.get("started"))) for part in self.parts]
        starts = [(step if isinstance(step, int) else 0, start) for step, start in begun]
        total = 0.0
        for number, (step, start) in enumerate(starts):
            until = starts[number + 1][0] if number + 1 < len(starts) else np.inf
            own = times[(steps > step) & (steps <= until)]
            if len(own):
                total += own[-1] - min(start if start is not None else own[0], own[0])
        return total

    def repeat(self) -> str | None:
        """The command that makes the run anew, as typed in a checkout."""
        if not self.command:
            return None
        if re.search(r"(?:^|[/\\])train[/\\]\w+\.py$", self.command[0]):
            words = ["-m", f"train.{self.verb}", *self.command[1:]]
        elif self.verb and self.recipe and self.changed is not None:
            # something else than `python -m` started it: the same settings by flags
            words = ["-m", f"train.{self.verb}", self.recipe]
            for name, (value, _) in self.changed.items():
                values = value if isinstance(value, list) else [value]
                words += [f"--{name.replace('_', '-')}", *map(_word, values)] if value is not None else []
        else:
            return shlex.join(self.command)
        return shlex.join([*self._starter, *words])

    @property
    def _starter(self) -> list[str]:
        processes = self.record.get("processes")
        if not isinstance(processes, list) or not processes:
            return ["python"]
        hosts = len({_mapping(process).get("host") for process in processes})
        nodes = ["--nnodes", str(hosts)] if hosts > 1 else []
        return ["torchrun", *nodes, "--nproc-per-node", str(len(processes) // hosts)]


def is_run(path: Path) -> bool:
    """Whether the folder is a run's or holds results."""
    return any((path / name).is_file() for name in ("config.json", "result.json", "protocol.json"))


def read_run(path: Path) -> FoundRun:
    """A run folder. ValueError for a folder that is none, and for a damaged record."""
    check(not path.is_file(), f"{path} is a file: give the folder of the run")
    check(path.is_dir(), f"{path}: there is no such folder")
    if not is_run(path):
        inside = sorted(child.name for child in path.iterdir() if child.is_dir() and is_run(child))
        hint = f"; runs in it: {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}" if inside else ""
        raise ValueError(f"{path} is no run: it has neither a config.json nor a result.json{hint}")
    config, result, protocol = (_read_json(path / name) for name in ("config.json", "result.json", "protocol.json"))
    if config is not None:
        # an exported model has a config.json, too
        check(isinstance(config.get("config"), dict), f"{path}/config.json is not that of a run")
    record = config or {**(protocol or {}), **(result or {})}
    return FoundRun(
        path,
        record,
        result,
        read_series(path / "metrics.jsonl"),
        read_series(path / "evaluations.jsonl"),
        tuple(chain.from_iterable(_read_entries(file) for file in sorted(path.glob("skipped*.jsonl")))),
        tuple(_read_entries(path / "nonfinite.jsonl")),
        tuple(sorted((path / "samples").glob("*.png"))),
    )


def newest_run(runs: Path) -> Path:
    """Of a folder of them, the one that was written to last. ValueError where there is none."""
    there = [path for path in runs.iterdir() if path.is_dir() and is_run(path)] if runs.is_dir() else []
    check(len(there) > 0, f"there is no run in {runs}/: give the folder of one")
    names = ("metrics.jsonl", "result.json", "config.json", "protocol.json")

    def written(path: Path) -> float:
        return max(file.stat().st_mtime for name in names if (file := path / name).exists())

    return max(there, key=written)


def read_series(path: Path) -> Series:
    """Numbers of a file of JSON lines, each with a `step`; empty where there is no file."""
    chunks: list[tuple[int, dict[str, np.ndarray]]] = []
    damaged, is_torn = 0, False
    if path.exists():
        with path.open("rb") as file:
            while lines := file.readlines(_CHUNK):
                if not lines[-1].endswith(b"\n"):
                    # a kill can leave half a line at the end, or it is being written
                    is_torn = True
                    lines.pop()
                rows = _parse(lines)
                damaged += len(lines) - len(rows)
                names = dict.fromkeys(chain.from_iterable(rows))
                chunks.append((len(rows), {name: _column([row.get(name) for row in rows]) for name in names}))
    names = dict.fromkeys(chain.from_iterable(columns for _, columns in chunks))
    values = {
        name: np.concatenate([columns.get(name, np.full(count, np.nan)) for count, columns in chunks]) for name in names
    }
    steps = values.pop("step", np.empty(0))
    order = np.flatnonzero(np.isfinite(steps))
    damaged += len(steps) - len(order)
    if np.any(np.diff(steps[order]) < 0):
        order = order[np.argsort(steps[order], kind="stable")]
    return Series(steps[order], {name: column[order] for name, column in values.items()}, damaged, is_torn)


def _parse(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Those that are JSON objects."""
    try:
        # all at once is several times faster
        rows = json.loads(b"[" + b",".join(lines) + b"]")
        if len(rows) == len(lines) and all(type(row) is dict for row in rows):
            return rows
    except ValueError:
        pass
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _column(values: list[Any]) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        # one damaged line takes no other with it
        return np.array([_number(value) for value in values])


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def _read_entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return _parse([line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")])


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    check(isinstance(found, dict), f"{path} is damaged: it holds no object")
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _epoch(text: Any) -> float | None:
    try:
        # the zone is that of the run's machine
        return datetime.strptime(str(text), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def seconds_text(seconds: float) -> str:
    """`42 s`, `5 min 10 s`, `3 h 12 min`, `2 days 5 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    days = whole // 86400
    return f"{days} {'day' if days == 1 else 'days'} {whole % 86400 // 3600} h"
