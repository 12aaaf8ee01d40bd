"""Pre-train a VideoMAE: `python -m train.pretrain [RECIPE] [--data PATH] [--section.field VALUE]`.

Top to bottom: what was asked for, what the run needs, the loop, and where its results are.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from train import checkpoint, record
from train.cli import flat, parse, refuse, user_errors
from train.log import RunLog, TooManyNonFinite
from train.optim import PRECISIONS, Schedule, Updater, resolve_precision, schedule
from train.picture import draw_curves, draw_reconstruction, reconstruct
from train.plan import BatchPlan, available_cpus, clip_bytes, free_memory, pick_device, plan_batch
from train.recipes import PRETRAIN, PretrainConfig
from train.signals import stop_signals
from train.skipped import Skipped, TooManyUnreadable
from videomae import masking
from videomae.data.dataset import ClipReader, Order, Sample, VideoList, find_videos
from videomae.data.demo import make_demo
from videomae.data.loader import Batch, Loader
from videomae.model import VideoMAE, pretrain_model, set_recompute, size_of

PROG = "python -m train.pretrain"
_PREVIEWS = 3  # clips in the reconstruction picture

# what may differ between the parts of one run: nothing here changes a clip. steps and epochs change the learning rates
# still to come; micro_batch and device the rounding
_FREE = ("data", "out", "epochs", "steps", "micro_batch", "workers", "device", "resume", "optim.max_nonfinite")
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
    updater: Updater
    start: int  # steps done before

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the run had to stop, 2 wrong use, 130 and 143 stopped by
    Ctrl-C, SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    about = "Pre-train a VideoMAE on videos; with no argument, the demo."
    config = _one_length(parse(arguments, PRETRAIN, "demo", prog=PROG, about=about))
    try:
        with user_errors(PROG):
            run, resumed_from = prepare(config)
        _say_plan(run, resumed_from)
        return pretrain(run)
    except (TooManyUnreadable, TooManyNonFinite, checkpoint.Damaged, checkpoint.CannotSave) as error:
        print(f"{PROG}: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROG}: stopped at once", file=sys.stderr)
        return 128 + signal.SIGINT


def _one_length(config: PretrainConfig) -> PretrainConfig:
    """--epochs on a recipe of so many steps replaces them; both flags together are refused."""
    recipe = PRETRAIN[config.recipe]()
    if config.epochs == recipe.epochs or config.steps is None:
        return config
    if config.steps != recipe.steps:
        refuse(PROG, "give --steps or --epochs, not both")
    return replace(config, steps=None)


def prepare(config: PretrainConfig) -> tuple[Run, Path | None]:
    """Everything that can be refused, before the first clip is decoded; and the checkpoint that the run goes on from.

    Raises ValueError for what the user can mend.
    """
    device = pick_device(config.device)
    precision = resolve_precision(config.precision, device)
    cpus = available_cpus()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpus)
    videos = find_videos(config.data) if config.data is not None else _demo_videos(config)
    out = Path(config.out or f"runs/pretrain-{config.recipe}")
    found = _find_checkpoint(config, out, videos, precision)

    torch.manual_seed(config.seed)
    model = _build(config)
    set_recompute(model, config.model.recompute)
    model.to(device)
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
    # a GPU waits for as many decoders as there are; a CPU that trains needs its cores itself
    workers = config.workers if config.workers is not None else max(cpus - 1 if device.type == "cuda" else cpus // 2, 1)
    run = Run(config, out, videos, device, precision, workers, plan, lengths, model, updater, start)
    if config.resume == "never":
        record.move_aside(out)
    if not found:
        (out / "skipped.jsonl").unlink(missing_ok=True)  # of a run that never reached a checkpoint
    checkpoint.set_aside_after(out / "checkpoints", start)
    record.write_config(out, flat(config), _facts(run), resumed_at=start if found else None)
    return run, found[0] if found else None


def pretrain(run: Run) -> int:
    """The loop; returns the exit code."""
    config, steps, done = run.config, run.schedule.steps, run.start
    if done >= steps:
        return _finish(run, done, "Already finished", [])
    order = Order(len(run.videos), config.seed, config.sampling.views)
    reader = ClipReader(
        config.model.frames, config.model.input.size, config.sampling.stride, config.augment, config.seed
    )
    skipped = Skipped(run.out / "skipped.jsonl", run.videos.paths, done)
    log = RunLog(run.out, config.log, start=done, steps=steps, max_nonfinite=config.optim.max_nonfinite)
    loader = Loader(
        reader,
        run.videos.paths,
        _batches(run, order),
        batch_size=max(run.plan.micro_batch, min(_PREVIEWS, len(run.videos))),
        workers=run.workers,
        config=config.loader,
        known_skips=skipped.known,
    )
    with stop_signals() as stop, log, loader:
        batches = iter(loader)
        preview = _keep(next(batches))
        saved = done if done else None
        try:
            while done < steps and not stop:
                report = _step(run, done, batches, skipped, log, stop)
                if report is None:
                    break
                done += 1
                log.push(done, **report)
                if done % config.checkpoint.every == 0 or done == steps:
                    log.flush()
                    _save(run, done)
                    saved = done
                if done % config.log.picture_every == 0 or done == steps:
                    _picture(run, preview, done)
        finally:
            # stopped by a signal, by unreadable videos, by steps that were not finite: what was learned so far is sound
            if saved != done and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
                _save(run, done)
                log.flush()
    return _finish(run, done, "Finished", stop)


def _step(
    run: Run, step: int, batches: Iterator[Batch], skipped: Skipped, log: RunLog, stop: list[int]
) -> dict[str, Any] | None:
    """One update: micro-batches forward and backward, then the optimiser. step counts from 0.

    Returns what to report; None when a signal came between two micro-batches: a large step can take minutes.
    """
    clips = run.plan.clips
    loss = torch.zeros((), device=run.device)
    real, waited, lost, paths = 0, 0.0, 0, []
    for _ in range(run.plan.accumulation):
        if stop:
            return None
        before = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - before
        for skip in skipped.see(batch.samples, batch.skips, step + 1):
            log.say(f"skipped: {skip.path}: {skip.reason}")
        # the micro-batch's share of the step, as if all clips were real; corrected below when some are not
        micro_real = len(batch.samples) - len(batch.skips)
        real, lost = real + micro_real, lost + len(batch.skips)
        paths += [run.videos.paths[sample.index] for sample in batch.samples]
        # inside the loss, where float16's gradient is still float32
        scale = run.updater.loss_scale
        part = _loss(run, batch, scale=scale * (micro_real / clips))
        part.backward()
        loss += part.detach() / scale
    factor = clips / real if 0 < real < clips else 1.0
    stats = run.updater.step(step, loss, grad_factor=factor, skip=real == 0)
    return {
        "values": torch.stack((loss * factor, stats.grad_norm, stats.nonfinite)),
        "lr": run.schedule.at(step),
        "clips": clips,
        "skipped": lost,
        "waited": waited,
        "paths": paths,
    }


def _loss(run: Run, batch: Batch, *, scale: float | Tensor) -> Tensor:
    config, input = run.config, run.model.input
    frames = _to_device(batch.frames, run.device)
    mask = masking.make(config.mask.kind, input.grid, config.mask.ratio, _to_device(batch.keys, run.device))
    weight = _to_device(batch.weight, run.device) if batch.skips else None
    with _autocast(run):
        pred = run.model(frames, mask)
    return kernels.pixel_loss(
        pred, frames, mask.masked, config.target.normalize, cube=input.cube, weight=weight, scale=scale
    )


def _autocast(run: Run) -> torch.autocast:
    dtype = PRECISIONS[run.precision]
    return torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _batches(run: Run, order: Order) -> Iterator[list[Sample]]:
    """First the clips of the picture, then every micro-batch of the run from where it starts."""
    views = run.config.sampling.views
    yield [order.samples(i * views, 1)[0] for i in range(min(_PREVIEWS, len(run.videos)))]
    micro = run.plan.micro_batch
    for k in range(run.start * run.plan.accumulation, run.schedule.steps * run.plan.accumulation):
        yield order.samples(k * micro, micro)


def _keep(batch: Batch) -> tuple[Tensor, Tensor]:
    """Frames and mask keys of the readable clips, copied out of the loader's memory."""
    readable = batch.weight > 0
    return batch.frames[readable].clone(), batch.keys[readable]


@torch.no_grad()
def _picture(run: Run, preview: tuple[Tensor, Tensor], done: int) -> None:
    frames, keys = preview
    if len(frames) == 0:
        return
    config, input = run.config, run.model.input
    mask = masking.make(config.mask.kind, input.grid, config.mask.ratio, keys)
    run.model.eval()
    with _autocast(run):
        pred = run.model(frames.to(run.device), mask.to(run.device)).cpu()
    run.model.train()
    made = reconstruct(pred, frames, mask, input, normalized=config.target.normalize)
    ratio = mask.masked.shape[1] / mask.num_cubes
    title = f"{config.recipe}, step {done}: clips of the training set, {config.mask.kind} mask"
    sheet = draw_reconstruction(made, input, ratio, normalized=config.target.normalize, title=title)
    (run.out / "samples").mkdir(exist_ok=True)
    sheet.save(run.out / "samples" / f"step_{done:07d}.png")


def _save(run: Run, done: int) -> None:
    checkpoint.save(run.out / "checkpoints", done, run.model, run.state(), keep=run.config.checkpoint.keep)


def _finish(run: Run, done: int, how: str, stop: list[int]) -> int:
    if how == "Finished":
        draw_curves(run.out / "metrics.jsonl", run.out / "curves.png")
    if done < run.schedule.steps:
        print(
            f"\nStopped at step {done} of {run.schedule.steps}, checkpoint saved. The same command goes on from there."
        )
        return 128 + stop[0]
    pictures = sorted((run.out / "samples").glob("*.png"))
    print(f"\n{how}: {done} steps, {done * run.plan.clips:,} clips.")
    print(f"  checkpoint      {run.out / 'checkpoints' / f'step_{done}'}")
    print(f"  curves          {run.out / 'curves.png'}  (or: tensorboard --logdir {run.out / 'tensorboard'})")
    if pictures:
        print(f"  reconstruction  {pictures[-1]}")
    return 0


def _build(config: PretrainConfig) -> VideoMAE:
    model = config.model
    return pretrain_model(
        model.size, frames=model.frames, image_size=model.image_size, cube=model.cube, decoder_depth=model.decoder_depth
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
    new, old = flat(config), state["config"]
    fixed = [key for key in new if key not in _FREE and not key.startswith(_FREE_SECTIONS)]
    changed = [f"{key}: {old.get(key)} -> {new[key]}" for key in fixed if old.get(key) != new[key]]
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
    input = model.input
    per_clip = clip_bytes(
        size_of(config.model.size),
        input,
        num_masked=masking.num_masked(config.mask.kind, input.grid, config.mask.ratio),
        decoder_depth=config.model.decoder_depth,
        recompute=config.model.recompute,
        bytes_each=4 if precision == "float32" else 2,
    )
    # gradients and two moments, float32, are still to come
    fixed = 3 * 4 * sum(p.numel() for p in model.parameters())
    clips = config.batch_size * config.sampling.views
    return plan_batch(clips, per_clip=per_clip, fixed=fixed, free=free_memory(device), micro_batch=micro_batch)


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
        "workers": run.workers,
        "threads": torch.get_num_threads(),
    }


def _say_plan(run: Run, resumed_from: Path | None) -> None:
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
    hidden = masking.num_masked(config.mask.kind, model.input.grid, config.mask.ratio)
    passes = run.schedule.steps * config.batch_size / len(run.videos)
    print(f"run       {run.out}")
    print(f"data      {config.data or 'data/demo'}: {len(run.videos):,} videos, {run.workers} workers")
    print(f"model     {model.size}, decoder depth {model.decoder_depth}: {millions:.1f} M parameters")
    print(
        f"clip      {model.frames} x {height} x {width}, stride {config.sampling.stride}; "
        f"{config.mask.kind} mask hides {hidden} of {model.input.num_cubes} cubes"
    )
    print(f"device    {device}, {run.precision}")
    print(
        f"batch     {run.plan.clips} clips a step = "
        f"{run.plan.micro_batch} at a time x {run.plan.accumulation} accumulated"
        + (f" ({config.batch_size} videos x {config.sampling.views} views)" if config.sampling.views > 1 else "")
    )
    print(
        f"schedule  {run.schedule.steps:,} steps ({passes:,.1f} epochs), {run.schedule.warmup_steps:,} of warm-up; "
        f"learning rate {config.optim.base_lr:g} x {config.batch_size}/256 = {run.schedule.peak:.3g}"
    )
    if resumed_from:
        print(f"resuming  at step {run.start}, from {resumed_from}")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
