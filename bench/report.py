"""What a run of `python -m bench.gpu` found, as json and as pages: rates, shares of the ceilings, goals met or not. The
ops' page is here, that of whole steps in bench/step_report.py."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import step_report
from bench.compare import Result
from bench.page import Ceilings, Goal, Section, ceiling_lines, environment_line, goal_table, section_lines, table
from bench.step_goals import step_goals
from bench.step_results import StepReport

MEMORY_BOUND = ("pixel_loss", "layer_norm", "bias_gelu", "decoder_input")
RIVALS = ("eager", "flash", "cudnn", "efficient", "math")
MEGA = 1e6


@dataclass
class Report:
    """pages: which of them are written, ops and step."""

    environment: dict[str, Any]
    sections: list[Section] = field(default_factory=list)
    ceilings: Ceilings | None = None
    results: list[Result] = field(default_factory=list)
    attention: dict[str, Any] = field(default_factory=dict)  # proposed for videomae/attention.json
    steps: StepReport = field(default_factory=StepReport)
    pages: tuple[str, ...] = ("ops",)

    def goals(self) -> list[Goal]:
        """Of ops and of steps."""
        return goals(self.results, self.ceilings) + step_goals(self.steps, self.ceilings)

    def write(self, folder: Path) -> None:
        """All that is known now."""
        folder.mkdir(parents=True, exist_ok=True)
        shared = {
            "sections": [asdict(s) for s in self.sections],
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
        }
        ops = {"results": [asdict(r) for r in self.results]}
        ops["goals"] = [asdict(g) for g in goals(self.results, self.ceilings)]
        steps = self.steps.raw() | {"goals": [asdict(g) for g in step_goals(self.steps, self.ceilings)]}
        pages = {"ops": (shared | ops, markdown), "step": (shared | steps, step_markdown)}
        (folder / "environment.json").write_text(json.dumps(self.environment, indent=1) + "\n")
        for name in self.pages:
            raw, page = pages[name]
            (folder / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
            (folder / f"{name}.md").write_text(page(self))
        if self.attention:
            (folder / "attention.json").write_text(json.dumps(self.attention, indent=1) + "\n")


def step_markdown(report: Report) -> str:
    """step.md."""
    return step_report.markdown(report.steps, report.ceilings, report.sections, report.environment)


def goals(results: list[Result], ceilings: Ceilings | None) -> list[Goal]:
    """Every goal at every shape that was measured."""
    ours = [r for r in results if r.contender == "ours"]
    found = [_bandwidth_goal(r, ceilings) for r in ours if r.op in MEMORY_BOUND]
    for r in ours:
        others = [o for o in results if (o.op, o.size, o.shape, o.part) == (r.op, r.size, r.shape, r.part)]
        eager = [o for o in others if o.contender == "eager"]
        if r.op == "cube_embed":
            found.append(_speed_goal(r, eager, 3.0, "than every cube convolved and gathered"))
            found.append(_scratch_goal(r, ours))
        if r.op == "pixel_loss":
            found.append(_speed_goal(r, eager, 6.0, "than by way of a float video"))
            found += [_memory_goal(r, o) for o in eager]
        if r.op == "attention" and r.part == "forward+backward":
            rivals = [o for o in others if o.contender in RIVALS]
            found.append(_speed_goal(r, rivals, 1.3, "than the fastest scaled_dot_product_attention"))
    return found


def _where(r: Result) -> str:
    return f"{r.op} {r.size}, {r.shape}, {r.part}"


def _bandwidth_goal(r: Result, ceilings: Ceilings | None) -> Goal:
    text = "85 % of the tighter of copy bandwidth and instruction starts"
    if ceilings is None or r.timing is None:
        return Goal(text, _where(r), r.failure or "not measured", None if ceilings is None else False)
    share = ceilings.floor_us(r) / r.timing.median
    moved = (r.work.reads + r.work.writes) / MEGA
    return Goal(text, _where(r), f"{share:.0%} ({moved:.1f} MB counted)", share >= 0.85)


def _speed_goal(r: Result, rivals: Iterable[Result], wanted: float, than: str) -> Goal:
    text = f"at least {wanted:g} times faster {than}"
    timed = [o for o in rivals if o.timing is not None]
    if r.timing is None or not timed:
        return Goal(text, _where(r), r.failure or "no rival was measured", False if r.failure else None)
    best = min(timed, key=lambda o: o.timing.median)
    ratio = best.timing.median / r.timing.median
    return Goal(text, _where(r), f"{ratio:.2f} times, beside {best.contender}", ratio >= wanted)


def _memory_goal(r: Result, rival: Result) -> Goal:
    text = "less than a fifth of the float video's peak memory"
    if r.peak_bytes is None or not rival.peak_bytes:
        return Goal(text, _where(r), "not measured", None)
    measured = f"{r.peak_bytes / MEGA:.1f} of {rival.peak_bytes / MEGA:.1f} MB"
    return Goal(text, _where(r), measured, r.peak_bytes < rival.peak_bytes / 5)


def _scratch_goal(r: Result, ours: list[Result]) -> Goal:
    text = "memory beside what it returns no more than its tokens take"
    forward = [o for o in ours if (o.op, o.size, o.shape, o.part) == (r.op, r.size, r.shape, "forward")]
    if r.peak_bytes is None or not forward:
        return Goal(text, _where(r), "not measured", None)
    scratch, tokens = r.peak_bytes - r.returned_bytes, forward[0].returned_bytes
    return Goal(text, _where(r), f"{scratch / MEGA:.1f} MB beside {tokens / MEGA:.1f} MB", scratch <= tokens)


def markdown(report: Report) -> str:
    """ops.md."""
    environment = report.environment
    lines = [f"# Ops on {environment.get('gpu', 'an unknown device')}", "", "Written by `python -m bench.gpu`.", ""]
    lines += [environment_line(environment), ""]
    tests = next((s.status for s in report.sections if s.name == "tests"), "not run")
    lines += [f"Kernel tests on this device: {tests}.", "", "## Goals", ""]
    lines += goal_table(goals(report.results, report.ceilings))
    lines += ["", "## Ceilings", "", *ceiling_lines(report.ceilings), "", "## Ops", ""]
    lines += ["Microseconds of one call: median and quartiles, from a replayed CUDA graph over inputs that do not fit"]
    lines += ["the cache. Bytes and operations are counted, as the bench's comments say. Share: of the time that the"]
    lines += [
        "tightest of bytes, operations and instruction starts (loops counted once) leaves possible. Ours is x times as"
    ]
    lines += ["fast as the contender. Peak: MB above the inputs, of it what the call returns. Error: relative, against"]
    lines += ["the reference in float32."]
    for op in dict.fromkeys(r.op for r in report.results):
        lines += ["", f"### {op}", "", *_op_table([r for r in report.results if r.op == op], report.ceilings)]
    lines += ["", "## Sections", "", *section_lines(report.sections)]
    return "\n".join(lines) + "\n"


def _op_table(results: list[Result], ceilings: Ceilings | None) -> list[str]:
    ours = {(r.size, r.shape, r.part): r.timing for r in results if r.contender == "ours"}
    rows = []
    for r in results:
        first = (r.size, r.shape, r.part, r.contender)
        if r.timing is None:
            rows.append((*first, *[""] * 9, r.failure))
            continue
        mine, t = ours.get((r.size, r.shape, r.part)), r.timing
        seconds = t.median * 1e-6
        rate = f"{r.work.flops / seconds / 1e12:.1f}" if r.work.flops else ""
        share = f"{ceilings.floor_us(r) / t.median:.0%}" if ceilings else ""
        peak = "" if r.peak_bytes is None else f"{r.peak_bytes / MEGA:.1f} ({r.returned_bytes / MEGA:.1f})"
        counted = (r.work.reads + r.work.writes) / MEGA
        cells = (f"{t.median:.1f}", f"{t.low:.1f} to {t.high:.1f}", f"{counted:.1f}", f"{counted / 1e3 / seconds:.0f}")
        cells += (
            rate,
            share,
            f"{t.median / mine.median:.2f}" if mine else "",
            peak,
            _or_blank(r.error, "{:.1e}".format),
        )
        limit = "" if r.issue_us is None else f"; starts take {r.issue_us:.1f} us or more"
        rows.append((*first, *cells, t.how + limit))
    head = "size|shape|part|contender|us|quartiles|MB counted|GB/s|TFLOP/s|share|x|peak MB|error|how"
    return table(head, rows, "    rrrrrrrrr")


def _or_blank(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)
