"""All that a pre-training run needs, found and checked before its first clip is decoded."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kernels.launch import check
from train import checkpoint, record
from train.cli import flat
from train.engine import check_engine
from train.objective import PretrainObjective
from train.optim import PRECISIONS, Schedule, Updater, resolve_precision, schedule
from train.plan import (
    BatchPlan,
    bytes_text,
    decoding_cores,
    memory_budget,
    pick_device,
    plan_batch,
    workload,
)
from train.recipes import PRETRAIN, PretrainConfig, build
from train.waiting import Supply
from videomae.attention import Choice, choose
from videomae.blocks import set_attention
from videomae.data import decode, storage
from videomae.data.dataset import ClipReader, VideoList, find_videos
from videomae.data.decode import Decoder
from videomae.data.demo import make_demo
from videomae.data.pool import available_cpus
from videomae.data.shards import is_locator
from videomae.data.torchcodec_reader import check_parity
from videomae.model import VideoMAE, size_of

# what may differ between the parts of one run: nothing here changes a clip. steps and epochs change the learning rates
# still to come; micro_batch, device and how a step is computed the rounding
_FREE = (
    *("data.path", "data.cache", "data.cache_gb"),
    *("out", "epochs", "steps", "micro_batch", "workers", "device", "resume", "optim.max_nonfinite"),
    *("engine", "attention", "model.recompute", "model.short_last_layer"),
)
_FREE_SECTIONS = ("loader.", "log.", "checkpoint.")


@dataclass
class Run:
    """All that the loop needs."""

    config: PretrainConfig
    out: Path
    videos: VideoList
    device: torch.device
    precision: str
    workers: int
    plan: BatchPlan
    schedule: Schedule
    model: VideoMAE
    objective: PretrainObjective
    updater: Updater
    attention: dict[str, Choice]  # of encoder and decoder
    start: int  # steps done before

    @property
    def cache(self) -> storage.CacheConfig | None:
        """Where the workers keep what they read from a URL."""
        return _cache(self.config)

    @property
    def supply(self) -> Supply:
        """What decodes for the step."""
        config, url = self.config, self.config.data.path or ""
        return Supply(
            self.workers,
            decoding_cores(self.device),
            config.data.views_per_decode,
            config.loader.batches_ahead,
            stored=is_locator(self.videos.paths[0]),
            cached=storage.is_url(url) and not url.startswith("file://"),
        )

    @property
    def reader(self) -> ClipReader:
        """What makes clips of the videos."""
        config = self.config
        return ClipReader(
            config.model.frames,
            config.model.input.size,
            config.sampling.stride,
            config.augment,
            config.seed,
            views=config.data.views_per_decode,
            windows=config.data.windows,
            decoder=Decoder(config.data.reader, config.data.device),
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        return {
            "config": flat(self.config),
            "videos": self.videos.fingerprint,
            "micro_batch": self.plan.micro_batch,
            "precision": self.precision,
            "rng": torch.get_rng_state(),
            **self.updater.state_dict(),
        }


def prepare(config: PretrainConfig) -> tuple[Run, Path | None]:
    """Everything that can be refused, before the first clip is decoded; and the checkpoint that the run goes on from.

    Raises ValueError for what the user can mend.
    """
    device = pick_device(config.device)
    check_engine(config.engine, device, config.model.recompute)
    precision = resolve_precision(config.precision, device)
    attention = _attention(config, device, PRECISIONS[precision] or torch.float32)
    cpus = available_cpus()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpus)
    videos = _videos(config)
    out = Path(config.out or f"runs/pretrain-{config.recipe}")
    found = _find_checkpoint(config, out, videos, precision)

    torch.manual_seed(config.seed)
    model = build(config.model).to(device)
    set_attention(model, config.attention)
    micro_batch = config.micro_batch
    if micro_batch is None and found and config.resume == "auto":
        micro_batch = found[1]["micro_batch"]  # memory may be another today; the same run takes the same sums
    plan = _plan(config, model, device, precision, micro_batch)
    lengths = _schedule(config, len(videos))
    updater = Updater(model, config.optim, lengths, precision, device)
    start = 0
    if found:
        path, state = found
        checkpoint.restore(path, model)
        updater.load_state_dict(state)
        torch.set_rng_state(state["rng"])
        start = state["step"]
    workers = config.workers if config.workers is not None else decoding_cores(device)
    objective = _objective(config, model, precision)
    run = Run(
        config, out, videos, device, precision, workers, plan, lengths, model, objective, updater, attention, start
    )
    if config.resume == "never":
        record.move_aside(out)
    if not found:
        (out / "skipped.jsonl").unlink(missing_ok=True)  # of a run that never reached a checkpoint
    checkpoint.set_aside_after(out / "checkpoints", start)
    record.write_config(out, flat(config), _facts(run), resumed_at=start if found else None)
    return run, found[0] if found else None


def _videos(config: PretrainConfig) -> VideoList:
    """The videos of --data, and what is wrong with them as a set; ValueError when the recipe cannot use them."""
    path = config.data.path
    if path is None:
        return _demo_videos(config)
    storage.configure(_cache(config))
    videos = find_videos(path)
    for note in videos.notes:
        print(f"warning: {note}", file=sys.stderr)
    check(
        config.sampling.stride % videos.step == 0,
        f"{path} holds frames 0, {videos.step}, {2 * videos.step}, ... only: --sampling.stride must be a multiple of "
        f"{videos.step}, not {config.sampling.stride}",
    )
    check(
        config.data.reader != "decord" or decode.decord is not None,
        "--data.reader decord needs decord: pip install decord2",
    )
    if config.data.reader == "torchcodec":
        check(not is_locator(videos.paths[0]), "a prepared set has its own reader: leave --data.reader at auto")
        difference = check_parity(videos.paths, config.data.device)
        print(
            f"reader    torchcodec on {config.data.device}; pixels {difference:.2f} grey levels from the ordinary one's"
        )
    return videos


def _cache(config: PretrainConfig) -> storage.CacheConfig | None:
    """Where what is read from a URL is kept; None for data on disk."""
    data = config.data
    if data.path is None or not storage.is_url(data.path):
        return None
    return storage.CacheConfig(str(Path(data.cache).expanduser()), data.cache_gb)


def _attention(config: PretrainConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Choice]:
    """What will compute attention; ValueError when the back end that was asked for cannot."""
    size, counts = size_of(config.model.size), config.counts
    sequences = {
        "encoder": (counts.visible, size.width // size.heads),
        "decoder": (counts.visible + counts.decoded, size.decoder_width // size.decoder_heads),
    }
    return {
        name: choose(config.attention, device=device, dtype=dtype, length=length, head_width=width)
        for name, (length, width) in sequences.items()
    }


def _objective(config: PretrainConfig, model: VideoMAE, precision: str) -> PretrainObjective:
    return PretrainObjective(
        model,
        mask_kind=config.mask.kind,
        mask_ratio=config.mask.ratio,
        decoder_mask=config.decoder_mask,
        decoder_ratio=config.decoder_ratio,
        normalize=config.target.normalize,
        autocast=PRECISIONS[precision],
    )


def _demo_videos(config: PretrainConfig) -> VideoList:
    if config.recipe != "demo":
        raise ValueError(f"recipe {config.recipe} needs --data: a folder of videos, or a list file")
    folder = Path("data/demo")
    with tqdm(desc=f"rendering demo clips into {folder}", leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return find_videos(make_demo(folder, progress=show))


def _find_checkpoint(
    config: PretrainConfig, out: Path, videos: VideoList, precision: str
) -> tuple[Path, dict[str, Any]] | None:
    """Where to go on from. Raises ValueError when the run folder holds a run with other settings."""
    if config.resume == "never":
        return None
    if config.resume != "auto":
        path = Path(config.resume)
        if not (path / "state.pt").exists():
            raise ValueError(f"no checkpoint at {path}: give a folder checkpoints/step_<n>, auto or never")
        found = path, checkpoint.read_state(path)
        for difference in _differences(config, found[1], videos, precision):
            print(f"note: unlike the run of {path}: {difference}", file=sys.stderr)
        return found
    latest = checkpoint.latest(out / "checkpoints")
    if latest is None:
        return None
    if changed := _differences(config, latest[1], videos, precision):
        listing = "; ".join(changed)
        raise ValueError(f"{out} holds a run with other settings ({listing}); give another --out, or --resume never")
    return latest


def _differences(config: PretrainConfig, state: dict[str, Any], videos: VideoList, precision: str) -> list[str]:
    """What makes this another run than the one that state is of."""
    # a setting that the program of then did not have: it did what the recipe does now
    new, old = flat(config), flat(PRETRAIN[config.recipe]()) | state["config"]
    old["data.views_per_decode"] = old.pop("sampling.views", old["data.views_per_decode"])  # its name until 0.1
    fixed = [key for key in new if key not in _FREE and not key.startswith(_FREE_SECTIONS)]
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in fixed if old[key] != new[key]]
    if state["precision"] != precision:
        changed.append(f"precision: {state['precision']} -> {precision}")
    if state["videos"] != videos.fingerprint:
        changed.append("the list of videos")
    return changed


def _schedule(config: PretrainConfig, num_videos: int) -> Schedule:
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


def _plan(
    config: PretrainConfig, model: VideoMAE, device: torch.device, precision: str, micro_batch: int | None
) -> BatchPlan:
    work = workload(config, sum(p.numel() for p in model.parameters()), precision, device.type)
    return plan_batch(config.clips_per_step, work, budget=memory_budget(device), micro_batch=micro_batch)


def _facts(run: Run) -> dict[str, Any]:
    return {
        "videos": len(run.videos),
        "videos_fingerprint": run.videos.fingerprint,
        "device": str(run.device),
        "precision": run.precision,
        "steps": run.schedule.steps,
        "warmup_steps": run.schedule.warmup_steps,
        "peak_lr": run.schedule.peak,
        "clips_per_step": run.plan.clips,
        "micro_batch": run.plan.micro_batch,
        "accumulation": run.plan.accumulation,
        "peak_bytes": run.plan.peak_bytes,
        "attention": {name: f"{choice.name} ({choice.why})" for name, choice in run.attention.items()},
        "workers": run.workers,
        "threads": torch.get_num_threads(),
    }


def say_plan(run: Run, resumed_from: Path | None) -> None:
    config, model = run.config, run.config.model
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    if run.device.type == "cuda":
        count = torch.cuda.device_count()
        device = torch.cuda.get_device_name(run.device) + (
            f" (1 of {count}: one process uses one)" if count > 1 else ""
        )
    else:
        device = f"cpu, {torch.get_num_threads()} threads"
    height, width = model.input.size
    counts = config.counts
    hides = f"{config.mask.kind} mask hides {counts.masked} of {model.input.num_cubes} cubes"
    if config.decoder_mask != "none":
        hides += f"; {config.decoder_mask} leaves {counts.predicted} of them to predict"
    chosen = dict.fromkeys(run.attention.values())
    passes = run.schedule.steps * config.batch_size / len(run.videos)
    views = config.data.views_per_decode
    epochs = f"{passes:,.1f} epochs" + (f" x {views} views = {passes * views:,.1f} effective ones" if views > 1 else "")
    print(f"run       {run.out}")
    print(f"data      {config.data.path or 'data/demo'}: {len(run.videos):,} videos, {run.workers} workers")
    print(f"model     {model.size}, decoder depth {model.decoder_depth}: {millions:.1f} M parameters")
    print(f"clip      {model.frames} x {height} x {width}, stride {config.sampling.stride}; {hides}")
    print(f"device    {device}, {run.precision}; engine {config.engine}")
    print(
        "attention "
        + ", ".join(f"{' and '.join(k for k, v in run.attention.items() if v == c)} {c.name} ({c.why})" for c in chosen)
    )
    print(
        f"batch     {run.plan.clips} clips a step = "
        f"{run.plan.micro_batch} at a time x {run.plan.accumulation} accumulated"
        + (f" ({config.batch_size} videos x {views} views)" if views > 1 else "")
    )
    recomputed = "" if model.recompute == "none" else f", {model.recompute} computed anew"
    print(f"memory    {bytes_text(run.plan.peak_bytes)} at a step's peak, estimated{recomputed}")
    if not run.plan.fits:
        print(
            "warning: that is more than a step should take of the memory that is free; "
            "--model.recompute norms, mlp or block takes less",
            file=sys.stderr,
        )
    print(
        f"schedule  {run.schedule.steps:,} steps ({epochs}), {run.schedule.warmup_steps:,} of warm-up; "
        f"learning rate {config.optim.base_lr:g} x {config.batch_size}/256 = {run.schedule.peak:.3g}"
    )
    if resumed_from:
        print(f"resuming  at step {run.start}, from {resumed_from}")
    sys.stdout.flush()
