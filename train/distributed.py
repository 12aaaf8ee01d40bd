"""Processes that train together, one for each GPU, as torchrun starts them: which of them this one is, and what they
tell each other.

    torchrun --nproc-per-node 8 -m train.pretrain k400-base-800 --data k400/train.csv

Every process decodes and computes its own share of each step's clips; PyTorch's DistributedDataParallel adds up the
gradients while the last backward pass runs. The first process alone reports, validates and saves.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from kernels.launch import check
from train.machine import pick_device
from train.rendezvous import new_store
from videomae.data.worker import die_with

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them. group: where they talk to each other on the host; None
    of one that torchrun did not start."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    group: distributed.ProcessGroup | None = None
    patience: timedelta = timedelta(minutes=30)  # with the others

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"process {self.rank} of {self.size}, on {socket.gethostname()}"

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is inside is done by the first process, then by the first of every machine, then by the others: they
        find what was rendered, downloaded or written."""
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.meet()
        yield
        for _ in range(2 - turn):
            self.meet()

    def meet(self) -> None:
        """Wait for all others. RuntimeError, naming who is missing, when that takes too long."""
        if self.group is not None:
            # without a time of its own it would be torch's, not the group's
            distributed.monitored_barrier(self.group, self.patience, wait_all_ranks=True)

    def from_first(self, value: T) -> T:
        """The first process's value."""
        if self.group is None:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def everyones(self, value: T) -> list[T]:
        """All processes' values, by rank."""
        if self.group is None:
            return [value]
        values: list[T] = [value] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self.group is None:
            return value
        found = torch.tensor(value)
        distributed.all_reduce(found, distributed.ReduceOp.MIN, group=self.group)
        return int(found)

    def check_same(self, **facts: object) -> None:
        """ValueError when a process's facts are not the first one's."""
        theirs = self.from_first(facts)
        different = [name for name, value in facts.items() if value != theirs[name]]
        check(
            not different,
            f"{self.name}, finds other {' and '.join(different)} than the first process: "
            + "; ".join(f"{facts[name]}, not {theirs[name]}" for name in different),
        )


ALONE = World()


def place() -> World:
    """This process's place, as torchrun's variables say, before it talks to the others. ValueError where they make no
    sense."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "0" if name == "LOCAL_RANK" else "1") for name in names]
    check(all(value.isdecimal() for value in values), f"{', '.join(names)} must be numbers; got {', '.join(values)}")
    rank, size, local_rank, local_size = map(int, values)
    here = World(rank, size, local_rank, local_size)
    check(
        here.rank < here.size and here.local_rank < here.local_size <= here.size,
        f"no such place: {', '.join(f'{name} {value}' for name, value in zip(names, values, strict=True))}",
    )
    return here


@contextlib.contextmanager
def joined(wanted: str | None, minutes: float) -> Iterator[World]:
    """Inside, this process is one of the run's, which wait at most so long for each other, and its GPU is the current
    one. wanted: cuda, cpu, or whichever is there. Raises ValueError as `place` and `pick_device` do, RuntimeError when
    the others do not come."""
    here = place()
    if here is ALONE:
        yield here
        return
    # processes of a torchrun that was killed would go on beside those of the next start, into the same folder
    die_with(os.getppid())
    _find_launcher()
    device = pick_device(wanted, here.local_rank)
    timeout, gpu = timedelta(minutes=minutes), device if device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    distributed.init_process_group(
        "nccl" if gpu else "gloo",
        store=new_store(here.rank, here.size, timeout),
        rank=here.rank,
        world_size=here.size,
        timeout=timeout,
        device_id=gpu,
    )
    group = distributed.new_group(backend="gloo", timeout=timeout) if gpu else distributed.group.WORLD
    try:
        yield replace(here, group=group, patience=timeout)
    finally:
        # where the others are gone there is no waiting for them
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


def _find_launcher() -> None:
    """RuntimeError when torchrun is gone already, which the rendezvous would wait for."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=60).close()
    except OSError as error:
        raise RuntimeError(f"torchrun is gone: {error}") from error


def is_of_others(error: RuntimeError) -> bool:
    """Whether it came because another process is gone, or does not answer."""
    # what a data worker failed on may hold any word
    text = str(error).partition("a data worker failed")[0]
    names = ("gloo", "NCCL", "monitored", "torchrun")
    return isinstance(error, distributed.DistError) or any(name in text for name in names)
