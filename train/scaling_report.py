"""The text of `train.plan --gpus`: its flags; a run on so many GPUs in lines, on several numbers of them in a table."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import NoReturn, get_args

from kernels.launch import check
from train.cli import refuse
from train.machine import bytes_text
from train.memory import Workload
from train.recipes import PretrainConfig
from train.scaling import DECODED, GPUS, VIDEO_BYTES, Cluster, Files, Parallel, Rate, Step, clips_of_core, operations
from videomae.wording import counted

FLAGS = """\
--gpus N [N ...]     how a run on so many GPUs scales, for each number; with it:
--gpu NAME           h200 if not given; --gpu-memory is then its own if not given
--parallel ddp       fsdp: weights, gradients and moments spread over all
--network 50         GB/s between machines, one way, for all GPUs of a machine; 50: 400 Gbit/s
--cores N            of a machine; enough if not given
--mfu 0.4            share of the GPU's peak at which a step computes
--clips-per-second X measured on one GPU, instead
--files h264-fast    what is decoded: original, h264-fast or jpeg (videomae.data.prepare)
--videos N           of the data set, where the recipe does not tell"""
NAMES = ("--gpu-memory", *re.findall("^--[a-z-]+", FLAGS, re.M))

# videos that train (RECIPES H), by the beginning of a recipe's name
_VIDEOS = {"k400": 240_436, "ssv2": 168_913, "ucf101": 9_537, "hmdb51": 3_570}
_MOST = 1_000_000
# of the time: what breaks nothing
LITTLE = 0.05


@dataclass(frozen=True)
class Flags:
    """What the command line says of the machines. gpus: none, where it is not about them."""

    gpus: tuple[int, ...]
    gpu: str
    memory: float | None  # GB
    parallel: Parallel
    network: float  # GB/s
    cores: int | None
    rate: Rate
    files: Files
    videos: int | None

    def cluster(self, gpus: int) -> Cluster:
        return Cluster(GPUS[self.gpu], gpus, 1e9 * self.network, self.cores)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(self.prog, message.removeprefix("argument "))


def _number(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"takes whole numbers, and a recipe goes before it; got {text!r}")
    return int(text)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=_number, nargs="+")
    parser.add_argument("--gpu", choices=GPUS)
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--parallel", choices=get_args(Parallel))
    parser.add_argument("--network", type=float)
    parser.add_argument("--cores", type=int)
    parser.add_argument("--mfu", type=float)
    parser.add_argument("--clips-per-second", type=float)
    parser.add_argument("--files", choices=get_args(Files))
    parser.add_argument("--videos", type=int)
    return parser


def take_flags(arguments: Sequence[str], prog: str) -> tuple[Flags, list[str]]:
    """The flags of `FLAGS` and --gpu-memory, and the arguments that are left; exit code 2 for wrong ones. ValueError
    for values that make no sense."""
    given, rest = _parser(prog).parse_known_args(list(arguments))
    gpus = given.gpus or ([1] if given.gpu else [])
    own = [name for name, value in vars(given).items() if value is not None and name != "gpu_memory"]
    if own and not gpus:
        raise ValueError(f"--{own[0].replace('_', '-')} is of a run on GPUs: give --gpus N as well")
    memory, mfu, measured, videos = given.gpu_memory, given.mfu, given.clips_per_second, given.videos
    check(memory is None or 0 < memory < 1e6, f"--gpu-memory takes a number of gigabytes; got {memory}")
    check(mfu is None or measured is None, "give --mfu or --clips-per-second, not both")
    check(videos is None or videos >= 1, f"--videos must be at least 1; got {videos}")
    for n in gpus:
        check(1 <= n <= _MOST, f"--gpus must be from 1 to {_MOST:,}; got {n}")
    flags = Flags(
        tuple(gpus),
        given.gpu or "h200",
        memory,
        given.parallel or "ddp",
        50.0 if given.network is None else given.network,
        given.cores,
        Rate(0.4 if mfu is None else mfu, measured),
        given.files or "h264-fast",
        videos,
    )
    for n in gpus:
        flags.cluster(n)  # refuses what cannot be
    return flags, rest


def check_shared(config: PretrainConfig, gpus: int) -> None:
    """ValueError, with the batches that would do, unless so many GPUs share a step's clips equally."""
    views, clips = config.data.views_per_decode, config.clips_per_step
    multiple = gpus // gcd(gpus, views)
    below = config.batch_size // multiple * multiple
    would = " or ".join(str(size) for size in (below, below + multiple) if size)
    check(clips % gpus == 0, f"{gpus} GPUs cannot share a step's {clips} clips equally: --batch-size {would} could be")


@dataclass(frozen=True)
class Forecast:
    """A run on so many GPUs. micro_batch: clips on a GPU at a time; peak, budget: bytes that a step takes of a GPU, and
    may take."""

    cluster: Cluster
    micro_batch: int
    accumulation: int
    peak: int
    budget: int
    step: Step

    @property
    def wanted(self) -> float:
        """Clips a second that a machine would take, were none waited for."""
        step = self.step
        return step.clips / (step.seconds - step.data) / self.cluster.gpus * self.cluster.in_machine

    def cores(self, files: Files, views: int) -> int:
        """Of a machine, to decode so many; beside those of the GPUs' own processes."""
        return ceil(self.wanted / clips_of_core(files, views))


def run_steps(config: PretrainConfig, videos: int | None) -> int | None:
    """The run's steps; None where nothing tells how many videos there are."""
    if config.steps is not None or config.epochs is None:
        return config.steps
    known = videos or next((n for name, n in _VIDEOS.items() if config.recipe.startswith(name)), None)
    return None if known is None else max(int(config.epochs * known / config.batch_size), 1)


def report(config: PretrainConfig, work: Workload, flags: Flags, forecasts: Sequence[Forecast]) -> list[str]:
    """The lines to print, of at most 100 columns."""
    gpu, cluster = GPUS[flags.gpu], forecasts[-1].cluster
    rate = f"{flags.rate.of(gpu, work):,.0f} clips/s of a GPU that waits for nothing, "
    if flags.rate.clips_per_second:
        rate += "measured, as given; the rest is estimated"
    else:
        rate += f"estimated, at {100 * flags.rate.share:g} % of the peak ({gpu.peak / 1e12:,.0f} TFLOP/s)"
    network = "" if cluster.machines == 1 else f"; {flags.network:g} GB/s between machines"
    lines = [
        f"{config.recipe}: {config.model.size}, decoder depth {work.decoder_depth}, "
        f"{work.num_parameters / 1e6:.1f} M parameters, {operations(work).total / 1e9:,.1f} GFLOP a clip",
        f"{flags.gpu}, {gpu.in_machine} in a machine, {gpu.link / 1e9:g} GB/s in it{network}; {flags.parallel}",
        rate,
        "",
    ]
    steps = run_steps(config, flags.videos)
    if len(forecasts) > 1:
        return [*lines, *_table(config, flags, forecasts, steps)]
    return [*lines, *_one(config, work, flags, forecasts[0], steps)]


def _table(config: PretrainConfig, flags: Flags, forecasts: Sequence[Forecast], steps: int | None) -> list[str]:
    views = config.data.views_per_decode
    lines = ["  GPUs     a GPU   memory  step ms   clips/s  busy    days  net ms  waits  cores  breaks first"]
    for f in forecasts:
        step, told = f.step, f.step.exchange
        days = "-" if steps is None else f"{steps * step.seconds / 86_400:,.2f}"
        lines.append(
            f"{f.cluster.gpus:>6,}{f'{f.micro_batch} x {f.accumulation}':>10}{bytes_text(f.peak):>9}"
            f"{_ms(step.seconds):>9}{step.clips_per_second:>10,.0f}{step.computing:>6.0%}{days:>8}"
            f"{_ms(told.seconds):>8}{_ms(told.waited):>7}{f.cores(flags.files, views):>7,}  {_breaks(step)}"
        )
    large = ", ".join(f"{f.cluster.gpus:,}" for f in forecasts if f.peak > f.budget)
    if large:
        lines += ["", f"More than a step should take of a GPU's memory: with {large} GPUs."]
    may = forecasts[-1].cluster.decoding_cores
    return [
        *lines,
        "",
        "a GPU: clips at a time x accumulated. busy: the time in which it computes. net ms: what all tell",
        "each other in a step, without latency; waits: what of it nothing hides. cores: of a machine, to",
        f"decode {_decoded(flags, views)}{'' if may is None else f'; {may} may'}. "
        "breaks first: most of the other time.",
    ]


def _decoded(flags: Flags, views: int) -> str:
    return f"{flags.files} files, {counted(views, 'view')} each"


def _one(config: PretrainConfig, work: Workload, flags: Flags, f: Forecast, steps: int | None) -> list[str]:
    cluster, step = f.cluster, f.step
    machines = "1 machine" if cluster.machines == 1 else f"{cluster.machines:,} machines"
    unknown = "--videos N tells how long it is"
    run = unknown if steps is None else f"{counted(steps, 'step')}, {_time_text(steps * step.seconds)}"
    fits = "" if f.peak <= f.budget else ": too large, --model.recompute block takes less"
    return [
        f"batch       {counted(step.clips, 'clip')} a step = {f.micro_batch} at a time x {f.accumulation} accumulated"
        f" x {cluster.gpus:,} GPU{'s' if cluster.gpus > 1 else ''} in {machines}",
        f"memory      {bytes_text(f.peak)} of a GPU; a step may take {bytes_text(f.budget)}{fits}",
        f"step        {_ms(step.seconds)} ms, {step.clips_per_second:,.0f} clips/s; computing {step.computing:.0%}"
        " of the time",
        f"  ms        {_ms(step.arithmetic)} arithmetic, {_ms(step.starts)} starting kernels, "
        f"{_ms(step.update)} update, {_ms(step.exchange.waited)} network, {_ms(step.data)} data",
        f"run         {run}",
        *_network_lines(work, flags, f),
        *_data_lines(config, work, flags, f),
        *_checkpoint_lines(config, work, step),
        f"faults      one in {_time_text(3600 * cluster.hours_to_fault)}, at the rate of Llama 3's training "
        "(419 in 54 days of 16,384 H100)",
        f"first       {_breaks(step)}",
    ]


def _network_lines(work: Workload, flags: Flags, f: Forecast) -> list[str]:
    told, cluster = f.step.exchange, f.cluster
    if cluster.gpus == 1:
        return ["network     nothing to tell"]
    what = "all-reduce" if flags.parallel == "ddp" else "gathers and reduce-scatter"
    return [
        f"network     {what} of {bytes_text(4 * work.num_parameters)}; {bytes_text(int(told.sent))} from each GPU",
        f"  ms        {_ms(told.seconds)} at {cluster.bandwidth / 1e9:g} GB/s without latency, "
        f"{_ms(told.hidden)} of them hidden behind computing",
    ]


def _data_lines(config: PretrainConfig, work: Workload, flags: Flags, f: Forecast) -> list[str]:
    views, (height, width) = config.data.views_per_decode, work.input.size
    cores = ", ".join(f"{f.cores(files, views):,} ({files})" for files in DECODED)
    pixels = work.input.frames * height * width * len(work.input.mean)
    read, there = f.wanted / views * VIDEO_BYTES[flags.files], f.cluster.decoding_cores
    may = "" if there is None else f"; {there:,} of its {f.cluster.cores:,} may"
    return [
        f"data        a machine takes {f.wanted:,.0f} clips/s, {f.wanted * pixels / 1e9:,.1f} GB/s of pixels, "
        f"and reads {read / 1e9:,.1f} GB/s",
        f"  files     {_decoded(flags, views)}",
        f"  cores     {cores} to decode{may}",
    ]


def _checkpoint_lines(config: PretrainConfig, work: Workload, step: Step) -> list[str]:
    # weights and both moments, float32
    size, every, keep = 12 * work.num_parameters, config.checkpoint.every, config.checkpoint.keep
    return [
        f"checkpoint  {bytes_text(size)} every {counted(every, 'step')}, {_time_text(every * step.seconds)}: the most "
        f"that is "
        f"lost; {keep} kept, {bytes_text(keep * size)}",
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _time_text(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for unit, name, digits in ((86_400, "days", 1), (3_600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.{digits}f} {name}"
    return f"{seconds:.0f} s"


def _breaks(step: Step) -> str:
    name, share = step.breaks
    return f"{name}, {share:.0%}" if share >= LITTLE else "nothing"
