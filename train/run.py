"""All that a training run needs, found and checked before its first clip is decoded."""

import copy
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kernels.launch import check
from train import checkpoint, record
from train.claim import Claim
from train.cli import flat
from train.config import Data, RunConfig
from train.distributed import ALONE, World
from train.engine import Objective, check_engine
from train.machine import bytes_text, decoding_cores, memory_budget, pick_device
from train.optim import PRECISIONS, Schedule, Updater, resolve_precision, schedule
from train.plan import BatchPlan, of_one_process, plan_batch
from train.sharding import gather, shard
from train.skipped import merge_parts
from train.verb import Verb
from train.waiting import Supply
from videomae.attention import Choice, choose
from videomae.blocks import set_attention
from videomae.data import decode, storage
from videomae.data.dataset import VideoList
from videomae.data.demo import make_demo
from videomae.data.demo_scenes import make_scenes
from videomae.data.pool import available_cpus
from videomae.data.shards import is_locator
from videomae.data.torchcodec_reader import check_parity
from videomae.wording import counted

# what may differ between the parts of one run: nothing here changes a clip. steps and epochs change the learning rates
# still to come; micro_batch, device and how a step is computed the rounding, and the first two what drop path draws
_FREE = (
    *("data.path", "data.val", "data.cache", "data.cache_gb", "validate_every"),
    *("out", "epochs", "steps", "micro_batch", "workers", "device", "patience", "resume", "optim.max_nonfinite"),
    "precision",  # told apart by what it comes to
    *("engine", "parallel", "attention", "model.recompute", "model.short_last_layer"),
)
_CONTEXT = 500_000_000  # bytes of a GPU that a worker takes whose decoder is there, about; unmeasured
_FREE_SECTIONS = ("loader.", "log.", "checkpoint.", "probe.")


@dataclass
class Run:
    """All that the loop needs."""

    verb: Verb
    config: RunConfig
    out: Path
    videos: VideoList
    device: torch.device
    precision: str
    workers: int
    plan: BatchPlan
    schedule: Schedule
    model: nn.Module  # to look at and to save; where weights are spread, the first process's alone is up to date
    objective: Objective  # of it
    updater: Updater
    attention: dict[str, Choice]  # of each part of the model
    start: int  # steps done before
    world: World = ALONE
    spread: nn.Module | None = None  # the model that is trained, where its weights are spread over the processes
    claim: Claim | None = None  # of the first process on its folder

    @property
    def cache(self) -> storage.CacheConfig | None:
        """Where the workers keep what they read from a URL."""
        return self.config.data.cache_of(self.config.data.path)

    @property
    def supply(self) -> Supply:
        """What decodes for the step."""
        config, url = self.config, self.config.data.path or ""
        return Supply(
            self.workers,
            decoding_cores(self.device, self.world.local_size),
            config.data.views_per_decode,
            config.loader.batches_ahead,
            stored=is_locator(self.videos.paths[0]),
            cached=storage.is_url(url) and not url.startswith("file://"),
        )

    def gather(self) -> None:
        """The weights into the first process's model, where they are spread; all processes call it."""
        if self.spread is not None:
            gather(self.spread, self.model if self.world.is_first else None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        return {
            "verb": self.verb.name,
            "config": flat(self.config),
            "videos": self.verb.fingerprint(self.videos),
            "micro_batch": self.plan.micro_batch,
            "precision": self.precision,
            "rng": torch.get_rng_state(),
            **self.updater.state_dict(),
            **self.verb.extra_state(),
        }


def prepare(verb: Verb, world: World = ALONE) -> tuple[Run, Path | None]:
    """Everything that can be refused, before the first clip is decoded; and the checkpoint that the run goes on from.

    Raises ValueError for what the user can mend.
    """
    out = Path(verb.config.out or f"runs/{verb.name}-{verb.config.recipe}")
    check(not out.exists() or out.is_dir(), f"{out} is a file; --out is a folder for the run")
    claim = Claim(out) if world.is_first and out.exists() else None
    try:
        return _prepared(verb, out, claim, world)
    except BaseException:
        # a claim that an error's traceback keeps would be let go of at any time, and with it that of the next run here
        if claim is not None:
            claim.close()
        raise


def _prepared(verb: Verb, out: Path, claim: Claim | None, world: World) -> tuple[Run, Path | None]:
    config = verb.config
    device = pick_device(config.device, None if world.group is None else world.local_rank)
    check(config.parallel == "ddp" or world.group is not None, "--parallel fsdp needs torchrun --nproc-per-node N")
    check_engine(config.engine, device, verb.recompute, parallel=None if world.group is None else config.parallel)
    precision = resolve_precision(config.precision, device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(available_cpus() // world.local_size, 1))
    attention = _attention(verb, device, PRECISIONS[precision] or torch.float32)
    with world.in_turn():
        videos = verb.find_videos()
    found = _agreed_checkpoint(verb, out, videos, precision, world)

    torch.manual_seed(config.seed)
    model = verb.build()
    if not found:
        verb.initialize(model)
    model = model.to(device)
    set_attention(model, config.attention)
    # memory may be another today; the same run takes the same sums
    at_most = found[1]["micro_batch"] if found and config.resume == "auto" else None
    workers = config.workers if config.workers is not None else decoding_cores(device, world.local_size)
    plan = _plan(verb, model, device, precision, world, _budget(config, device, world, workers), at_most)
    lengths = _schedule(config, len(videos))
    world.check_same(settings=_without_place(config), videos=verb.fingerprint(videos), plan=plan, schedule=lengths)
    if found:
        checkpoint.restore(found[0], model)
    spread = None
    if config.parallel == "fsdp":
        # the first process keeps a whole one, to look at and to save
        spread = copy.deepcopy(model) if world.is_first else model
        shard(spread, device)
    updater = Updater(spread or model, config.optim, lengths, precision, device)
    start = 0
    if found:
        path, state = found
        updater.load_state_dict(state)
        verb.load_extra_state(path, state, model)
        torch.set_rng_state(state["rng"])
        start = state["step"]
    objective = verb.objective(model, precision)
    run = Run(
        *(verb, config, out, videos, device, precision, workers, plan, lengths, model, objective, updater),
        *(attention, start, world, spread, claim),
    )
    processes = world.everyones(record.process_facts(world.rank, device)) if world.group is not None else []
    if world.is_first:
        verb.ready(run)
        _begin_folder(run, processes, is_new=not found)
    world.meet()
    return run, found[0] if found else None


def _agreed_checkpoint(
    verb: Verb, out: Path, videos: VideoList, precision: str, world: World
) -> tuple[Path, dict[str, Any]] | None:
    """Where to go on from: the first process chooses, and warns of what is damaged."""
    found = _find_checkpoint(verb, out, videos, precision) if world.is_first else None
    path = world.from_first(found[0] if found else None)
    return found if found or path is None else (path, checkpoint.read_state(path))


def _budget(config: RunConfig, device: torch.device, world: World, workers: int) -> int:
    """Bytes for a step in this process: what its workers take, where their decoders are on its GPU, is not free."""
    return memory_budget(device, world.local_size) - (workers * _CONTEXT if config.data.device == "cuda" else 0)


def _plan(
    verb: Verb, model: nn.Module, device: torch.device, precision: str, world: World, budget: int, at_most: int | None
) -> BatchPlan:
    """budget: bytes for a step in this process; at_most: the largest micro-batch, where memory is not to decide."""
    config = verb.config
    work = verb.workload(sum(p.numel() for p in model.parameters()), precision, device.type)
    return plan_batch(
        config.clips_per_step,
        of_one_process(work, config.parallel, world.size),
        budget=world.least(budget),
        micro_batch=config.micro_batch,
        together=verb.together,
        processes=world.size,
        at_most=at_most,
    )


def _begin_folder(run: Run, processes: Sequence[dict[str, Any]], *, is_new: bool) -> None:
    is_old = run.claim is not None
    if run.claim is None:
        # another may have begun here since
        run.out.mkdir(parents=True, exist_ok=True)
        run.claim = Claim(run.out)
    if is_old and run.config.resume == "never":
        record.move_aside(run.out)
        run.out.mkdir(parents=True)
        moved, run.claim = run.claim, Claim(run.out)
        moved.close()
    if is_new:
        (run.out / "skipped.jsonl").unlink(missing_ok=True)  # of a run that never reached a checkpoint
    merge_parts(run.out / "skipped.jsonl", run.start)
    checkpoint.set_aside_after(run.out / "checkpoints", run.start)
    record.write_config(
        run.out, flat(run.config), _facts(run), resumed_at=None if is_new else run.start, processes=processes
    )


def _without_place(config: RunConfig) -> dict[str, Any]:
    """The settings that all processes of a run must share: machines may differ in where data lies, and in cores."""
    own = ("data.path", "data.val", "data.cache", "data.cache_gb", "workers", "device")
    return {name: value for name, value in flat(config).items() if name not in own}


def warn_of(videos: VideoList) -> None:
    """Say what is wrong with the videos as a set."""
    for note in videos.notes:
        print(f"warning: {note}", file=sys.stderr)


def warn_of_flips(classes: Sequence[str], flip: bool) -> None:
    """Say when clips are mirrored whose classes tell left from right."""
    sided = [name for name in classes if {"left", "right"} & set(re.findall("[a-z]+", name.lower()))]
    if flip and sided:
        print(
            f"warning: clips are mirrored, but classes tell left from right ({', '.join(sided[:3])}): "
            "--augment.flip false",
            file=sys.stderr,
        )


def check_reader(data: Data, videos: VideoList) -> None:
    """ValueError when the reader that was asked for cannot read these videos."""
    check(
        data.reader != "decord" or decode.decord is not None, "--data.reader decord needs decord: pip install decord2"
    )
    if data.reader == "torchcodec":
        check(not is_locator(videos.paths[0]), "a prepared set has its own reader: leave --data.reader at auto")
        difference = check_parity(videos.paths, data.device)
        print(f"reader    torchcodec on {data.device}; pixels {difference:.2f} grey levels from the ordinary one's")


def demo_list(split: str = "train") -> Path:
    """The list of the demo's videos, rendered where they are not there yet."""
    return _rendered(make_demo, Path("data/demo"), "demo clips").with_name(f"{split}.csv")


def demo_scenes() -> Path:
    """The folder of the demo's scenes, with their key frames and boxes, rendered where they are not there yet."""
    return _rendered(make_scenes, Path("data/scenes"), "demo scenes").parent


def _rendered(make: Callable[..., Path], folder: Path, what: str) -> Path:
    with tqdm(desc=f"rendering {what} into {folder}", leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return make(folder, progress=show)


def _attention(verb: Verb, device: torch.device, dtype: torch.dtype) -> dict[str, Choice]:
    """What will compute attention; ValueError when the back end that was asked for cannot."""
    return {
        name: choose(verb.config.attention, device=device, dtype=dtype, length=length, head_width=width)
        for name, (length, width) in verb.sequences().items()
    }


def _find_checkpoint(verb: Verb, out: Path, videos: VideoList, precision: str) -> tuple[Path, dict[str, Any]] | None:
    """Where to go on from. Raises ValueError when the run folder holds a run with other settings."""
    config = verb.config
    if config.resume == "never":
        return None
    if config.resume != "auto":
        path = Path(config.resume).expanduser()
        is_one = (path / "state.pt").exists()
        found = (path, checkpoint.read_state(path)) if is_one else checkpoint.latest(path / "checkpoints")
        if found is None:
            raise ValueError(f"no checkpoint at {path}: give a run folder, its checkpoints/step_<n>, auto or never")
        for difference in _differences(verb, found[1], videos, precision):
            print(f"note: unlike the run of {found[0]}: {difference}", file=sys.stderr)
        return found
    latest = checkpoint.latest(out / "checkpoints")
    if latest is None:
        return None
    if changed := _differences(verb, latest[1], videos, precision):
        listing = "; ".join(changed)
        raise ValueError(f"{out} holds a run with other settings ({listing}); give another --out, or --resume never")
    return latest


def _differences(verb: Verb, state: dict[str, Any], videos: VideoList, precision: str) -> list[str]:
    """What makes this another run than the one that state is of."""
    # a setting that the program of then did not have: it did what the recipe does now
    kind = state.get("verb", "pretrain")  # the only one until 0.1
    check(
        kind == verb.name, f"that checkpoint is of train.{kind}, not of train.{verb.name}: start from it with --weights"
    )
    config = verb.config
    new, old = flat(config), flat(verb.recipes[config.recipe]()) | state["config"]
    old["data.views_per_decode"] = old.pop("sampling.views", old["data.views_per_decode"])  # its name until 0.1
    fixed = [key for key in new if key not in _FREE and not key.startswith(_FREE_SECTIONS)]
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in fixed if old[key] != new[key]]
    if state["precision"] != precision:
        changed.append(f"precision: {state['precision']} -> {precision}")
    if state["videos"] != verb.fingerprint(videos):
        changed.append("the list of videos")
    return changed


def _schedule(config: RunConfig, num_videos: int) -> Schedule:
    """Steps and warm-up from --steps, or from epochs over num_videos; batches cross from one epoch into the next."""
    optim = config.optim
    if config.steps is not None:
        share = min(optim.warmup_epochs / config.epochs, 0.1) if config.epochs else 0.1
        steps, warmup_steps = config.steps, int(config.steps * share)
    else:
        assert config.epochs is not None
        steps = max(int(config.epochs * num_videos / config.batch_size), 1)
        # a run that the user made shorter than its recipe's warm-up gets a tenth of it
        share = optim.warmup_epochs / config.epochs
        warmup_steps = int(steps * (share if share < 1 else 0.1))
    return schedule(optim, batch_size=config.batch_size, steps=steps, warmup_steps=warmup_steps)


def _facts(run: Run) -> dict[str, Any]:
    return {
        "videos": len(run.videos),
        "videos_fingerprint": run.verb.fingerprint(run.videos),
        "device": str(run.device),
        "precision": run.precision,
        "steps": run.schedule.steps,
        "warmup_steps": run.schedule.warmup_steps,
        "peak_lr": run.schedule.peak,
        "clips_per_step": run.plan.clips,
        "micro_batch": run.plan.micro_batch,
        "accumulation": run.plan.accumulation,
        "processes": run.plan.processes,
        "peak_bytes": run.plan.peak_bytes,
        "attention": {name: f"{choice.name} ({choice.why})" for name, choice in run.attention.items()},
        "workers": run.workers,
        "threads": torch.get_num_threads(),
        **run.verb.facts(),
    }


def say_plan(run: Run, resumed_from: Path | None) -> None:
    """What the run will do, before it does."""
    config, views = run.config, run.config.data.views_per_decode
    if run.device.type == "cuda":
        count = torch.cuda.device_count()
        alone = run.world.group is None and count > 1
        device = torch.cuda.get_device_name(run.device) + (
            f" (1 of {count}: torchrun --nproc-per-node {count} -m train.{run.verb.name} uses all)" if alone else ""
        )
    else:
        device = f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    chosen = dict.fromkeys(run.attention.values())
    passes = run.schedule.steps * config.batch_size / len(run.videos)
    epochs = f"{passes:,.1f} epochs" + (f" x {views} views = {passes * views:,.1f} effective ones" if views > 1 else "")
    print(f"run       {run.out}")
    videos = counted(len(run.videos), run.verb.unit.removesuffix("s"))
    # the demo's videos are in its folder's train/
    where = config.data.path or os.path.relpath(Path(run.videos.paths[0]).parents[1])
    print(f"data      {where}: {videos}, {counted(run.workers, 'worker')}")
    for line in run.verb.describe(run):
        print(line)
    print(f"device    {device}, {run.precision}; engine {config.engine}")
    print(
        "attention "
        + ", ".join(f"{' and '.join(k for k, v in run.attention.items() if v == c)} {c.name} ({c.why})" for c in chosen)
    )
    print(
        f"batch     {counted(run.plan.clips, 'clip')} a step = "
        f"{run.plan.micro_batch} at a time x {run.plan.accumulation} accumulated"
        + (f" x {run.plan.processes} processes" if run.world.group is not None else "")
        + (f" ({config.batch_size} {run.verb.unit} x {views} views)" if views > 1 else "")
    )
    recomputed = "" if run.verb.recompute == "none" else f", {run.verb.recompute} computed anew"
    print(f"memory    {bytes_text(run.plan.peak_bytes)} at a step's peak, estimated{recomputed}")
    if not run.plan.fits:
        print(
            "warning: that is more than a step should take of the memory that is free; "
            "--model.recompute norms, mlp or block takes less",
            file=sys.stderr,
        )
    print(
        f"schedule  {counted(run.schedule.steps, 'step')} ({epochs}), {run.schedule.warmup_steps:,} of warm-up; "
        f"learning rate {config.optim.base_lr:g} x {config.batch_size}/256 = {run.schedule.peak:.3g}"
    )
    if resumed_from:
        print(f"resuming  at step {run.start}, from {resumed_from}")
    sys.stdout.flush()
