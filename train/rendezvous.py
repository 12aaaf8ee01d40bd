"""Where the processes that torchrun starts find each other: a store that is new with every attempt.

torchrun keeps one store for all its restarts, with the addresses of processes that are gone, on which the next ones
fail (pytorch issue 135712); and its count of restarts is each machine's own. So the first process names every attempt
anew, and tells those who ask it now.
"""

import time
import uuid
from datetime import timedelta

from torch import distributed

_LOOK_EVERY = 0.1  # seconds


def new_store(rank: int, size: int, timeout: timedelta) -> distributed.Store:
    """For this attempt, once all its processes are there. RuntimeError when some do not come in time."""
    shared, *_ = next(distributed.rendezvous("env://", timeout=timeout))
    shared.set_timeout(timeout)
    asked, end = distributed.PrefixStore("attempts", shared), time.monotonic() + timeout.total_seconds()
    return _ask(asked, rank, size, end) if rank else _call(asked, size, end)


def _call(asked: distributed.Store, size: int, end: float) -> distributed.Store:
    """The first process's part: answer every question, those of earlier attempts too, until all have come."""
    name = uuid.uuid4().hex
    store = distributed.PrefixStore(name, asked)
    missing = list(range(1, size))
    while missing:
        for rank in missing:
            if asked.check([f"question/{rank}"]):
                asked.set(f"answer/{asked.get(f'question/{rank}').decode()}", name)
        missing = [rank for rank in missing if not store.check([f"came/{rank}"])]
        _wait(end, f"processes {', '.join(map(str, missing))} of {size} have not come")
    return store


def _ask(asked: distributed.Store, rank: int, size: int, end: float) -> distributed.Store:
    question = uuid.uuid4().hex
    asked.set(f"question/{rank}", question)
    while not asked.check([f"answer/{question}"]):
        _wait(end, f"process 0 of {size} has not come")
    store = distributed.PrefixStore(asked.get(f"answer/{question}").decode(), asked)
    store.set(f"came/{rank}", "")
    return store


def _wait(end: float, otherwise: str) -> None:
    if time.monotonic() > end:
        raise distributed.DistStoreError(otherwise)
    time.sleep(_LOOK_EVERY)
