"""Whole training steps measured beside each other: every engine of ours and every baseline, in one process, on the same
weights and batch, in turn.

A group of sides is built, checked and timed by a `Contest`: losses and memory are recorded before anything is timed,
and what one side does, failing or taking long, costs no other its figures. After a group nothing of it is left in
memory. The sections of `python -m bench.gpu` about steps are the functions below it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from bench.compare import Setting
from bench.meter import Meter
from bench.shapes import Shape
from bench.step_goals import SAME_LOSS
from bench.step_results import MOST_CLIPS, SHARE, TOGETHER, StepReport, StepResult
from bench.steps import DECODER_DEPTHS, Step, model_of, our_step, published_step, transformers_step
from bench.timing import summary
from train.memory import Workload, estimate, largest_micro_batch
from videomae.blocks import RECOMPUTE, Recompute
from videomae.masking import counts
from videomae.model import SIZES, VideoMAE

# every side's first steps, whose losses are kept; a graph is captured from the fourth
COMPARED = 8
# a turn: one step to fill the queue, then so many between events; median and quartiles are over ROUNDS * TIMED steps
TIMED, ROUNDS, FEWER_ROUNDS = 2, 10, 5
# seconds of a step beyond which a side would hold up the others
SLOWEST = 2.0
DEPTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Side:
    """build: (shape, device, weights=) -> Step. recompute: of our eager step, whose memory is estimated. tolerance: how
    far its first loss may be from the others', relatively."""

    build: Callable[..., Step]
    recompute: Recompute | None = None
    tolerance: float = SAME_LOSS


@dataclass
class Bench:
    """What all groups are measured with. save: writes down what the report has by now."""

    setting: Setting
    meter: Meter
    report: StepReport
    save: Callable[[], Any]
    attention: str = "auto"  # our back end, see videomae.attention
    slowest: float = SLOWEST

    @property
    def autocast(self) -> torch.dtype | None:
        return None if self.setting.dtype == torch.float32 else self.setting.dtype

    @property
    def ours(self) -> Callable[..., Step]:
        return partial(our_step, autocast=self.autocast, attention=self.attention)

    @property
    def published(self) -> Side:
        # float16, as it was published (RECIPES D.1)
        return Side(partial(published_step, autocast=torch.float16 if self.setting.device.type == "cuda" else None))

    def sides(self) -> dict[str, Side]:
        """Those of the group `step`: all that torch.compile has no part in."""
        theirs = partial(transformers_step, autocast=self.autocast)
        pure = partial(transformers_step, pure=torch.bfloat16)
        return {
            "ours, eager": Side(self.ours, "none"),
            "ours, graph": Side(partial(self.ours, engine="graph")),
            "ours, graph, norms anew": Side(partial(self.ours, engine="graph", recompute="norms")),
            "transformers": Side(theirs),
            # pixels of three digits: its target is another
            "transformers, bfloat16 weights": Side(pure, tolerance=3e-2),
            "published": self.published,
        }

    def compiled_sides(self) -> dict[str, Side]:
        """Those of the group `compiled`, among them two of the others, to compare with."""
        others = self.sides()
        compiled = partial(transformers_step, autocast=self.autocast, backend=self.setting.compile_backend)
        return {
            "ours, graph": others["ours, graph"],
            "transformers": others["transformers"],
            "ours, compile": Side(partial(self.ours, engine="compile")),
            "transformers, compiled": Side(compiled),
        }

    def clips(self, shape: Shape) -> int:
        """How many all sides get: see step_results.MOST_CLIPS; as many as they had room for where that is known."""
        known = self.report.clips.get(shape.size)
        if known:
            return known
        most = largest_micro_batch(_workload(shape), int(SHARE * self.meter.free() / TOGETHER), MOST_CLIPS)
        return 1 << max(most, 1).bit_length() - 1


def _workload(shape: Shape, decoder_depth: int | None = None, recompute: Recompute = "none") -> Workload:
    """What train.memory estimates."""
    with torch.device("meta"):
        model = model_of(shape, decoder_depth)
    num_parameters = sum(p.numel() for p in model.parameters())
    numbers = counts("tube", shape.grid, shape.ratio)
    return Workload(SIZES[shape.size], model.input, numbers, len(model.decoder.blocks), num_parameters, recompute)


@dataclass
class Contest:
    """A group of sides: built, checked and timed together. The results go into the report, failures included."""

    bench: Bench
    group: str
    shape: Shape
    sides: dict[str, Side]
    depth: int

    def run(self, rounds: int, *, all_must_fit: bool = False) -> str:
        """Build, check, time and release all sides. Returns the name of what did not fit into memory, or "".

        all_must_fit: stop there; else the others go on without it.
        """
        ready: dict[str, Step] = {}
        meter, full = self.bench.meter, ""
        try:
            full = self._build(ready, all_must_fit)
            if not (full and all_must_fit):
                self._drop_those_that_differ(ready)
                self.bench.save()
                full = self._time(ready, rounds) or full
        finally:
            self.bench.save()
            ready.clear()
            meter.clear()
        return full

    def _build(self, ready: dict[str, Step], all_must_fit: bool) -> str:
        torch.manual_seed(0)
        with self.bench.setting.device:
            weights = model_of(self.shape, self.depth)
        full = ""
        for name, side in self.sides.items():
            blank = StepResult(self.shape.size, self.group, name, self.shape.clips, self.depth)
            result, step, fits = _prepared(self.bench, blank, side, self.shape, weights)
            self.bench.report.add(result)
            if step is not None:
                ready[name] = step
            if not fits:
                full = name
                if all_must_fit:
                    break
        return full

    def _drop_those_that_differ(self, ready: dict[str, Step]) -> None:
        """A side whose first loss is another than the first side's is not timed."""
        first = next(iter(ready), "")
        for name in list(ready):
            loss, wanted = (self._result(side).losses[0] for side in (name, first))
            tolerance = self.sides[name].tolerance
            if not abs(loss - wanted) <= tolerance * abs(wanted):  # so that nan does not pass
                self._fail(name, f"losses differ: {loss:.6g}, {wanted:.6g} {first}; allowed {tolerance:g}")
                del ready[name]

    def _time(self, ready: dict[str, Step], rounds: int) -> str:
        """All in turn; returns "the allocator" when a step had to wait for memory that another side held, or ""."""
        meter = self.bench.meter
        failures: dict[str, str] = {}
        for name, seconds in turns(ready, meter, failures, rounds=1, timed=1).items():
            if seconds[0] > self.bench.slowest:
                failures[name] = f"{seconds[0]:.1f} s a step: it would hold up the others"
        going = {name: step for name, step in ready.items() if name not in failures}
        retries = meter.retries()
        for name, seconds in turns(going, meter, failures, rounds=rounds).items():
            timing = summary([s * 1e6 for s in seconds], meter.how)
            self.bench.report.add(replace(self._result(name), timing=timing))
        for name, failure in failures.items():
            self._fail(name, failure)
        return "the allocator" if meter.retries() > retries else ""

    def _result(self, name: str) -> StepResult:
        return self.bench.report.results[self.shape.size, self.group, name, self.depth]

    def _fail(self, name: str, failure: str) -> None:
        self.bench.report.add(replace(self._result(name), failure=failure))

    def failures(self) -> str:
        """Those of our sides, in a line."""
        results = (self.bench.report.results.get((self.shape.size, self.group, n, self.depth)) for n in self.sides)
        failed = [f"{r.side}, decoder depth {r.depth}: {r.failure}" for r in results if r and r.ours and r.failure]
        return "; ".join(failed)


def _prepared(
    bench: Bench, blank: StepResult, side: Side, shape: Shape, weights: VideoMAE
) -> tuple[StepResult, Step | None, bool]:
    """The side's first steps: their losses and memory, the step unless it failed, and whether it fits into memory."""
    meter = bench.meter
    meter.clear()
    before, reserved = meter.allocated(), meter.reserved()
    fits = True
    try:
        step = side.build(shape, bench.setting.device, weights=weights)
        losses = [step.run()]
        meter.wait()
        meter.restart_peak()  # from the second step on the optimiser has its state; a graph is captured later
        losses += [step.run() for _ in range(COMPARED - 1)]
        found = replace(blank, losses=tuple(torch.stack(losses).float().tolist()))
        if meter.has_memory:
            found = replace(found, peak_bytes=meter.peak() - before)
    except Exception as error:  # whatever a rival or a compiler raises: it goes into the report
        found, fits = replace(blank, failure=_reason(error)), not _is_for_want_of_memory(error)
    if found.failure:
        step = losses = None  # not inside except, where the traceback would hold their tensors
        meter.clear()
        return found, None, fits
    meter.clear()
    if meter.has_memory:
        found = replace(found, reserved_bytes=meter.reserved() - reserved)
    if side.recompute is not None:
        work = _workload(shape, blank.depth, side.recompute)
        work = replace(work, bytes_each=4 if bench.autocast is None else 2)
        found = replace(found, estimated_bytes=estimate(work, shape.clips).peak)
    return found, step, fits


def _is_for_want_of_memory(error: BaseException | None) -> bool:
    """Also where a capture or a compiler failed for it and raised something else."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def turns(
    steps: dict[str, Step], meter: Meter, failures: dict[str, str], *, rounds: int, timed: int = TIMED
) -> dict[str, list[float]]:
    """Seconds of every timed step of each side, which take turns so that a device's slow moments strike all alike; a
    side that fails is left out from then on, and its reason put into failures.

    A turn's first step is not timed: by its end Python is ahead of the device, or never gets ahead, as in a long run.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in list(samples):
            try:
                meter.wait()
                steps[name].run()
                marks = [meter.mark()]
                for _ in range(timed):
                    steps[name].run()
                    marks.append(meter.mark())
                samples[name] += [meter.seconds(*pair) for pair in pairwise(marks)]
            except Exception as error:  # recorded: the others go on
                failures[name] = _reason(error)
                del samples[name]
    return samples


def step(bench: Bench, shape: Shape) -> None:
    """Every side but the compiled ones; with half the clips, and half again, until all fit."""
    clips = bench.clips(shape)
    while True:
        contest = replace(_contest(bench, "step", shape, bench.sides()), shape=replace(shape, clips=clips))
        full = contest.run(ROUNDS, all_must_fit=True)
        if not full:
            break
        bench.report.notes.append(f"{shape.size}: {full} did not fit with {clips} clips.")
        if clips == 1:
            raise RuntimeError(f"{full} does not fit with a single clip")
        clips //= 2
    bench.report.clips[shape.size] = clips
    bench.save()
    if failed := contest.failures():
        raise RuntimeError(failed)


def compiled(bench: Bench, shape: Shape) -> None:
    """Ours and transformers by torch.compile, beside our graph and plain transformers."""
    try:
        _run([_contest(bench, "compiled", shape, bench.compiled_sides())], ROUNDS)
    finally:
        torch.compiler.reset()


def memory(bench: Bench, shape: Shape) -> None:
    """Our eager step with every kind of recomputation: its peak beside the estimate, and its time."""
    sides = {f"ours, eager, {name}": Side(partial(bench.ours, recompute=name), name) for name in RECOMPUTE}
    _run([_contest(bench, "memory", shape, sides)], FEWER_ROUNDS)


def depths(bench: Bench, shape: Shape) -> None:
    """Memory and time of ours and of the published way by the number of the decoder's layers: the paper's ablation."""
    sides = {"ours, graph": Side(partial(bench.ours, engine="graph")), "published": bench.published}
    _run([_contest(bench, "depth", shape, sides, depth) for depth in DEPTHS], FEWER_ROUNDS)


def _contest(bench: Bench, group: str, shape: Shape, sides: dict[str, Side], depth: int | None = None) -> Contest:
    shape = replace(shape, clips=bench.clips(shape))
    return Contest(bench, group, shape, sides, depth or DECODER_DEPTHS[shape.size])


def _run(contests: list[Contest], rounds: int) -> None:
    for contest in contests:
        if full := contest.run(rounds):
            note = f"{contest.shape.size}, {contest.group}, decoder depth {contest.depth}: {full} did not fit with"
            contest.bench.report.notes.append(f"{note} {contest.shape.clips} clips.")
            contest.bench.save()
    failed = "; ".join(filter(None, (contest.failures() for contest in contests)))
    if failed:
        raise RuntimeError(failed)
