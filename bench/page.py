"""What every page of results is made of: sections of a run, ceilings, goals, tables."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.compare import Result
from bench.timing import Timing

DECIDED = {True: "yes", False: "no", None: "not decided"}


@dataclass(frozen=True)
class Section:
    """One part of the run: done, failed with a traceback, or skipped. expected: seconds, said beforehand; left: bytes
    that still lay on the GPU afterwards."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""
    expected: float = 0.0
    left: int | None = None


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second, read plus written, of a large copy; operations a second of a large bfloat16 matrix product."""

    copy: float
    matmul: float
    copy_timing: Timing
    matmul_timing: Timing

    def floor_us(self, r: Result) -> float:
        """What the result's counted work takes at least: the largest of bytes, operations and instructions."""
        bytes_us = (r.work.reads + r.work.writes) / self.copy * 1e6
        return max(bytes_us, r.work.flops / self.matmul * 1e6, r.issue_us or 0.0)


@dataclass(frozen=True)
class Goal:
    """A goal at one shape. met is None when something to decide it was not measured."""

    text: str
    where: str
    measured: str
    met: bool | None


def table(head: str, rows: Iterable[Iterable[Any]], aligned: str = "") -> list[str]:
    """Lines of a markdown table; aligned has an r for every column of numbers."""
    names = head.split("|")
    rule = ["--:" if i < len(aligned) and aligned[i] == "r" else "---" for i in range(len(names))]
    lines = [names, rule, *rows]
    return ["| " + " | ".join(str(c).strip().replace("|", "\\|") for c in line) + " |" for line in lines]


def goal_table(goals: Iterable[Goal]) -> list[str]:
    return table("goal|where|measured|met", [(g.text, g.where, g.measured, DECIDED[g.met]) for g in goals])


def environment_line(environment: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in environment.items()) + "."


def ceiling_lines(ceilings: Ceilings | None) -> list[str]:
    if ceilings is None:
        return ["Not measured."]
    rates = (("device copy, read and written", ceilings.copy / 1e9, "GB/s", ceilings.copy_timing),)
    rates += (("bfloat16 matrix product", ceilings.matmul / 1e12, "TFLOP/s", ceilings.matmul_timing),)
    cells = [(n, f"{v:.0f} {unit}", f"{t.median:.0f} ({t.low:.0f} to {t.high:.0f})", t.how) for n, v, unit, t in rates]
    return table("ceiling|rate|us|how", cells, " rr")


def section_lines(sections: list[Section]) -> list[str]:
    """A table of all, then what went wrong in those that were not done."""
    rows = []
    for s in sections:
        left = "" if s.left is None else f"{s.left / 1e9:.2f}"
        rows.append((s.name, s.status, f"{s.expected:.0f}", f"{s.seconds:.1f}", left))
    lines = table("section|status|seconds expected|seconds|GB left", rows, "  rrr")
    for s in sections:
        if s.detail:
            lines += ["", f"### {s.name}: {s.status}", "", "```", s.detail.rstrip(), "```"]
    return lines
