"""All that is measured on a GPU, in one command, which begins nothing new after eight minutes.

    python -m bench.gpu                                  # everything, into bench/results/<gpu>/
    python -m bench.gpu --only ceilings,attention --out /tmp/attention
    python -m bench.gpu --sizes vit_large --minutes 4

The kernel tests, the two ceilings, then every op at ViT-B and ViT-L. Writes ops.md, ops.json, environment.json and
tests.log, again after every section: one that fails is recorded and the next goes on, and those for which no time is
left are named. Exits with 0 when everything was done, 1 when something failed or was skipped, 2 without a GPU.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from bench import (
    bench_attention,
    bench_bias_gelu,
    bench_cube_embed,
    bench_decoder_input,
    bench_layer_norm,
    bench_pixel_loss,
)
from bench.compare import Setting
from bench.pairs import SIZES
from bench.report import Ceilings, Report, Section, goals
from bench.shapes import Shape, shape_of
from bench.timing import measure
from kernels.tiles import table_hash
from videomae.model import SIZES as KNOWN_SIZES

ROOT = Path(__file__).resolve().parent.parent
OPS = {
    "attention": bench_attention.rows,
    "cube_embed": bench_cube_embed.rows,
    "pixel_loss": bench_pixel_loss.rows,
    "layer_norm": bench_layer_norm.rows,
    "bias_gelu": bench_bias_gelu.rows,
    "decoder_input": bench_decoder_input.rows,
}
GROUPS = {"tests": ("tests",), "ceilings": ("ceilings",), "ops": tuple(OPS)}
# of the time there is, what the tests may take
TESTS_SHARE = 0.4
TESTS = ("tests/kernels", "tests/videomae/test_model_on_kernels.py")


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to compare figures; a value that cannot be had is None."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "gpu": properties.name if properties else platform.processor() or platform.machine(),
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "processors": properties.multi_processor_count if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "tiles": table_hash(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def run_tests(folder: Path, seconds: float, targets: Sequence[str] = TESTS) -> None:
    """RuntimeError with the last line of pytest's when they are not green in that time; all it said is in tests.log."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tests.log"
    command = [sys.executable, "-m", "pytest", *targets, "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):  # compiling takes longer than running
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    with path.open("w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the tests were not done after {seconds:.0f} seconds; see tests.log") from error
    said = path.read_text().strip().splitlines()
    if code != 0:
        raise RuntimeError(f"pytest exited with {code}: {said[-1] if said else 'no output'}; see tests.log")


def measure_ceilings(device: torch.device, *, copy_bytes: int = 2**31, side: int = 8192) -> Ceilings:
    """Of random data: equal numbers multiply faster than a kernel's inputs will."""
    source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=device)
    copied = measure([(torch.empty_like(source), source)], lambda pair: pair[0].copy_(pair[1]), device=device)
    del source
    pair = [torch.randn(side, side, device=device).bfloat16() for _ in range(2)]
    product = measure([pair], lambda ab: ab[0] @ ab[1], device=device)
    return Ceilings(2 * copy_bytes / copied.median * 1e6, 2 * side**3 / product.median * 1e6, copied, product)


def sections(
    names: Sequence[str], report: Report, folder: Path, shapes: Sequence[Shape], setting: Setting, minutes: float
) -> dict[str, Callable[[], Any]]:
    """What to call, in order, by section name; what they find goes into the report."""

    def ceilings() -> None:
        report.ceilings = measure_ceilings(setting.device)

    def op(name: str, shape: Shape) -> None:
        found = OPS[name](shape, setting)
        report.results += found
        failed = [
            f"{r.contender} {r.shape} {r.part}: {r.failure}" for r in found if r.contender == "ours" and r.failure
        ]
        if failed:
            raise RuntimeError("; ".join(failed))

    planned: dict[str, Callable[[], Any]] = {}
    if "tests" in names:
        planned["tests"] = partial(run_tests, folder, minutes * 60 * TESTS_SHARE)
    if "ceilings" in names:
        planned["ceilings"] = ceilings
    for name in OPS:
        planned |= {f"{name} {s.size}": partial(op, name, s) for s in shapes if name in names}
    return planned


def run_sections(planned: dict[str, Callable[[], Any]], report: Report, folder: Path, minutes: float) -> None:
    """Each on its own: a failure is recorded, and what has not begun in time is skipped."""
    begin = time.perf_counter()
    for name, section in planned.items():
        start = time.perf_counter()
        if start - begin > minutes * 60:
            report.sections.append(Section(name, "skipped", detail=f"{minutes:g} minutes were over"))
        else:
            print(f"{start - begin:6.1f} s  {name}", flush=True)
            try:
                section()
                status, detail = "done", ""
            except Exception:  # recorded: one op that fails must not cost the others their figures
                status, detail = "failed", traceback.format_exc()
                print(detail, flush=True)
            report.sections.append(Section(name, status, time.perf_counter() - start, detail))
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        report.write(folder)


def _chosen(only: str) -> list[str]:
    """Sections and ops that a comma-separated list names; ValueError for any other name."""
    names: list[str] = []
    for name in only.split(","):
        if name not in GROUPS and name not in OPS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join((*GROUPS, *OPS))}")
        names += GROUPS.get(name, (name,))
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_chosen, default=_chosen(",".join(GROUPS)), metavar="tests,ceilings,ops,<op>")
    parser.add_argument("--sizes", nargs="+", choices=tuple(KNOWN_SIZES), default=SIZES)
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins later")
    parser.add_argument("--out", type=Path, help="folder; bench/results/<gpu> if not given")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing would run on the GPU")
    setting = Setting.gpu()
    report = Report(environment(setting.device))
    folder = given.out or ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "_", report.environment["gpu"].lower())
    shapes = [shape_of(size) for size in given.sizes]
    run_sections(sections(given.only, report, folder, shapes, setting, given.minutes), report, folder, given.minutes)
    for goal in goals(report.results, report.ceilings):
        print(f"{ {True: 'met', False: 'NOT MET', None: 'not decided'}[goal.met]:<12}{goal.where}: {goal.measured}")
    undone = [f"{s.name} {s.status}" for s in report.sections if s.status != "done"]
    print(f"{folder}: {json.dumps(undone)} not done" if undone else f"{folder}: all done")
    return 1 if undone else 0


if __name__ == "__main__":
    sys.exit(main())
