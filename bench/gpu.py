"""All that is measured on a GPU, in one command, which begins nothing new after eight minutes.

    python -m bench.gpu                                  # everything, into bench/results/<gpu>/
    python -m bench.gpu --only ceilings,attention --out /tmp/attention
    python -m bench.gpu --only ceilings,steps --sizes vit_large --minutes 4
    python -m bench.gpu --only attention --keep-attention    # and let `--attention auto` go by it from now on

The kernel tests, the two ceilings, whole training steps beside their rivals (bench/gpu_steps.py), every op. What
matters most comes first: ViT-B's step, then the ops at ViT-B and ViT-L, then the other sizes' steps. A section says how
long it may take, and does not begin when that would end long after the time.

Writes ops.md and ops.json, step.md and step.json, step_parts.png, profile.md, parallel.md, attention.json (what
--keep-attention merges into videomae/attention.json), environment.json and tests.log, again after every section: one
that fails is recorded and the next goes on, and those for which no time is left are named. The pages are written anew
by every run that has something for them. Exits with 0 when everything was done, 1 when something failed or was skipped,
2 without a GPU.
"""

import argparse
import gc
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
from dataclasses import dataclass, replace
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
    bench_parallel,
    bench_pixel_loss,
    gpu_steps,
    plot_step,
    step_parts,
)
from bench.compare import Setting
from bench.first_step import first_step
from bench.gpu_steps import Bench
from bench.meter import meter_of
from bench.page import Ceilings, Section
from bench.pairs import SIZES
from bench.report import Report
from bench.shapes import Shape, shape_of
from bench.timing import measure
from kernels.tiles import table_hash, target_of
from videomae import attention
from videomae.command_line import Parser, run_main
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
STEPS = ("step", "parts", "profile", "compiled", "memory", "depth", "first_step", "parallel")
STEP_SIZES, COMPILED_SIZES = ("vit_base", "vit_large", "vit_small", "vit_huge"), ("vit_base", "vit_large")
GROUPS = {"tests": ("tests",), "ceilings": ("ceilings",), "steps": STEPS, "ops": tuple(OPS)}
PAGES = {"ops": ("tests", *OPS), "step": STEPS}
# seconds, of the section or of its first word; untested on a GPU, the reasons are in NOTES.md. Of the tests, the share
# of all time that they may take
EXPECTED = {"ceilings": 5, "step": 50, "parts": 20, "profile": 30, "compiled": 160, "compiled vit_large": 240}
EXPECTED |= {"memory": 25, "depth": 40, "first_step": 25, "parallel": 30} | dict.fromkeys(OPS, 25)
# how long after the time, in seconds, a section may be expected to end
OVERRUN = 90
# of the time there is, what the tests may take
TESTS_SHARE = 0.4
TESTS = ("tests/kernels", "tests/videomae/test_attention.py", "tests/videomae/test_model_on_kernels.py")
# of them, what compiles for GPUs that need not be there, and takes minutes
NOT_HERE = ("tests/kernels/test_aot.py", "tests/kernels/test_cmake.py", "tests/kernels/test_mutations.py")


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
    command = [sys.executable, "-m", "pytest", *targets, *(f"--ignore={path}" for path in NOT_HERE)]
    command += ["-q", "-p", "no:cacheprovider"]
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


@dataclass(frozen=True)
class Task:
    """A section: what to call, and the seconds that it is expected to take."""

    run: Callable[[], Any]
    seconds: float = 0.0


def order(op_sizes: Sequence[str], step_sizes: Sequence[str]) -> list[tuple[str, str]]:
    """Every section, with a size where it has one, what matters most first. The first of step_sizes is looked at from
    all sides."""
    first, second, others = step_sizes[:1], step_sizes[1:2], step_sizes[2:]
    found = [("tests", ""), ("ceilings", "")]
    found += [(name, s) for s in first for name in ("step", "parts", "profile", "compiled")]
    found += [(name, s) for name in OPS for s in op_sizes]
    found += [("step", s) for s in second]
    found += [(name, s) for s in first for name in ("parallel", "memory", "depth", "first_step")]
    found += [("step", s) for s in others] + [("compiled", s) for s in step_sizes[1:]]
    return [(name, s) for name, s in found if name != "compiled" or s in COMPILED_SIZES]


def sections(
    names: Sequence[str],
    report: Report,
    folder: Path,
    shapes: Sequence[Shape],
    setting: Setting,
    minutes: float,
    *,
    step_shapes: Sequence[Shape] = (),
    attention: str = "auto",
) -> dict[str, Task]:
    """What to do, in order, by section name; what is found goes into the report. shapes: of the ops. attention: our
    back end in steps."""
    bench = Bench(setting, meter_of(setting.device), report.steps, partial(report.write, folder), attention)

    def ceilings() -> None:
        report.ceilings = measure_ceilings(setting.device)

    def profile(shape: Shape) -> None:
        _run_profile(folder / "profile.md", shape.size, bench.clips(shape), bench.attention)

    def fresh(shape: Shape) -> None:
        report.steps.first_steps.append(first_step(shape.size, bench.clips(shape), bench.attention))

    def several(shape: Shape) -> None:
        bench_parallel.measure(replace(shape, clips=bench.clips(shape)), setting.device, folder)

    runs: dict[str, Callable[..., Any]] = {
        "tests": partial(run_tests, folder, minutes * 60 * TESTS_SHARE),
        "ceilings": ceilings,
        "step": partial(gpu_steps.step, bench),
        "parts": lambda shape: step_parts.parts(bench, shape, report.ceilings),
        "profile": profile,
        "compiled": partial(gpu_steps.compiled, bench),
        "memory": partial(gpu_steps.memory, bench),
        "depth": partial(gpu_steps.depths, bench),
        "first_step": fresh,
        "parallel": several,
        **{name: partial(_op, name, report, shapes, setting) for name in OPS},
    }
    expected = EXPECTED | {"tests": minutes * 60 * TESTS_SHARE}
    by_size = {s.size: s for s in (*step_shapes, *shapes)}
    planned = {}
    for name, size in order([s.size for s in shapes], [s.size for s in step_shapes]):
        if name in names:
            title = f"{name} {size}".strip()
            run = partial(runs[name], by_size[size]) if size else runs[name]
            planned[title] = Task(run, expected.get(title, expected[name]))
    return planned


def _op(name: str, report: Report, shapes: Sequence[Shape], setting: Setting, shape: Shape) -> None:
    found = OPS[name](shape, setting)
    report.results += found
    if name == "attention" and setting.device.type == "cuda":
        proposed = bench_attention.proposal(report.results, shapes)
        report.attention = {target_of(setting.device).key: proposed} if proposed else {}
    failed = [f"{r.contender} {r.shape} {r.part}: {r.failure}" for r in found if r.contender == "ours" and r.failure]
    if failed:
        raise RuntimeError("; ".join(failed))


def _run_profile(out: Path, size: str, clips: int, attention: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.step_profile", str(out.resolve()), "--size", size, "--clips", str(clips)]
    command += ["--attention", attention]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * EXPECTED["profile"])
    if done.returncode != 0:
        raise RuntimeError(f"bench.step_profile exited with {done.returncode}:\n{done.stderr[-2000:]}")


def run_sections(planned: dict[str, Task], report: Report, folder: Path, minutes: float) -> None:
    """Each on its own: a failure is recorded; what has not begun in time, or would end too long after it, is
    skipped."""
    begin = time.perf_counter()
    for name, task in planned.items():
        start = time.perf_counter()
        over = start - begin - minutes * 60
        if over > 0:
            report.sections.append(Section(name, "skipped", 0, f"{minutes:g} minutes were over", task.seconds))
        elif over + task.seconds > OVERRUN:
            detail = f"of {minutes:g} minutes {-over:.0f} s were left"
            report.sections.append(Section(name, "skipped", 0, detail, task.seconds))
        else:
            print(f"{start - begin:6.1f} s  {name}, expected to take {task.seconds:.0f} s", flush=True)
            try:
                task.run()
                status, detail = "done", ""
            except Exception:  # recorded: one op that fails must not cost the others their figures
                status, detail = "failed", traceback.format_exc()
                print(detail, flush=True)
            left = _left()
            report.sections.append(Section(name, status, time.perf_counter() - start, detail, task.seconds, left))
        report.write(folder)


def _left() -> int | None:
    """Bytes of tensors on the GPU, after all memory that nothing refers to was given back."""
    if not torch.cuda.is_initialized():
        return None
    gc.collect()
    try:
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    except RuntimeError:  # a kernel broke the device for this process: what was found must still be written
        return None


def keep_attention(report: Report) -> str:
    """Merge what was found into videomae/attention.json, unless that is nothing or half; says which."""
    if not report.attention:
        return "attention: nothing was timed, nothing kept"
    if any(s.status != "done" for s in report.sections if s.name.split()[0] in ("tests", "attention")):
        return "attention: not kept, as its section or the tests were not done"
    bench_attention.keep(report.attention, attention.TABLE)
    return f"attention: kept in {attention.TABLE}"


def _chosen(only: str) -> list[str]:
    """Sections and ops that a comma-separated list names; ValueError for any other name."""
    names: list[str] = []
    for name in only.split(","):
        if name not in (*GROUPS, *STEPS, *OPS):
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join((*GROUPS, *STEPS, *OPS))}")
        names += GROUPS.get(name, (name,))
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m bench.gpu", (__doc__ or "").strip())
    names = ",".join(GROUPS)
    parser.add_argument(
        "--only",
        type=_chosen,
        default=_chosen(names),
        help=f"of {names.replace(',', ', ')}, {', '.join((*STEPS, *OPS))}",
    )
    parser.add_argument("--sizes", nargs="+", choices=tuple(KNOWN_SIZES), help="of ops and steps, the main one first")
    parser.add_argument("--attention", default="auto", help="our back end in steps: auto, or one of videomae.attention")
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins later")
    parser.add_argument("--keep-attention", action="store_true", help="merge its times into videomae/attention.json")
    parser.add_argument("--out", type=Path, help="folder; bench/results/<gpu> if not given")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing would run on the GPU")
    torch.backends.cudnn.benchmark = True  # the rivals' convolutions by the fastest algorithm
    setting = Setting.gpu()
    report = Report(environment(setting.device))
    report.pages = tuple(page for page, of in PAGES.items() if not set(of).isdisjoint(given.only)) or ("ops",)
    folder = given.out or ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "_", report.environment["gpu"].lower())
    shapes, step_shapes = ([shape_of(s) for s in given.sizes or default] for default in (SIZES, STEP_SIZES))
    how = {"step_shapes": step_shapes, "attention": given.attention}
    planned = sections(given.only, report, folder, shapes, setting, given.minutes, **how)
    run_sections(planned, report, folder, given.minutes)
    for goal in report.goals():
        print(f"{ {True: 'met', False: 'NOT MET', None: 'not decided'}[goal.met]:<12}{goal.where}: {goal.measured}")
    if given.keep_attention:
        print(keep_attention(report))
    if report.steps.parts and importlib.util.find_spec("matplotlib"):
        plot_step.main([str(folder)])
    undone = [f"{s.name} {s.status}" for s in report.sections if s.status != "done"]
    print(f"{folder}: {json.dumps(undone)} not done" if undone else f"{folder}: all done")
    return 1 if undone else 0


if __name__ == "__main__":
    run_main(main)
