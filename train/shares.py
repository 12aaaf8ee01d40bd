"""Commands whose processes, as torchrun starts them, share the videos: each takes its own, at its own pace.

    torchrun --nproc-per-node 8 -m train.evaluate k400 --data k400/test.csv --weights runs/b

They meet at the start, where the first makes what is missing and refuses what the user can mend, and at the end, where
it gives the result of all. It alone speaks. Training, where they meet in every step, is in distributed.py.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from kernels.launch import check
from train.cli import user_errors
from train.distributed import ALONE, World, is_of_others, place
from train.machine import pick_device
from train.rendezvous import new_store
from videomae.command_line import nobody_reads

T = TypeVar("T")

# seconds after which a process that is not the first tells of its error: that of the first, the same mostly, ends all
_LATER = 5
_PATIENCE = timedelta(minutes=30)  # for what others have promised to do next; for their shares there is no limit
_LOOK_EVERY, _SAY_AFTER = 0.2, 30.0  # seconds, of waiting for the others
_WHOLE = "0/1"  # --shard, where nobody gave it


@dataclass(frozen=True)
class Shares:
    """The processes of a command, and where they write how far they are; None of one that torchrun did not start."""

    world: World = ALONE
    store: distributed.Store | None = None

    @property
    def said(self) -> str:
        """For the line about the data."""
        return f", shared by {self.world.size} processes" if self.store is not None else ""

    def unit(self, name: str) -> str:
        """Of which the progress is told, which is the first's."""
        return f"{name} of this share" if self.store is not None else name

    def shard(self, asked: str) -> str:
        """i/n, of this process. ValueError when the user gave one, too."""
        if self.store is None:
            return asked
        check(asked == _WHOLE, f"torchrun shares the work by itself: leave out --shard {asked}")
        return f"{self.world.rank}/{self.world.size}"

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is inside is done by the first process, then by the first of every machine, then by the others: they
        find what was rendered, downloaded or written."""
        world, store = self.world, self.store
        if store is not None and not world.is_first:
            # ranks of a machine are neighbours
            before = 0 if world.local_rank == 0 else world.rank - world.local_rank
            while not store.check([f"begun by {before}"]):
                time.sleep(_LOOK_EVERY)
        yield
        if store is not None:
            store.set(f"begun by {world.rank}", "")

    def take(self, count: int, together: int) -> list[int]:
        """This process's of count things, by whole groups of so many neighbours: what a process does at once does not
        depend on how many there are, and so no bit of it does."""
        step = self.world.size * together
        return [
            number
            for begin in range(self.world.rank * together, count, step)
            for number in range(begin, min(begin + together, count))
        ]

    def wait(self, what: str, stop: Sequence[int] = ()) -> bool:
        """Until every process has come to this point, which has a name of its own; False when stop got a signal."""
        if self.store is None:
            return not stop
        here = self.store.add(what, 1)
        say_at = time.monotonic() + _SAY_AFTER
        # a collective would wait where no signal is heard, and not as long as a share may take
        while here < self.world.size and not stop:
            time.sleep(_LOOK_EVERY)
            here = self.store.add(what, 0)
            if time.monotonic() > say_at:
                say_at = float("inf")
                print(f"this share is done; waiting for {self.world.size - here} more", flush=True)
        return not stop

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, in the first one; elsewhere its own alone. To be called after `wait`."""
        if self.store is None:
            return [value]
        found = [value] * self.world.size if self.world.is_first else None
        distributed.gather_object(value, found, dst=0, group=self.world.group)
        return [value] if found is None else found


def command(
    begin: Callable[[Shares, contextlib.ExitStack], T],
    work: Callable[[T], int],
    *,
    prog: str,
    device: str | None,
    stops: type[Exception],
    after: str = "",
) -> int:
    """Run a command in this process of torchrun's, or in the only one; the exit code: of work, or 1 for what stops it,
    2 for wrong use, 130 for Ctrl-C.

    begin: everything that can be refused, with ValueError; what is to be held until the end goes on the stack. stops:
    what work raises when there is no result. after: what the messages of other ends say of how to go on.
    """
    with user_errors(prog):
        here = place()
    name = prog if here.is_first else f"{prog}: {here.name}"
    try:
        with contextlib.ExitStack() as held:
            with user_errors(name), first_speaks(here):
                shares = held.enter_context(_joined(here, device))
                with shares.in_turn():
                    job = begin(shares, held)
            with first_speaks(here):
                return work(job)
    except stops as error:
        print(f"{name}: stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if nobody_reads():
            raise
        print(f"{name}: stopped: {error}{after}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_of_others(error):
            raise
        print(f"{name}: stopped: another process is gone, or hangs: {error}{after}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if here.is_first:
            print(f"\n{prog}: stopped at once{after}", file=sys.stderr)
        return 128 + signal.SIGINT


def refuse_several(why: str) -> None:
    """ValueError, saying why, in one of several processes."""
    here = place()
    with first_speaks(here):
        check(here.size == 1, why)


@contextlib.contextmanager
def first_speaks(world: World) -> Iterator[None]:
    """Inside, only the first process says anything; an error of another comes after the first one's, which ends all."""
    if world.is_first:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except (Exception, SystemExit):
            time.sleep(_LATER)
            raise


@contextlib.contextmanager
def _joined(here: World, device: str | None) -> Iterator[Shares]:
    """Inside, this process can meet the others, and its GPU is the current one. ValueError where it has none."""
    if here is ALONE:
        yield Shares()
        return
    picked = pick_device(device, here.local_rank)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    # what they tell each other is little, and on the host
    store = new_store(here.rank, here.size, _PATIENCE)
    distributed.init_process_group("gloo", store=store, rank=here.rank, world_size=here.size, timeout=_PATIENCE)
    world = replace(here, group=distributed.group.WORLD, patience=_PATIENCE)
    try:
        yield Shares(world, distributed.PrefixStore("shares", store))
        # where another launcher than torchrun started them, the store ends with the first
        left, end = store.add("left", 1), time.monotonic() + _LATER
        while here.is_first and left < here.size and time.monotonic() < end:
            time.sleep(_LOOK_EVERY)
            left = store.add("left", 0)
    finally:
        # where the others are gone there is no waiting for them
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()
