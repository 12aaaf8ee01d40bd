"""Pre-train a VideoMAE: `python -m train.pretrain [RECIPE] [--data PATH] [--section.field VALUE]`.

Top to bottom: what was asked for, the loop, and where its results are; train/run.py is what a run needs.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from train import checkpoint
from train.cli import parse, refuse, user_errors
from train.engine import Engine, make_engine
from train.log import RunLog, TooManyNonFinite
from train.picture import draw_curves, draw_reconstruction, reconstruct
from train.recipes import PRETRAIN, PretrainConfig
from train.run import Run, prepare, say_plan
from train.signals import stop_signals
from train.skipped import Skipped, TooManyUnreadable
from videomae.data.dataset import Order, Sample
from videomae.data.feed import OnDevice, feed
from videomae.data.loader import NO_EFFORT, Loader

PROG = "python -m train.pretrain"
_PREVIEWS = 3  # clips in the reconstruction picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 the run had to stop, 2 wrong use, 130 and 143 stopped by
    Ctrl-C, SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    about = "Pre-train a VideoMAE on videos; with no argument, the demo."
    config = _one_length(parse(arguments, PRETRAIN, "demo", prog=PROG, about=about))
    try:
        with user_errors(PROG):
            run, resumed_from = prepare(config)
        say_plan(run, resumed_from)
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


def pretrain(run: Run) -> int:
    """The loop; returns the exit code."""
    config, steps, done = run.config, run.schedule.steps, run.start
    if done >= steps:
        return _finish(run, done, "Already finished", [])
    order = Order(len(run.videos), config.seed, config.data.views_per_decode)
    skipped = Skipped(run.out / "skipped.jsonl", run.videos.paths, done)
    log = RunLog(
        run.out, config.log, start=done, steps=steps, max_nonfinite=config.optim.max_nonfinite, supply=run.supply
    )
    loader = Loader(
        run.reader,
        run.videos.paths,
        _batches(run, order),
        batch_size=max(run.plan.micro_batch, min(_PREVIEWS, len(run.videos))),
        workers=run.workers,
        config=config.loader,
        known_skips=skipped.known,
        cache=run.cache,
    )
    engine = make_engine(config.engine, run.objective, run.updater)
    with stop_signals() as stop, log, loader, feed(loader, run.device, log.say) as batches:
        preview = _keep(next(batches))
        saved = done if done else None
        try:
            while done < steps and not stop:
                report = _step(run, engine, done, batches, skipped, log, stop)
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
    run: Run, engine: Engine, step: int, batches: Iterator[OnDevice], skipped: Skipped, log: RunLog, stop: list[int]
) -> dict[str, Any] | None:
    """One update: micro-batches forward and backward, then the optimiser. step counts from 0.

    Returns what to report; None when a signal came between two micro-batches: a large step can take minutes.
    """
    clips = run.plan.clips
    real, lost, ready, effort = 0, 0, 0, NO_EFFORT
    paths: list[str] = []
    waits: list[Callable[[], float]] = []
    for _ in range(run.plan.accumulation):
        if stop:
            return None
        batch, frames, weight, keys, waited = next(batches)
        waits.append(waited)
        effort, ready = effort.plus(batch.effort), ready + batch.ready
        for skip in skipped.see(batch.samples, batch.skips, step + 1):
            log.say(f"skipped: {skip.path}: {skip.reason}")
        micro_real = len(batch.samples) - len(batch.skips)
        real, lost = real + micro_real, lost + len(batch.skips)
        paths += [run.videos.paths[sample.index] for sample in batch.samples]
        inputs = {"frames": frames, "keys": keys}
        if batch.skips or engine.fixed:
            inputs["weight"] = weight
        # the micro-batch's share of the step, as if all clips were real; corrected below when some are not
        engine.micro_batch(inputs, micro_real / clips)
    factor = clips / real if 0 < real < clips else 1.0
    return {
        "values": engine.update(step, grad_factor=factor, skip=real == 0),
        "lr": run.schedule.at(step),
        "clips": clips,
        "skipped": lost,
        "waited": lambda: sum(wait() for wait in waits),
        "effort": effort,
        "ready": ready / run.plan.accumulation,
        "paths": paths,
    }


def _batches(run: Run, order: Order) -> Iterator[list[Sample]]:
    """First the clips of the picture, then every micro-batch of the run from where it starts."""
    views = run.config.data.views_per_decode
    yield [order.samples(i * views, 1)[0] for i in range(min(_PREVIEWS, len(run.videos)))]
    micro = run.plan.micro_batch
    for k in range(run.start * run.plan.accumulation, run.schedule.steps * run.plan.accumulation):
        yield order.samples(k * micro, micro)


def _keep(batch: OnDevice) -> tuple[Tensor, Tensor]:
    """Frames and mask keys of the readable clips, copied out of the feed's memory to the host's."""
    readable = batch.weight > 0
    return batch.frames[readable].cpu(), batch.keys[readable].cpu()


@torch.no_grad()
def _picture(run: Run, preview: tuple[Tensor, Tensor], done: int) -> None:
    frames, keys = preview
    if len(frames) == 0:
        return
    config, input = run.config, run.model.input
    mask = run.objective.mask(keys)
    run.model.eval()
    pred = run.objective.predict(frames.to(run.device), mask.to(run.device)).cpu()
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


if __name__ == "__main__":
    raise SystemExit(main())
