"""Processes that find each other by a store that has seen others before them."""

import threading
from datetime import timedelta

import pytest
from torch import distributed

from train import rendezvous
from train.distributed import is_of_others
from train.rendezvous import new_store


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """The store of all restarts, as torchrun keeps it."""
    store = distributed.HashStore()
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, timeout: iter([(store, 0, 3)]))
    monkeypatch.setattr(rendezvous, "_LOOK_EVERY", 0.001)
    return store


def meet(size, ranks):
    """The stores that processes of these ranks get, which start in this order."""
    found = {}

    def come(rank):
        found[rank] = new_store(rank, size, timedelta(seconds=20))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("ranks", [(0, 1, 2), (2, 1, 0)])
def test_every_attempt_has_a_store_of_its_own(ranks):
    for attempt in range(3):
        stores = meet(3, ranks)
        assert not stores[1].check(["key"])
        stores[0].set("key", str(attempt))
        assert [stores[rank].get("key") for rank in range(3)] == [str(attempt).encode()] * 3


def test_another_number_of_processes_may_come_after_a_restart():
    for size in (3, 2, 1, 4):
        stores = meet(size, range(size))
        assert stores[size - 1].add("count", 1) == 1


def test_who_does_not_come_is_named(shared):
    meet(3, range(3))
    with pytest.raises(RuntimeError, match="processes 1, 2 of 3 have not come") as end:
        new_store(0, 3, timedelta(seconds=0.01))
    assert is_of_others(end.value)
    assert not is_of_others(RuntimeError("a data worker failed on Task('/igloo/a.mp4'):\nKeyError: 'gloo'"))
    # what asked in an earlier attempt has its answer, and nobody who is gone gets this one's
    with pytest.raises(RuntimeError, match="process 0 of 3 has not come"):
        new_store(1, 3, timedelta(seconds=0.01))
