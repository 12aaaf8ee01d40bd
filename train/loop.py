"""The loop of every kind of training, top to bottom: batch, forward, loss, backward, update, report, save."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from train import checkpoint
from train.cli import parse, refuse, user_errors
from train.config import RunConfig
from train.engine import Engine, make_engine
from train.log import RunLog, TooManyNonFinite
from train.picture import draw_curves
from train.run import Run, prepare, say_plan
from train.signals import stop_signals
from train.skipped import Skipped, TooManyUnreadable
from train.verb import Verb
from videomae.data.dataset import Order, Sample
from videomae.data.feed import OnDevice, feed
from videomae.data.loader import NO_EFFORT, Loader

C = TypeVar("C", bound=RunConfig)


def command(
    make: Callable[[C], Verb[C]],
    recipes: dict[str, Callable[[], C]],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    about: str,
) -> int:
    """Run a training command; its exit code: 0 done, 1 the run had to stop, 2 wrong use, 130 and 143 stopped by Ctrl-C,
    SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = _one_length(parse(arguments, recipes, "demo", prog=prog, about=about), recipes, prog)
    try:
        with user_errors(prog):
            run, resumed_from = prepare(make(config))
        say_plan(run, resumed_from)
        return train(run)
    except (TooManyUnreadable, TooManyNonFinite, checkpoint.Damaged, checkpoint.CannotSave) as error:
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, most of all; the last checkpoint is whole
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: stopped at once", file=sys.stderr)
        return 128 + signal.SIGINT


def _one_length(config: C, recipes: dict[str, Callable[[], C]], prog: str) -> C:
    """--epochs on a recipe of so many steps replaces them; both flags together are refused."""
    recipe = recipes[config.recipe]()
    if config.epochs == recipe.epochs or config.steps is None:
        return config
    if config.steps != recipe.steps:
        refuse(prog, "give --steps or --epochs, not both")
    return replace(config, steps=None)


def train(run: Run) -> int:
    """The loop; returns the exit code."""
    config, verb, steps, done = run.config, run.verb, run.schedule.steps, run.start
    if done >= steps and not verb.is_incomplete(run):
        return _finish(run, done, "Already finished", [])
    order = Order(len(run.videos), config.seed, config.data.views_per_decode)
    skipped = Skipped(run.out / "skipped.jsonl", run.videos.paths, done)
    log = RunLog(
        run.out, config.log, start=done, steps=steps, max_nonfinite=config.optim.max_nonfinite, supply=run.supply
    )
    first = verb.first(run)
    loader = Loader(
        verb.reader(),
        run.videos.paths,
        _batches(run, order, first),
        batch_size=max(run.plan.micro_batch, len(first)),
        workers=run.workers,
        config=config.loader,
        known_skips=skipped.known,
        cache=run.cache,
    )
    engine = make_engine(config.engine, run.objective, run.updater)
    with stop_signals() as stop, log, loader, feed(loader, run.device, log.say) as batches:
        if first:
            verb.keep(next(batches))
        verb.begin(run, log)
        saved = done if done else None
        try:
            while done < steps and not stop:
                report = _step(run, engine, done, batches, skipped, log, stop)
                if report is None:
                    break
                done += 1
                verb.after_update(run, done)
                log.push(done, **report)
                if done % config.checkpoint.every == 0 or done == steps:
                    log.flush()
                    _save(run, done)
                    saved = done
                verb.after_step(run, log, done)
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
        fed = next(batches)
        batch = fed.batch
        waits.append(fed.waited)
        effort, ready = effort.plus(batch.effort), ready + batch.ready
        for skip in skipped.see(batch.samples, batch.skips, step + 1):
            log.say(f"skipped: {skip.path}: {skip.reason}")
        micro_real = len(batch.samples) - len(batch.skips)
        real, lost = real + micro_real, lost + len(batch.skips)
        paths += [run.videos.paths[sample.index] for sample in batch.samples]
        inputs = run.verb.inputs(run, fed, step)
        if batch.skips or engine.fixed:
            inputs["weight"] = fed.weight
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


def _batches(run: Run, order: Order, first: list[Sample]) -> Iterator[list[Sample]]:
    """The clips that are read first, then every micro-batch of the run from where it starts."""
    if first:
        yield first
    micro = run.plan.micro_batch
    for k in range(run.start * run.plan.accumulation, run.schedule.steps * run.plan.accumulation):
        yield order.samples(k * micro, micro)


def _save(run: Run, done: int) -> None:
    folder, beside = run.out / "checkpoints", run.verb.extra_weights()
    checkpoint.save(folder, done, run.model, run.state(), keep=run.config.checkpoint.keep, beside=beside)


def _finish(run: Run, done: int, how: str, stop: list[int]) -> int:
    if how == "Finished":
        draw_curves(run.out, run.out / "curves.png")
    if done < run.schedule.steps:
        print(
            f"\nStopped at step {done} of {run.schedule.steps}, checkpoint saved. The same command goes on from there."
        )
        return 128 + stop[0]
    at = run.out / "checkpoints" / f"step_{done}"
    print(f"\n{how}: {done} steps, {done * run.plan.clips:,} clips.")
    print(f"  checkpoint      {at}")
    board = f"  (or: tensorboard --logdir {run.out / 'tensorboard'})" if run.config.log.tensorboard else ""
    print(f"  curves          {run.out / 'curves.png'}{board}")
    for line in run.verb.results(run, at):
        print(f"  {line}")
    return 0
