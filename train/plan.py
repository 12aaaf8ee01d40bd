"""Before the first step: how a recipe's batch becomes micro-batches that fit.

Also a command, which needs no GPU: what a recipe's step takes of one, for every kind of recomputation; or how a run
scales to many.

    python -m train.plan k400-huge-1600 --gpu-memory 80 --model.frames 32 --model.image-size 320
    python -m train.plan k400-base-800 --gpus 8 64 1024 --gpu h200 --cores 112
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.launch import check
from train.cli import parse, user_errors
from train.detect_recipes import DetectConfig
from train.engine import ParallelName, check_engine
from train.finetune_recipes import FinetuneConfig
from train.machine import SHARE, bytes_text
from train.memory import Workload, estimate, largest_micro_batch
from train.recipes import PRETRAIN, PretrainConfig, build
from train.scaling import clips_of_core, predict
from train.scaling_report import FLAGS, NAMES, Flags, Forecast, check_shared, report, take_flags
from videomae.blocks import RECOMPUTE
from videomae.command_line import run_main
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


def of_one_process(work: Workload, parallel: ParallelName, processes: int) -> Workload:
    """What a micro-batch holds in one of a run's processes."""
    return replace(work, spread_over=processes) if parallel == "fsdp" else work


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


def _recipe_lines(config: PretrainConfig, work: Workload, memory: float) -> list[str]:
    (height, width), counts = work.input.size, work.counts
    budget = _budget(memory)
    return [
        f"{config.recipe}: {config.model.size}, decoder depth {work.decoder_depth}, {work.num_parameters / 1e6:.1f} M "
        f"parameters, {work.input.frames} x {height} x {width}",
        f"{counts.visible} of {work.input.num_cubes} cubes visible, {counts.visible + counts.decoded} tokens in the "
        f"decoder; {_precision(config)}; a step may take {budget / 1e9:.0f} of {memory:g} GB",
        "",
        *_table(work, config.clips_per_step, budget),
    ]


def _budget(memory: float) -> int:
    return int(memory * 1e9 * SHARE["cuda"])


def _precision(config: PretrainConfig) -> str:
    return "bfloat16" if config.precision == "auto" else config.precision


def forecast(config: PretrainConfig, work: Workload, flags: Flags, gpus: int) -> Forecast:
    """The run on so many GPUs. ValueError where they cannot share its batch."""
    check_shared(config, gpus)
    cluster, parallel = flags.cluster(gpus), flags.parallel
    check(gpus > 1 or parallel == "ddp", "--parallel fsdp spreads weights over several GPUs; got --gpus 1")
    several = None if gpus == 1 else parallel
    check_engine(config.engine, torch.device("cuda"), config.model.recompute, parallel=several)
    check(
        config.precision != "float32" or flags.rate.clips_per_second is not None,
        "the peak of --gpu is that of bfloat16: with --precision float32 give --clips-per-second",
    )
    memory = cluster.gpu.memory if flags.memory is None else flags.memory
    budget, held = _budget(memory), of_one_process(work, parallel, gpus)
    plan = plan_batch(*(config.clips_per_step, held), budget=budget, micro_batch=config.micro_batch, processes=gpus)
    step = predict(
        *(cluster, work, flags.rate),
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        parallel=parallel,
        eager=config.engine == "eager",
        core_clips=clips_of_core(flags.files, config.data.views_per_decode),
    )
    return Forecast(cluster, plan.micro_batch, plan.accumulation, plan.peak_bytes, budget, step)


_ABOUT = "What a recipe's step takes of a GPU's memory (--gpu-memory GB, 80 if not given), estimated to within 15 %."


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked; exit code 2 for wrong use."""
    with user_errors(PROG):
        flags, rest = take_flags(sys.argv[1:] if arguments is None else arguments, PROG)
    config = parse(
        *(rest, PRETRAIN, "k400-base-800"),
        prog=PROG,
        about=f"{_ABOUT}\n\n{FLAGS}",
        examples=[f"{PROG} k400-base-800 --gpus 8 64 --gpu h200"],
        groups=("how long", "which model"),
        elsewhere=NAMES,
    )
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in build(config.model).parameters())
    work = workload(config, num_parameters, _precision(config))
    with user_errors(PROG):
        if flags.gpus:
            lines = report(config, work, flags, [forecast(config, work, flags, n) for n in flags.gpus])
        else:
            lines = _recipe_lines(config, work, 80.0 if flags.memory is None else flags.memory)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_main(main)
