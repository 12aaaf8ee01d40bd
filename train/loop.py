"""The loop of every kind of training, top to bottom: batch, forward, loss, backward, update, report, save."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from train import checkpoint
from train.arrivals import LAG, Arrivals
from train.cli import parse, refuse, user_errors
from train.config import RunConfig
from train.distributed import World, is_of_others, joined, place
from train.engine import Engine, make_engine, make_parallel
from train.heartbeat import Heartbeat
from train.log import QuietLog, RunLog, TooManyNonFinite, goes_on
from train.picture import draw_curves
from train.run import Run, prepare, say_plan
from train.shares import first_speaks
from train.signals import stop_signals
from train.skipped import Skipped, TooManyUnreadable
from train.verb import Verb
from videomae.command_line import nobody_reads
from videomae.data.dataset import Order, Sample
from videomae.data.feed import OnDevice, feed
from videomae.data.loader import NO_EFFORT, Loader
from videomae.weight_files import write_atomically
from videomae.wording import counted

C = TypeVar("C", bound=RunConfig)


def command(
    make: Callable[[C], Verb[C]],
    recipes: dict[str, Callable[[], C]],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    about: str,
) -> int:
    """Run a training command; its exit code: 0 done, 1 the run had to stop, 2 wrong use, 130, 138 and 143 stopped by
    Ctrl-C, SIGUSR1, SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with user_errors(prog):
        here = place()
    with first_speaks(here):
        config = _one_length(parse(arguments, recipes, "demo", prog=prog, about=about), recipes, prog)
    try:
        with contextlib.ExitStack() as stack:
            with user_errors(prog):
                world = stack.enter_context(joined(config.device, config.patience))
                with first_speaks(world):
                    run, resumed_from = prepare(make(config), world)
                    if run.claim is not None:
                        stack.callback(run.claim.close)
                    say_plan(run, resumed_from)
            return train(run)
    except (TooManyUnreadable, TooManyNonFinite, checkpoint.Damaged, checkpoint.CannotSave) as error:
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, most of all; the last checkpoint is whole
        if nobody_reads():
            raise
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_of_others(error):
            raise
        print(f"{prog}: stopped: {here.name}: another process is gone, or hangs: {error}", file=sys.stderr)
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
        return _finish(run, done, "Already finished", []) if run.world.is_first else 0
    order = Order(len(run.videos), config.seed, config.data.views_per_decode)
    world = run.world
    skipped = Skipped(run.out / "skipped.jsonl", run.videos.paths, done, world.rank)
    log = _log(run)
    first = verb.first(run) if world.is_first else []
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
    heart = Heartbeat(world, config.patience, log.say)
    with _stop_signals(world) as stop, log, heart, loader, feed(loader, run.device, log.say) as taken:
        engine, batches = _engine(run, stop), heart.counted(taken)
        if first:
            verb.keep(next(batches))
        if isinstance(log, RunLog):
            verb.begin(run, log)
        saved, asked = done if done else None, Asked(stop, world)
        saver = checkpoint.Saver(run.out / "checkpoints", config.checkpoint, log.say)
        try:
            while done < steps and not asked.after(done):
                report = _step(run, engine, done, batches, skipped, log, asked)
                if report is None:
                    break
                done += 1
                asked.see(done, report["values"])
                log.push(done, **report)
                verb.after_update(run, done)
                if done % config.checkpoint.every == 0 or done == steps:
                    log.flush()
                    _save(run, saver, done)
                    saved = done
                elif verb.looks_after(run, done):
                    run.gather()
                if isinstance(log, RunLog):
                    verb.after_step(run, log, done)
        finally:
            # stopped by a signal, by unreadable videos, by steps that were not finite: what was learned so far is sound
            error = sys.exc_info()[1]
            if not isinstance(error, KeyboardInterrupt):
                # of weights that are spread, the others would have to help
                if saved != done and (error is None or run.spread is None):
                    _save(run, saver, done)
                log.flush()
                skipped.flush()
                saver.finish()
    code = _finish(run, done, "Finished", stop) if world.is_first else _code(run, done, stop)
    # torchrun ends all as soon as one has ended: the first has saved, drawn and spoken before
    world.meet()
    return code


def _stop_signals(world: World) -> contextlib.AbstractContextManager[list[int]]:
    if world.group is None:
        return stop_signals()
    return stop_signals("a step or two, all processes together" if world.is_first else None, is_last_word=True)


class Asked:
    """Whether the run is to stop. Alone, a process knows by itself; several stop after the same step, LAG after the one
    in which they told each other."""

    def __init__(self, stop: list[int], world: World) -> None:
        """stop: the signals that this process got."""
        self._stop, self._is_alone = stop, world.group is None
        self._told: Arrivals[int] = Arrivals()
        self._since: int | None = None  # the step

    def at_once(self) -> bool:
        """Within a step, which the others could not finish without this process."""
        return self._is_alone and bool(self._stop)

    def after(self, done: int) -> bool:
        return self.at_once() or (self._since is not None and done >= self._since + LAG)

    def see(self, done: int, values: Tensor) -> None:
        """What the engine returned for a step."""
        if self._is_alone:
            return
        for step, (*_, asked) in self._told.push(done, values):
            if asked and self._since is None:
                self._since = step


def _step(
    run: Run, engine: Engine, step: int, batches: Iterator[OnDevice], skipped: Skipped, log: QuietLog, asked: Asked
) -> dict[str, Any] | None:
    """One update: micro-batches forward and backward, then the optimiser. step counts from 0.

    Returns what to report; None when a signal came between two micro-batches: a large step can take minutes.
    """
    clips = run.plan.clips
    real, lost, ready, effort = 0, 0, 0, NO_EFFORT
    paths: list[str] = []
    waits: list[Callable[[], float]] = []
    for part in range(run.plan.accumulation):
        if asked.at_once():
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
        engine.micro_batch(inputs, micro_real / clips, last=part + 1 == run.plan.accumulation)
    return {
        "values": engine.update(step, real=real, clips=clips),
        "lr": run.schedule.at(step),
        "clips": clips,
        "skipped": lost,
        "waited": lambda: sum(wait() for wait in waits),
        "effort": effort,
        "ready": ready / run.plan.accumulation,
        "paths": paths,
    }


def _batches(run: Run, order: Order, first: list[Sample]) -> Iterator[list[Sample]]:
    """The clips that are read first, then this process's micro-batches of the run from where it starts."""
    if first:
        yield first
    micro, processes = run.plan.micro_batch, run.plan.processes
    for k in range(run.start * run.plan.accumulation, run.schedule.steps * run.plan.accumulation):
        # neighbours in the order are neighbours in rank: a step has the same clips whatever the number of processes
        yield order.samples((k * processes + run.world.rank) * micro, micro)


def _log(run: Run) -> QuietLog:
    if not run.world.is_first:
        return QuietLog()
    config = run.config
    return RunLog(
        *(run.out, config.log),
        start=run.start,
        steps=run.schedule.steps,
        max_nonfinite=config.optim.max_nonfinite,
        supply=run.supply,
    )


def _engine(run: Run, stop: list[int]) -> Engine:
    name = run.config.engine
    if run.world.group is None:
        return make_engine(name, run.objective, run.updater)
    if run.spread is None:
        return make_parallel(name, run.objective, run.updater, run.model, stop)
    return make_parallel(name, run.verb.objective(run.spread, run.precision), run.updater, run.spread, stop)


def _save(run: Run, saver: checkpoint.Saver, done: int) -> None:
    """Every process calls it; the first one writes."""
    run.gather()
    if run.world.is_first:
        models = {"model.safetensors": run.model, **run.verb.extra_weights()}
        saver.save(checkpoint.take(done, models, run.updater.moments(), run.state()))
    elif run.spread is not None:
        for _ in run.updater.moments():
            pass


def _finish(run: Run, done: int, how: str, stop: list[int]) -> int:
    curves = run.out / "curves.png"
    if how == "Finished":
        with goes_on(curves.name):
            write_atomically(curves, lambda file: draw_curves(run.out, file))
    if done < run.schedule.steps:
        print(
            f"\nStopped at step {done} of {run.schedule.steps}, checkpoint saved. The same command goes on from there."
        )
        return _code(run, done, stop)
    at = run.out / "checkpoints" / f"step_{done}"
    print(f"\n{how}: {counted(done, 'step')}, {counted(done * run.plan.clips, 'clip')}.")
    print(f"  checkpoint      {at}")
    board = f"  (or: tensorboard --logdir {run.out / 'tensorboard'})" if run.config.log.tensorboard else ""
    if curves.exists():
        print(f"  curves          {curves}{board}")
    for line in run.verb.results(run, at):
        print(f"  {line}")
    return 0


def _code(run: Run, done: int, stop: list[int]) -> int:
    # where only another process was told to stop, as SIGTERM tells
    return 0 if done >= run.schedule.steps else 128 + (stop[0] if stop else signal.SIGTERM)
