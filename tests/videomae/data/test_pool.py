"""A pool of workers: whatever one of them does, every task is settled once, by name, and the others go on."""

import math
import os
import time
from collections import Counter

import pytest

from tests.services import Odd, OddJobs, OpenByDecord
from tests.videos import moving_frames, write_video
from videomae.data import pool
from videomae.data.pool import Pool, perform_all


def settle_all(tasks, workers=2, timeout=60.0):
    begin = time.monotonic()
    outcomes = list(perform_all(OddJobs(), tasks, workers=workers, timeout=timeout))
    return {outcome.task: outcome for outcome in outcomes}, len(outcomes), time.monotonic() - begin


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        pytest.param("sleep in C", "took longer than 5 s", marks=pytest.mark.long),
        pytest.param("crash in C", "died (SIGSEGV)", marks=pytest.mark.long),
        pytest.param("exit", "died (exit code 7)", marks=pytest.mark.long),
        ("kill", "died (SIGKILL)"),
    ],
)
def test_a_worker_that_hangs_or_dies_costs_the_task_it_had(what, reason):
    tasks = [Odd(what if n == 3 else "work", n) for n in range(12)]
    by_task, count, seconds = settle_all(tasks, timeout=5)
    assert count == len(tasks) == len(by_task)
    assert reason in by_task[tasks[3]].lost
    assert by_task[tasks[3]].value is None
    for task in tasks:
        if task.number != 3:
            assert by_task[task].lost is None
            assert by_task[task].value[0] == task.number
    assert seconds < 120


@pytest.mark.long
def test_every_task_may_be_bad():
    tasks = [Odd("kill", n) for n in range(4)]
    by_task, count, _ = settle_all(tasks)
    assert count == 4
    assert all("SIGKILL" in outcome.lost for outcome in by_task.values())


@pytest.mark.parametrize(
    ("number", "visible", "see_gpus", "seen"),
    [(None, None, True, "0"), ("2", None, True, "2"), ("2", "4,5,GPU-6", True, "GPU-6"), ("2", "4,5,6", False, "")],
)
def test_workers_see_the_gpu_of_their_process_or_none(number, visible, see_gpus, seen, monkeypatch):
    for name, value in (("LOCAL_RANK", number), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with Pool(OddJobs(), workers=1, timeout=60, see_gpus=see_gpus) as workers:
        workers.put(Odd("GPUs", 0))
        while not (settled := workers.settle()):
            pass
    assert [outcome.value for outcome in settled] == [seen]


def test_a_bug_ends_it_with_the_workers_own_traceback():
    with pytest.raises(RuntimeError, match="number=2(?s:.)*KeyError: 'a bug'"):
        settle_all([Odd("raise" if n == 2 else "work", n) for n in range(4)])


@pytest.mark.long
def test_decord_that_waits_for_a_pipe_is_ended(tmp_path):
    good = str(write_video(tmp_path / "good.mp4", moving_frames(9)))
    pipe = str(tmp_path / "pipe.mp4")
    os.mkfifo(pipe)
    outcomes = {o.task: o for o in perform_all(OpenByDecord(), [pipe, good], workers=1, timeout=5)}
    assert outcomes[pipe].lost == "took longer than 5 s"
    assert outcomes[good].value == 9


@pytest.mark.long
def test_takes_tasks_only_a_little_ahead():
    taken = []

    def tasks():
        for n in range(50):
            taken.append(n)
            yield Odd("work", n)

    for done, _ in enumerate(perform_all(OddJobs(), tasks(), workers=1, timeout=60)):
        assert len(taken) <= done + 5
    assert len(taken) == 50


@pytest.mark.long
def test_works_on_as_many_tasks_at_once_as_there_are_workers():
    by_task, _, _ = settle_all([Odd("wait", n) for n in range(6)], workers=3)
    assert len({outcome.value[1] for outcome in by_task.values()}) == 3


@pytest.mark.long
def test_workers_make_room_for_fresh_ones_without_losing_a_task():
    tasks = [Odd("work", n) for n in range(40)]
    outcomes = list(perform_all(OddJobs(), tasks, workers=2, timeout=60, lifetime=8))
    assert sorted(outcome.task.number for outcome in outcomes) == list(range(40))
    assert all(outcome.lost is None for outcome in outcomes)
    by_worker = Counter(outcome.value[1] for outcome in outcomes)
    assert max(by_worker.values()) == 8
    assert len(by_worker) >= 5


@pytest.mark.long
def test_leaves_no_process_behind():
    with Pool(OddJobs(), 2, 60.0) as pool:
        pids = pool.pids
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_start_that_takes_too_long_is_tried_again_and_its_tasks_are_not_to_blame(monkeypatch):
    """From a disk that many workers read at once."""
    started = []

    def deadline(worker, timeout):
        if worker not in started:
            started.append(worker)
        return 0 if not worker.ready and started.index(worker) < 3 else math.inf

    monkeypatch.setattr(pool._Worker, "deadline", deadline)
    by_task, count, _ = settle_all([Odd("work", n) for n in range(4)])
    assert count == 4
    assert all(outcome.lost is None for outcome in by_task.values())
    assert len(started) == 5


def test_starts_that_all_take_too_long_are_given_up(monkeypatch):
    monkeypatch.setattr(pool, "_START_LIMIT", 0.01)
    with pytest.raises(RuntimeError, match=r"a data worker could not start: took longer than 0.01 s"):
        settle_all([Odd("work", 1)])
