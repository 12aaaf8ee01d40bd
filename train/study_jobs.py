"""Commands that a study is made of: run several at a time, each once, and go on where a study was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.launch import check
from videomae.wording import counted


@dataclass(frozen=True)
class Job:
    """`python -m` with these arguments. name: of its log and record in the study's folder; needs: jobs before it."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()


class JobFailed(Exception):
    """A command of the study ended with an error; the message has its last line."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    since: float


def run_jobs(
    jobs: Sequence[Job], folder: Path, *, at_once: int, threads: int, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Run what is not done yet, at most at_once commands at a time with so many threads each; the seconds that every
    command took.

    What is done is written to folder/NAME.json with its command: a job whose command changed is run again. A job that
    was stopped is started with the same command, and goes on by itself. No command outlives this one, but for kill -9.
    Raises JobFailed, and Terminated at SIGTERM.
    """
    names = {job.name for job in jobs}
    for job in jobs:
        check(set(job.needs) <= names, f"{job.name} needs {sorted(set(job.needs) - names)}, which are no jobs")
    folder.mkdir(parents=True, exist_ok=True)
    done = {job.name: seconds for job in jobs if (seconds := _seconds(folder / f"{job.name}.json", job)) is not None}
    waiting = [job for job in jobs if job.name not in done]
    running: list[_Running] = []
    if done:
        say(f"{len(done)} of {counted(len(jobs), 'run')} done before")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= set(done)][: at_once - len(running)]:
                waiting.remove(job)
                running.append(_start(job, folder, threads))
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                running.remove(one)
                done[one.job.name] = _settle(one, folder)
                say(f"{len(done)}/{len(jobs)}  {one.job.name}, {done[one.job.name]:.0f} s")
            if not ended:
                time.sleep(0.1)
    finally:
        for one in running:
            one.process.send_signal(signal.SIGTERM)  # a run saves a checkpoint
        for one in running:
            one.process.wait()
            # a part of the time that it will have taken
            record = {"command": list(one.job.arguments), "seconds": _took(one, folder)}
            _part(one.job, folder).write_text(json.dumps(record) + "\n")
        signal.signal(signal.SIGTERM, before)
    return done


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _start(job: Job, folder: Path, threads: int) -> _Running:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / f"{job.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *job.arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    return _Running(job, process, time.monotonic())


def _part(job: Job, folder: Path) -> Path:
    return folder / f"{job.name}.stopped.json"


def _took(one: _Running, folder: Path) -> float:
    """Seconds, with those before it was stopped."""
    return round(time.monotonic() - one.since + (_seconds(_part(one.job, folder), one.job) or 0.0), 1)


def _settle(one: _Running, folder: Path) -> float:
    if one.process.returncode != 0:
        log = folder / f"{one.job.name}.log"
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        raise JobFailed(f"{one.job.name} ended with {one.process.returncode}: {last} (all of it: {log})")
    seconds = _took(one, folder)
    (folder / f"{one.job.name}.json").write_text(json.dumps({"command": one.job.arguments, "seconds": seconds}) + "\n")
    _part(one.job, folder).unlink(missing_ok=True)
    return seconds


def _seconds(path: Path, job: Job) -> float | None:
    """What a record says; None when there is none, or it is of another command."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record["seconds"] if record["command"] == list(job.arguments) else None
