"""Our step's time by part, embedding, encoder, decoder, loss, optimiser, forward and backward, on the device itself,
beside what each part takes at least.

A mark is put into the device's queue wherever the next op belongs to another part (`bench.steps.Parts`). A graph is one
start and has no such places, so the step runs kernel by kernel; the device is kept busy while Python fills its queue,
so that what is measured are the kernels, back to back as in a graph, and not Python.
"""

import statistics
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_steps import COMPARED, Bench
from bench.meter import Meter
from bench.page import Ceilings
from bench.shapes import Shape
from bench.step_results import PartTimes
from bench.steps import Parts, Step, our_step

REPEATS = 7
# longer than Python takes to start a step's kernels, of which a queue holds a thousand
BUSY_SECONDS = 0.3


class Marks(TorchDispatchMode):
    """The parts and directions of a step in the order in which they came, each with a mark of its beginning."""

    def __init__(self, parts: Parts, meter: Meter) -> None:
        super().__init__()
        self.found: list[tuple[tuple[str, bool], Any]] = []
        self._parts, self._meter = parts, meter

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "profiler":
            self._parts.see(func, args)
            return func(*args, **kwargs or {})
        now = self._parts.now()
        if not self.found or self.found[-1][0] != now:
            self.found.append((now, self._meter.mark()))
        return func(*args, **kwargs or {})


def part_seconds(step: Step, meter: Meter, repeats: int = REPEATS) -> dict[tuple[str, bool], float]:
    """Seconds of every part of a step that ran before, forward and backward (True): medians."""
    samples: dict[tuple[str, bool], list[float]] = defaultdict(list)
    parts = Parts()
    with ExitStack() as hooks:
        for module, inside, after in step.parts:
            hooks.enter_context(parts.during(module, inside, after))
        for _ in range(repeats):
            parts.restart()
            meter.wait()
            meter.keep_busy(BUSY_SECONDS)
            with Marks(parts, meter) as marks:
                step.run()
            marks.found.append((("", False), meter.mark()))
            totals: dict[tuple[str, bool], float] = defaultdict(float)
            for (key, begin), (_, end) in pairwise(marks.found):
                totals[key] += meter.seconds(begin, end)
            for key, seconds in totals.items():
                samples[key].append(seconds)
    return {key: statistics.median(seconds) for key, seconds in samples.items()}


def parts(bench: Bench, shape: Shape, ceilings: Ceilings | None) -> None:
    """The section: measured first, and written down; then the floors, for which ops are counted."""
    shape = replace(shape, clips=bench.clips(shape))
    step = bench.ours(shape, bench.setting.device)
    for _ in range(COMPARED):
        step.run()
    measured: dict[str, dict[str, float]] = defaultdict(dict)
    for (part, backward), seconds in part_seconds(step, bench.meter).items():
        measured[_name(part)]["backward" if backward else "forward"] = seconds / shape.clips * 1e6
    del step
    found = PartTimes(shape.size, shape.clips, dict(measured))
    bench.report.parts = [p for p in bench.report.parts if p.size != shape.size] + [found]
    bench.meter.clear()
    bench.save()
    if ceilings is not None:
        bench.report.parts[-1] = replace(found, floors=floors(shape, bench.autocast, ceilings))


def floors(shape: Shape, autocast: torch.dtype | None, ceilings: Ceilings) -> dict[str, float]:
    """Microseconds a clip that each part takes at least."""
    from bench.bench_traffic import summary
    from bench.traffic import count

    traffic = count(partial(our_step, shape, torch.device("cpu"), autocast))
    by_part = summary(traffic, shape.clips, ceilings)["parts"]
    return {_name(part): row["floor_us_per_clip"] for part, row in by_part.items()}


def _name(part: str) -> str:
    """What a step of ours does before the embedding is to draw its masks."""
    return "masks" if part == "batch" else part
