"""The page of whole training steps: every side beside ours, memory, decoder depths, parts, the first step."""

from collections.abc import Iterable
from typing import Any

from bench.page import Ceilings, Section, ceiling_lines, environment_line, goal_table, section_lines, table
from bench.step_goals import difference, fastest, slope, step_goals
from bench.step_results import (
    FLOP_PER_MAC,
    MOST_CLIPS,
    SHARE,
    TOGETHER,
    FirstStep,
    PartTimes,
    StepReport,
    StepResult,
    stated_gmac,
)

GIGA = 1e9
PICTURE = "step_parts.png"
INTRO = """Written by `python -m bench.gpu`. A step: forward, loss, backward, gradient norm (ours), AdamW, of
16 x 224 x 224 clips under a 90 % tube mask, the batch on the GPU from the start. All sides have the same weights, batch
and number of clips: the largest power of two, at most {most}, with which {together:g} times what `train.memory`
estimates for our own step fits into {share:.0%} of the free memory, halved as long as a rival does not fit. A side
whose first loss is wrong, or that fails, gets no time. Sides of one group are timed in turn, several steps at a time,
between CUDA events: median and quartiles.

- Of the matrix rate: {flop} times the stated forward multiply-adds of our model, for every side, over the measured rate
  of a large bfloat16 matrix product.
- Times our fastest: this side's time over that of our fastest in the same group.
- Peak: of a step beside nothing else, with weights, optimiser and batch. Reserved: what the allocator took from the GPU
  for the side by the time it stood ready.
- Losses: of the first step and of the last of {compared}, all on one batch, and how far off the first side's."""


def markdown(steps: StepReport, ceilings: Ceilings | None, sections: list[Section], environment: dict[str, Any]) -> str:
    """step.md."""
    lines = [f"# A training step on {environment.get('gpu', 'an unknown device')}", ""]
    lines += _intro(steps).split("\n")
    lines += ["", environment_line(environment), "", "## Goals", "", *goal_table(step_goals(steps, ceilings))]
    lines += ["", "## Ceilings", "", *ceiling_lines(ceilings)]
    for size in steps.sizes:
        for group in ("step", "compiled"):
            if found := steps.group(size, group):
                name = f"{size}, {stated_gmac(size):.1f} GMAC" + (", beside torch.compile" if group != "step" else "")
                lines += ["", f"## {name}", "", *_side_table(found, ceilings)]
    lines += [f"\n{note}" for note in steps.notes]
    for p in steps.parts:
        lines += ["", f"## {p.size} by part", "", *_part_lines(p)]
    for size in steps.sizes:
        if found := steps.group(size, "memory"):
            lines += ["", f"## {size}: what backward computes anew", "", *_memory_table(found)]
        if steps.group(size, "depth"):
            lines += ["", f"## {size}: decoder depth", "", *_depth_lines(steps, size)]
    if steps.first_steps:
        lines += ["", "## From the start of Python to the first step", "", *_first_lines(steps.first_steps)]
    lines += ["", "## Sections", "", *section_lines(sections)]
    return "\n".join(lines) + "\n"


def _intro(steps: StepReport) -> str:
    compared = max((len(r.losses) for r in steps.results.values()), default=0)
    return INTRO.format(most=MOST_CLIPS, together=TOGETHER, share=SHARE, flop=FLOP_PER_MAC, compared=compared)


def _side_table(results: dict[str, StepResult], ceilings: Ceilings | None) -> list[str]:
    best = fastest(results.values())
    reference = next((r.losses for r in results.values() if r.losses), ())
    rows = []
    for r in results.values():
        cells = [r.side, r.clips, *_rate_cells(r, best, ceilings), _gigabytes(r.peak_bytes)]
        cells += [_gigabytes(r.reserved_bytes), *_loss_cells(r, reference), r.failure]
        rows.append(cells)
    head = "side|clips|clips/s|of the matrix rate|ms a step|quartiles|times our fastest"
    head += "|peak GB|reserved GB|first loss|off by|last loss|off by|failure"
    return table(head, rows, " rrrrrrrrrrrr")


def _rate_cells(r: StepResult, best: StepResult | None, ceilings: Ceilings | None) -> list[str]:
    if r.timing is None:
        return [""] * 5
    t, share = r.timing, r.utilisation(ceilings) if ceilings else None
    times = f"{t.median / best.timing.median:.2f}" if best and best.timing else ""
    quartiles = f"{t.low / 1e3:.2f} to {t.high / 1e3:.2f}"
    return [
        f"{r.clips_per_second:,.0f}", "" if share is None else f"{share:.1%}", f"{t.median / 1e3:.2f}", quartiles, times
    ]  # fmt: skip


def _loss_cells(r: StepResult, reference: tuple[float, ...]) -> list[str]:
    if not r.losses:
        return [""] * 4
    first, last = difference(r.losses[:1], reference), difference(r.losses[-1:], reference[-1:])
    return [f"{r.losses[0]:.5f}", f"{first:.1e}", f"{r.losses[-1]:.5f}", f"{last:.1e}"]


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / GIGA:.2f}"


def _part_lines(p: PartTimes) -> list[str]:
    rows = []
    total = sum(sum(t.values()) for t in p.measured.values())
    for part, times in sorted(p.measured.items(), key=lambda item: -sum(item[1].values())):
        took, floor = sum(times.values()), p.floors.get(part)
        gap = f"{took / floor:.2f}" if floor else ""
        both = (f"{times.get(way, 0):.1f}" for way in ("forward", "backward"))
        rows.append((part, *both, f"{took:.1f}", f"{took / total:.0%}", _or_blank(floor), gap))
    floors = sum(p.floors.values()) or None
    gap = f"{total / floors:.2f}" if floors else ""
    rows.append(("all", "", "", f"{total:.1f}", "", _or_blank(floors), gap))
    head = "part|forward us|backward us|both|share|floor us|times the floor"
    return [
        f"Ours kernel by kernel, {p.clips} clips, microseconds a clip. Every start lies in the queue before the step "
        "begins, so that",
        "no time of Python's is in it. Floor: for every op the longer of its counted bytes and operations at the "
        "ceilings above",
        "(attention at 400 TFLOP/s), summed up: `bench/bench_traffic.py`.",
        "",
        *([f"![measured beside least time by part]({PICTURE})", ""] if p.floors else []),
        *table(head, rows, " rrrrrr"),
    ]


def _or_blank(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _memory_table(results: dict[str, StepResult]) -> list[str]:
    plain = next(iter(results.values())).timing
    rows = []
    for r in results.values():
        off = f"{r.estimated_bytes / r.peak_bytes - 1:+.1%}" if r.estimated_bytes and r.peak_bytes else ""
        cells = (r.side, r.clips, _gigabytes(r.peak_bytes), _gigabytes(r.estimated_bytes), off)
        time = (f"{r.timing.median / 1e3:.2f}", f"{r.timing.median / plain.median:.3f}") if r.timing and plain else ()
        rows.append((*cells, *(time or ("", "")), r.failure))
    return table("side|clips|peak GB|estimated GB|off by|ms a step|times the first|failure", rows, " rrrrrr")


def _depth_lines(steps: StepReport, size: str) -> list[str]:
    results = [r for r in steps.results.values() if (r.size, r.group) == (size, "depth")]
    rows = []
    for r in sorted(results, key=lambda r: (r.side, r.depth)):
        time = f"{r.timing.median / 1e3:.2f}" if r.timing else ""
        rows.append((r.side, r.depth, r.clips, _gigabytes(r.peak_bytes), time, r.failure))
    for side in dict.fromkeys(r.side for r in results):
        memory = slope(steps, size, side, lambda r: r.peak_bytes)
        time = slope(steps, size, side, lambda r: r.timing and r.timing.median)
        cells = ("" if memory is None else f"{memory / GIGA:.2f}", "" if time is None else f"{time / 1e3:.2f}")
        rows.append((side, "each more", "", *cells, ""))
    return table("side|decoder layers|clips|peak GB|ms a step|failure", rows, " rrrr")


def _first_lines(found: Iterable[FirstStep]) -> list[str]:
    rows = [
        (f.size, f.clips, f.engine, *(f"{s:.1f}" for s in (f.imported, f.built, f.first_step, f.second_step)))
        for f in found
    ]
    head = "size|clips|engine|imported, s|model and batch on the GPU|first step done|second step done"
    return ["Seconds since the process began; Triton's cache is empty.", "", *table(head, rows, " r rrrr")]
