"""Before the first step: how a recipe's batch becomes micro-batches that fit.

Also a command, which needs no GPU: what a recipe's step takes of one, for every kind of recomputation.

    python -m train.plan k400-huge-1600 --gpu-memory 80 --model.frames 32 --model.image-size 320
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.launch import check
from train.cli import parse, refuse
from train.detect_recipes import DetectConfig
from train.finetune_recipes import FinetuneConfig
from train.machine import SHARE, bytes_text
from train.memory import Workload, estimate, largest_micro_batch
from train.recipes import PRETRAIN, PretrainConfig, build
from videomae.blocks import RECOMPUTE
from videomae.masking import Counts
from videomae.model import size_of

PROG = "python -m train.plan"


@dataclass(frozen=True)
class BatchPlan:
    """clips = micro_batch * accumulation * processes; peak_bytes: of a step, estimated."""

    clips: int
    micro_batch: int  # clips on one device at a time
    peak_bytes: int
    fits: bool  # in the share of the free memory that a step may take
    processes: int = 1

    @property
    def accumulation(self) -> int:
        return self.clips // (self.micro_batch * self.processes)


def plan_batch(
    clips: int,
    work: Workload,
    *,
    budget: int,
    micro_batch: int | None = None,
    together: int = 1,
    processes: int = 1,
    at_most: int | None = None,
) -> BatchPlan:
    """The fewest micro-batches of equal size whose step takes at most budget bytes; the smallest possible if none does.

    micro_batch: asked for by hand; together: clips that must be in one micro-batch; processes: that share a step's
    clips equally; at_most: the largest micro-batch, where budget is not to decide. ValueError unless together divides
    micro_batch, and that each process's clips.
    """
    check(clips >= 1, f"batch size must be at least 1; got {clips}")
    check(
        clips % together == 0,
        f"a step's {clips} clips cannot be mixed in groups of {together}: --batch-size must be a multiple, or "
        "--mix.group another",
    )
    groups = f" in groups of {together}" if together > 1 else ""
    check(
        clips % (processes * together) == 0,
        f"a step's {clips} clips cannot be shared equally by {processes} processes{groups}: give another --batch-size",
    )
    own = clips // processes
    if micro_batch is None:
        whole = replace(work, accumulates=False)
        parts = replace(work, accumulates=True)
        sizes = [own // n for n in range(1, own // together + 1) if own % (n * together) == 0]
        fitting = (n for n in sizes if estimate(whole if n == own else parts, n).peak <= budget)
        wanted = fitting if at_most is None else (n for n in sizes if n <= at_most)
        micro_batch = next(wanted, together)
    among = "" if processes == 1 else f" in each of {processes} processes"
    check(
        micro_batch >= 1 and own % micro_batch == 0,
        f"micro-batch {micro_batch} does not divide a step's {own} clips{among}",
    )
    check(
        micro_batch % together == 0,
        f"micro-batch {micro_batch} would part the {together} clips that are mixed with each other",
    )
    peak = estimate(replace(work, accumulates=micro_batch < own), micro_batch).peak
    return BatchPlan(clips, micro_batch, peak, peak <= budget, processes)


def workload(config: PretrainConfig, num_parameters: int, precision: str, device_type: str = "cuda") -> Workload:
    """What a micro-batch of the run computes and holds."""
    model = config.model
    # on a GPU the next micro-batch arrives while one is in use, and graphs read theirs from a place of their own
    inputs_held = 1 if device_type == "cpu" else 3 if config.engine == "graph" else 2
    return Workload(
        size_of(model.size),
        model.input,
        config.counts,
        model.decoder_depth,
        num_parameters,
        model.recompute,
        bytes_each=4 if precision == "float32" else 2,
        short_last_layer=model.short_last_layer,
        inputs_held=inputs_held,
    )


def finetune_workload(
    config: FinetuneConfig, num_parameters: int, precision: str, device_type: str = "cuda"
) -> Workload:
    """What a micro-batch of a fine-tuning run computes and holds."""
    normalized = config.erasing.probability > 0
    work = _seen_whole(config, num_parameters, precision, device_type, copied=not normalized)
    graph = config.engine == "graph"
    return replace(work, normalized_held=normalized * (1 + graph), averages=config.ema is not None)


def detect_workload(config: DetectConfig, num_parameters: int, precision: str, device_type: str = "cuda") -> Workload:
    """What a micro-batch of a detection run computes and holds, but for what its boxes do: little."""
    return _seen_whole(config, num_parameters, precision, device_type, copied=True)


def _seen_whole(
    config: FinetuneConfig | DetectConfig, num_parameters: int, precision: str, device_type: str, *, copied: bool
) -> Workload:
    """Every cube is visible, nothing is predicted. copied: a graph is given the clips themselves."""
    model = config.model
    cubes = model.input.num_cubes
    # what arrives while one is in use; a graph has a place of its own for what the model is given
    waiting, graph = device_type != "cpu", config.engine == "graph"
    return Workload(
        size_of(model.size),
        model.input,
        Counts(visible=cubes, masked=0, decoded=0, predicted=0),
        0,
        num_parameters,
        model.recompute,
        bytes_each=4 if precision == "float32" else 2,
        inputs_held=1 + waiting + (graph and copied),
    )


def _table(work: Workload, clips: int, budget: int) -> list[str]:
    lines = ["recompute   1 clip      most clips   a step of this recipe"]
    for recompute in RECOMPUTE:
        one = replace(work, recompute=recompute)
        plan = plan_batch(clips, one, budget=budget)
        step = f"{plan.micro_batch} x {plan.accumulation}, {bytes_text(plan.peak_bytes)}" if plan.fits else "too large"
        most = largest_micro_batch(one, budget)
        lines.append(f"{recompute:<11} {bytes_text(estimate(one, 1).peak):<11} {most or '-':<12} {step}")
    return lines


def _gpu_memory(arguments: list[str]) -> tuple[list[str], float]:
    """The arguments without --gpu-memory, and its gigabytes."""
    memory = "80"
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--gpu-memory":
            memory = value if equals else "".join(arguments[i + 1 : i + 2])
            arguments = arguments[:i] + arguments[i + (1 if equals else 2) :]
            break
    try:
        size = float(memory)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        refuse(PROG, f"--gpu-memory takes a number of gigabytes; got {memory!r}")
    return arguments, size


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit code 2 for wrong use."""
    given, memory = _gpu_memory(list(sys.argv[1:] if arguments is None else arguments))
    about = "What a recipe's step takes of a GPU's memory (--gpu-memory GB, 80 if not given), estimated to within 15 %."
    config = parse(given, PRETRAIN, "k400-base-800", prog=PROG, about=about)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in build(config.model).parameters())
    precision = "bfloat16" if config.precision == "auto" else config.precision
    work, budget = workload(config, num_parameters, precision), int(memory * 1e9 * SHARE["cuda"])
    (height, width), counts = work.input.size, work.counts
    print(
        f"{config.recipe}: {config.model.size}, decoder depth {work.decoder_depth}, {num_parameters / 1e6:.1f} M "
        f"parameters, {work.input.frames} x {height} x {width}"
    )
    print(
        f"{counts.visible} of {work.input.num_cubes} cubes visible, {counts.visible + counts.decoded} tokens in the "
        f"decoder; {precision}; a step may take {budget / 1e9:.0f} of {memory:g} GB"
    )
    print("\n".join(["", *_table(work, config.clips_per_step, budget)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
