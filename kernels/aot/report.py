"""Registers, spills, shared memory, tensor-core instructions and load widths of every specialisation.

python -m kernels.aot.report                                  # all, as a table
python -m kernels.aot.report --write                          # the same, kept in bench/results/kernels_aot.md
python -m kernels.aot.report --arch 90 --size vit_base --json
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from kernels.aot.catalogue import ARCHITECTURES, PUBLISHED, arch_option, specialisations
from kernels.aot.specialise import Built, build
from kernels.tiles import table_hash
from videomae.command_line import Parser, run_main

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "kernels_aot.md"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _build_some(
    architecture: int, sizes: tuple[str, ...], dtypes: tuple[str, ...], part: int, parts: int
) -> list[Built]:
    found = specialisations(architecture, sizes, tuple(DTYPES[d] for d in dtypes))
    return [build(s, architecture) for i, s in enumerate(found) if i % parts == part]


def build_all(architectures: tuple[int, ...], sizes: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Built]:
    """Everything, on as many processes as there are cores."""
    parts = os.cpu_count() or 1
    # kernels hold compiler state: fresh processes, not forks
    with ProcessPoolExecutor(parts, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_build_some, a, sizes, dtypes, i, parts) for a in architectures for i in range(parts)]
        built = [b for job in jobs for b in job.result()]
    return sorted(built, key=lambda b: (b.architecture, b.specialisation.name))


def markdown(built: list[Built]) -> str:
    """A table for each architecture."""
    lines = [
        "# Kernels compiled ahead of time",
        "",
        f"Triton {triton.__version__}, tiles {table_hash()}. Written by",
        "`python -m kernels.aot.report --write`; no GPU is needed.",
        "Spilled: bytes of a thread's stack. Loads: widths in bytes of one thread's loads from global memory.",
        f"Sizes {', '.join(PUBLISHED)}; 16x224x224 clips, tube masks of 75, 90 and 95 %.",
    ]
    for architecture in sorted({b.architecture for b in built}):
        rows = [b for b in built if b.architecture == architecture]
        lines += ["", f"## sm_{architecture}", ""]
        lines += ["| kernel | warps | registers | spilled | shared bytes | instructions | tensor cores | loads |"]
        lines += ["| --- | --: | --: | --: | --: | --: | --- | --- |"]
        for b in rows:
            cells = [b.specialisation.name, b.specialisation.num_warps, b.registers, b.stack_bytes, b.shared_bytes]
            found = [b.instructions, ", ".join(b.tensor_cores), " ".join(map(str, b.load_bytes))]
            lines.append("| " + " | ".join(map(str, cells + found)) + " |")
    return "\n".join(lines) + "\n"


def _record(b: Built) -> dict:
    fields = {k: v for k, v in asdict(b).items() if k not in ("specialisation", "cubin")}
    return {"name": b.specialisation.name, "num_warps": b.specialisation.num_warps, **fields}


def main() -> None:
    parser = Parser("python -m kernels.aot.report", (__doc__ or "").strip())
    parser.add_argument(
        "--arch", type=arch_option, nargs="+", default=ARCHITECTURES, help="compute capabilities: 80 90 100 120"
    )
    parser.add_argument("--size", nargs="+", choices=PUBLISHED, default=PUBLISHED, help="all if not given")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=("bf16",), help="bf16 if not given")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of the table")
    parser.add_argument("--write", action="store_true", help=f"also write {RESULTS.name}")
    arguments = parser.parse_args()
    built = build_all(tuple(arguments.arch), tuple(arguments.size), tuple(arguments.dtype))
    print(json.dumps([_record(b) for b in built]) if arguments.json else markdown(built))
    if arguments.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(markdown(built))


if __name__ == "__main__":
    run_main(main)
