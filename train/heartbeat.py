"""Which process the others wait for: every one tells now and then how far it is, and the first says who is silent or
behind. A collective that hangs knows only that somebody did not come."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from torch.distributed import PrefixStore, TCPStore

from train.distributed import World

T = TypeVar("T")

_INTERVAL, _LIMIT = 5.0, 60.0  # seconds between two beats, and without news until that is said


class Heartbeat:
    """Use it inside `with`; of a process alone it does nothing."""

    def __init__(self, world: World, minutes: float, say: Callable[[str], None]) -> None:
        """minutes: that processes wait for each other; who is missing is said before they end."""
        self._world, self._say = world, say
        self._limit = min(_LIMIT, 60 * minutes / 2)
        self._interval = min(_INTERVAL, self._limit / 4)
        self._count, self._stopped = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def counted(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; how many have come is how far this process is."""
        for batch in batches:
            self._count += 1
            yield batch

    def __enter__(self) -> "Heartbeat":
        if self._world.size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        if self._world.size > 1:
            self._thread.join(self._interval)

    def _run(self) -> None:
        # a connection of its own, to where torchrun's processes found each other
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = PrefixStore("heartbeat", TCPStore(host, port, timeout=timedelta(seconds=30)))
            watch = Watch(self._world.size, self._limit, time.monotonic())
            for beat in itertools.count():
                store.set(str(self._world.rank), f"{beat} {self._count} {self._world.name}")
                if self._world.is_first:
                    for line in watch.see(self._read(store), time.monotonic()):
                        self._say(line)
                if self._stopped.wait(self._interval):
                    return
        except RuntimeError:
            # the store is gone, and the run with it
            return

    def _read(self, store: PrefixStore) -> dict[int, str]:
        ranks = [rank for rank in range(self._world.size) if store.check([str(rank)])]
        return {rank: store.get(str(rank)).decode() for rank in ranks}


class Watch:
    """What the first process makes of the others' beats."""

    def __init__(self, size: int, limit: float, now: float) -> None:
        self._size, self._limit = size, limit
        self._beats = dict.fromkeys(range(size), "")
        self._counts = dict.fromkeys(range(size), -1)
        self._heard, self._moved = dict.fromkeys(range(size), now), dict.fromkeys(range(size), now)
        self._told: set[tuple[int, int]] = set()

    def see(self, found: dict[int, str], now: float) -> list[str]:
        """found: the last beat of every process that has ever told one: number, batches, name. What is to be said."""
        names = {rank: f"process {rank} of {self._size}" for rank in range(self._size)}
        for rank, text in found.items():
            beat, batches, names[rank] = text.split(" ", 2)
            if beat != self._beats[rank]:
                self._beats[rank], self._heard[rank] = beat, now
            if int(batches) != self._counts[rank]:
                self._counts[rank], self._moved[rank] = int(batches), now
        said = []
        furthest = max(self._counts.values())
        for rank, count in self._counts.items():
            silent, still = now - self._heard[rank], now - self._moved[rank]
            if silent > self._limit:
                text = f"{names[rank]}, has not been heard of for {silent:.0f} s: the others wait for it"
            elif still > self._limit and count < furthest:
                text = f"{names[rank]}, has waited {still:.0f} s for its clips: the others wait for it"
            else:
                continue
            if (rank, count) not in self._told:
                self._told.add((rank, count))
                said.append(f"warning: {text}")
        return said
