"""How long a GPU takes at least to start a kernel's instructions, from the machine code: beside memory bandwidth the
other limit of a kernel without matrix products."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from math import inf, prod
from pathlib import Path
from typing import Any

import torch

from kernels.aot.specialise import TOOLS, build, specialise
from kernels.launch import recording
from kernels.tiles import target_of

# each of a multiprocessor's four schedulers starts one instruction of a warp in a cycle
STARTS_PER_CYCLE = 4
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ )?\s*([\w.]+)(.*)")


@lru_cache
def clock_hertz() -> float:
    """The multiprocessors' highest clock."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(out.splitlines()[0]) * 1e6


def issue_microseconds(run: Callable[[], Any], device: torch.device) -> float:
    """For the kernels that run starts: instructions of all warps over what the GPU can start. Tight for a kernel
    without a loop; of one with a loop, a small part."""
    with recording() as launches:
        run()
    target = target_of(device)
    total = 0
    for one in launches:
        count = straight_count(_disassembly(build(specialise(one), target.capability).cubin))
        total += count * prod(one.grid) * one.options.get("num_warps", 4)
    return total / (STARTS_PER_CYCLE * target.processors * clock_hertz()) * 1e6


def _disassembly(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout


def straight_count(code: str) -> int:
    """Instructions of a warp on the shortest way from the top of nvdisasm's listing to an unconditional exit, loops not
    repeated: never more than run."""
    labels: dict[str, int] = {}
    steps: list[tuple[str, str | None, bool]] = []  # instruction, where it may jump, whether the next one may follow
    for line in code.splitlines():
        if line.startswith("."):
            labels[line.split(":")[0]] = len(steps)
        found = INSTRUCTION.match(line)
        if found:
            predicate, name, rest = found.groups()
            goal = re.search(r"`\(([^)]+)\)", rest) if name.startswith("BRA") else None
            always = predicate is None and ".DIV" not in name and not (goal and re.search(r"\bU?P\d+,", rest))
            steps.append((name, goal.group(1) if goal else None, not (always and (goal or name == "EXIT"))))
    exits = [i for i, (name, _, follows) in enumerate(steps) if name == "EXIT" and not follows]
    shortest: dict[int, float] = {}
    for i in range(exits[-1], -1, -1):
        name, goal, follows = steps[i]
        ways = [shortest.get(i + 1, inf)] if follows else [0 if name == "EXIT" else inf]
        if goal is not None and labels[goal] > i:
            ways.append(shortest.get(labels[goal], inf))
        shortest[i] = (name != "NOP") + min(ways)
    return int(shortest[0])
