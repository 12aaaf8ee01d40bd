"""What a run says while it runs: the progress line, `metrics.jsonl`, TensorBoard, the steps that were not finite."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from kernels.launch import check
from train.arrivals import Arrivals
from train.waiting import LIMIT, Supply, advice
from videomae.data.loader import Effort
from videomae.wording import counted


@dataclass(frozen=True)
class Logging:
    """How often a run reports; steps."""

    every: int = 10  # a line of metrics.jsonl and of TensorBoard
    picture_every: int = 1000  # a reconstruction picture; there is always one at the end
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check(self.every >= 1, f"log.every must be at least 1; got {self.every}")
        check(self.picture_every >= 1, f"log.picture-every must be at least 1; got {self.picture_every}")


class TooManyNonFinite(Exception):
    """Loss or gradient was inf or nan for too many steps in a row."""


@dataclass
class _Step:
    step: int
    values: list[float]  # loss, gradient norm, 1.0 if skipped; once they have come
    lr: float
    clips: int
    skipped: int
    waited: Callable[[], float]  # seconds, for data; to be asked once values have arrived
    effort: Effort  # of the workers, for this step's clips
    ready: float  # finished batches that waited when this step's were taken
    paths: Sequence[str]


def say(text: str) -> None:
    """A line above the progress bar, where there is one; lost where stderr is a file on a full disk."""
    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def goes_on(what: str) -> Iterator[None]:
    """What is inside writes a file beside the training: a full disk is said, and no reason to end a run."""
    try:
        yield
    except OSError as error:
        say(f"warning: {what} could not be written: {error}; the run goes on")


class QuietLog:
    """Of a process that leaves reports to the first one; use it inside `with`."""

    def __enter__(self) -> "QuietLog":
        return self

    def __exit__(self, *_: object) -> None: ...

    def say(self, text: str) -> None:
        say(text)

    def push(self, step: int, values: Tensor, **_: object) -> None: ...

    def flush(self) -> None: ...


class RunLog(QuietLog):
    """One run's reports."""

    def __init__(
        self, out: Path, config: Logging, *, start: int, steps: int, max_nonfinite: int, supply: Supply
    ) -> None:
        """start: steps done before. supply: what decodes for the run, for advice when it waits for data."""
        self._config, self._out, self._steps, self._max_nonfinite = config, out, steps, max_nonfinite
        # the first report tells of workers that were still starting; after that, advice is given once
        self._supply, self._advise, self._reports = supply, True, 0
        self._pending: Arrivals[_Step] = Arrivals()
        self._in_a_row = 0
        forget_after(out / "metrics.jsonl", start)
        forget_after(out / "nonfinite.jsonl", start)
        forget_after(out / "evaluations.jsonl", start)
        self._skipped, self._nonfinite = (len(whole_lines(out / name)) for name in ("skipped.jsonl", "nonfinite.jsonl"))
        self._metrics, self._bad_steps, self._evaluations = (
            Lines(out / f"{name}.jsonl") for name in ("metrics", "nonfinite", "evaluations")
        )
        self._board = _open_board(out / "tensorboard", start) if config.tensorboard else None
        self._interactive = sys.stderr.isatty()
        # a terminal that does not tell its size, as in some containers, would show nothing
        columns, rows = shutil.get_terminal_size((120, 24))
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=not self._interactive,
            ncols=columns,
            nrows=rows,
            bar_format="{n_fmt}/{total_fmt} {bar:6} {remaining} left{postfix}",
        )
        self._begin_window()

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for lines in (self._metrics, self._bad_steps, self._evaluations):
            with goes_on("the end of a report"):
                lines.write()
        if self._board is not None:
            with goes_on("the end of tensorboard/"):
                self._board.close()

    def push(  # type: ignore[override]
        self,
        step: int,
        values: Tensor,
        *,
        lr: float,
        clips: int,
        skipped: int,
        waited: Callable[[], float],
        effort: Effort,
        ready: float,
        paths: Sequence[str],
    ) -> None:
        """Report a step, counted from 1. values: what the engine's update returned, still on the device. skipped: of
        this process's clips; values tell of all processes'. waited: seconds for data, asked for when the step is done;
        effort: what the workers spent on it; ready: finished batches behind it.

        Raises TooManyNonFinite when such steps reach their limit in a row.
        """
        done = _Step(step, [], lr, clips, skipped, waited, effort, ready, paths)
        self._bar.update()
        for come, found in self._pending.push(done, values):
            self._consume(come, found)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is not counted as the steps' time."""
        self.flush()
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    def evaluated(self, step: int, values: Mapping[str, float | int]) -> None:
        """Report what a look at the model gave, beside the steps: a line of evaluations.jsonl, and TensorBoard."""
        with goes_on("evaluations.jsonl"):
            self._evaluations.add({"step": step, **values})
        self._draw(values, step)

    def flush(self) -> None:
        """Wait for and write all that is pending."""
        for come, found in self._pending.drain():
            self._consume(come, found)

    def _begin_window(self) -> None:
        self._window: list[_Step] = []
        self._waited = 0.0
        self._since = time.monotonic()

    def _consume(self, done: _Step, values: list[float]) -> None:
        done.values = values
        loss, norm, nonfinite, *of_all = values
        self._waited += done.waited()
        self._skipped += int(of_all[0]) if of_all else done.skipped
        self._in_a_row = self._in_a_row + 1 if nonfinite else 0
        if nonfinite:
            self._nonfinite += 1
            entry = {"step": done.step, "loss": str(loss), "grad_norm": str(norm), "clips": list(done.paths)}
            with goes_on("nonfinite.jsonl"):
                self._bad_steps.add(entry)
        self._window.append(done)
        if done.step % self._config.every == 0 or done.step == self._steps:
            self._report(done)
        if self._in_a_row >= self._max_nonfinite:
            raise TooManyNonFinite(
                f"loss or gradient was not finite for {self._in_a_row} steps in a row, up to step {done.step}; "
                f"the weights are as they were before them. Their clips are in {self._out / 'nonfinite.jsonl'}; "
                "try a lower --optim.base-lr, --optim.clip-grad 1, or --precision float32"
            )

    def _report(self, done: _Step) -> None:
        elapsed = max(time.monotonic() - self._since, 1e-9)
        effort = reduce(Effort.plus, (s.effort for s in self._window))
        finite = [s.values for s in self._window if not s.values[2]]
        entry: dict[str, Any] = {
            "step": done.step,
            "loss": _mean([values[0] for values in finite]),
            "grad_norm": _mean([values[1] for values in finite]),
            "lr": done.lr,
            "clips_per_second": round(sum(s.clips for s in self._window) / elapsed, 2),
            "data_wait": round(min(self._waited / elapsed, 1.0), 4),
            "batches_ready": round(sum(s.ready for s in self._window) / len(self._window), 2),
            "decode_ms": round(1000 * effort.spent.total / effort.clips, 3) if effort.clips else None,
            "skipped_clips": self._skipped,
            "nonfinite_steps": self._nonfinite,
            "time": round(time.time(), 3),
        }
        with goes_on("metrics.jsonl"):
            self._metrics.add(entry)
        drawn = ("loss", "grad_norm", "lr", "clips_per_second", "data_wait", "batches_ready", "decode_ms")
        self._draw({name: entry[name] for name in drawn if entry[name] is not None}, done.step)
        self._show(entry)
        self._reports += 1
        if self._advise and self._reports > 1 and entry["data_wait"] > LIMIT and effort.clips:
            self._advise = False
            rate, wait = entry["clips_per_second"], entry["data_wait"]
            self.say(
                "data: " + advice(self._supply, waited=wait, clips_per_second=rate, effort=effort, elapsed=elapsed)
            )
        self._begin_window()

    def _draw(self, values: Mapping[str, float | int], step: int) -> None:
        if self._board is None:
            return
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:  # a board does not recover
            self.say(f"warning: tensorboard/ is not written any more: {error}")
            self._board = None

    def _show(self, entry: dict) -> None:
        text = (
            f"loss {_number(entry['loss'])}, lr {entry['lr']:.1e}, {entry['clips_per_second']:.0f} clips/s, "
            f"data wait {entry['data_wait']:.0%} ({entry['batches_ready']:.1f} ready"
        )
        # the workers' time for a video, all its views
        text += ")" if entry["decode_ms"] is None else f", {entry['decode_ms']:.1f} ms a video)"
        text += f", {counted(self._skipped, 'clip')} skipped" if self._skipped else ""
        text += f", {counted(self._nonfinite, 'step')} not finite" if self._nonfinite else ""
        if self._interactive:
            self._bar.set_postfix_str(text)
        else:
            left = self._bar_left(entry)
            self.say(f"step {entry['step']}/{self._steps}, {left} left, {text}")

    def _bar_left(self, entry: dict) -> str:
        clips_left = (self._steps - entry["step"]) * self._window[-1].clips
        return tqdm.format_interval(clips_left / max(entry["clips_per_second"], 1e-9))


class Lines:
    """A file that entries are added to, a line each; what a full disk does not take is kept for the next time."""

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, b""

    def add(self, *entries: Mapping[str, Any]) -> None:
        """Raises OSError; the entries are not lost."""
        self._left += b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        self.write()

    def write(self) -> None:
        """What is left. Raises OSError."""
        if not self._left:
            return
        with self._path.open("ab", buffering=0) as file:
            while self._left:
                # a disk that is nearly full takes a part of it
                self._left = self._left[file.write(self._left) :]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def whole_lines(path: Path) -> list[str]:
    """Of a file that lines are added to; none where there is no file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # a kill or a full disk can leave half a line at the end
    return [line for line in lines if line.endswith("\n")]


def forget_after(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will do again."""
    if path.exists():
        kept = [line for line in whole_lines(path) if json.loads(line)["step"] <= step]
        # a kill must not leave a part of it
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)


def _open_board(folder: Path, start: int):  # noqa: ANN202 - its import takes a second
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start + 1)
