"""Which kernels a step of ours spends its time in, by torch.profiler: one step kernel by kernel, one as a graph.

    python -m bench.step_profile profile.md --size vit_base --clips 64

A process of its own: once a profiler has looked at the device, starting kernels may cost more for as long as a process
lives.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu_steps import COMPARED
from bench.page import table
from bench.shapes import shape_of
from bench.steps import our_step
from train.engine import EngineName
from videomae.command_line import Parser, run_main
from videomae.model import SIZES

TOP = 40
# kernels of these names, the first that fits; ours go by the op that started them, which a graph does not tell
KINDS = (
    ("attention", r"flash|fmha|sdpa|attention|cudnn.*(fprop|bprop|mha)"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitk"),
    ("ours", r"videomae::|^_\w+_kernel"),
    ("optimiser", r"adam|multi_tensor"),
    ("copies and fills", r"memcpy|memset|copy"),
)

# kernel -> [starts, microseconds]
Kernels = dict[str, list[float]]


def profiled(run: Callable[[], Any], device: torch.device) -> list[Any]:
    """The events of one call, which should have run before."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return list(profiler.events())


def kernels_of(events: Iterable[Any]) -> Kernels:
    """Starts and time of the device's kernels, longest first; with the op that started each, where nearly all have
    one: Triton's kernels share few names."""
    alone: Kernels = defaultdict(lambda: [0, 0.0])
    by_op: Kernels = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if not getattr(event, "is_user_annotation", False):
                _add(alone[event.name], event.time_range.elapsed_us())
            continue
        for kernel in event.kernels:
            _add(by_op[f"{event.name}: {kernel.name}"], kernel.duration)
    known, total = (sum(us for _, us in some.values()) for some in (by_op, alone))
    chosen = by_op if known >= 0.9 * total else alone
    return dict(sorted(chosen.items(), key=lambda item: -item[1][1]))


def _add(row: list[float], microseconds: float) -> None:
    row[0] += 1
    row[1] += microseconds


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.I)), "others")


def page(title: str, kernels: Kernels, clips: int) -> list[str]:
    """Lines: the step's kinds of kernels, then its longest kernels."""
    total = sum(us for _, us in kernels.values())
    if not total:
        return [f"## {title}", "", "No kernel ran on a device.", ""]
    kinds: Kernels = defaultdict(lambda: [0, 0.0])
    for name, (starts, us) in kernels.items():
        row = kinds[kind_of(name)]
        row[0], row[1] = row[0] + starts, row[1] + us

    def cells(some: Iterable[tuple[str, list[float]]]) -> list[tuple[str, ...]]:
        return [(n, f"{c:.0f}", f"{us:.0f}", f"{us / clips:.2f}", f"{us / total:.1%}") for n, (c, us) in some]

    head = "starts|us|us a clip|share"
    rows = cells((f"`{_short(name)}`", row) for name, row in list(kernels.items())[:TOP])
    lines = [f"## {title}", "", f"{total / 1e3:.2f} ms of kernels for {clips} clips.", ""]
    lines += table(f"kind|{head}", cells(sorted(kinds.items(), key=lambda item: -item[1][1])), " rrrr")
    return [*lines, "", *table(f"kernel|{head}", rows, " rrrr"), ""]


def _short(name: str, most: int = 150) -> str:
    return name if len(name) <= most else name[:most] + "..."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m bench.step_profile", (__doc__ or "").strip())
    parser.add_argument("out", metavar="OUT", type=Path, help="the page, in Markdown")
    parser.add_argument("--size", choices=tuple(SIZES), default="vit_base", help="of the model (vit_base)")
    parser.add_argument("--clips", type=int, default=64, help="of a step (64)")
    engines = ["eager", "graph"]
    parser.add_argument("--engines", nargs="+", choices=get_args(EngineName), default=engines, help="(eager graph)")
    parser.add_argument("--attention", default="auto", help="the back end (auto)")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.step_profile needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    device, shape = torch.device("cuda"), shape_of(given.size, given.clips)
    lines = [f"# Kernels of one training step of {given.size}", "", "Written by `python -m bench.step_profile`.", ""]
    for engine in given.engines:
        step = our_step(shape, device, torch.bfloat16, engine=engine, attention=given.attention)
        for _ in range(COMPARED):
            step.run()
        torch.cuda.synchronize(device)
        lines += page(f"Engine {engine}", kernels_of(profiled(step.run, device)), given.clips)
        given.out.write_text("\n".join(lines))
        del step
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    run_main(main)
