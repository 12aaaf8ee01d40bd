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
from videomae.weight_files import write_atomically
from videomae.wording import counted

_TRAININGS = ("train.pretrain", "train.moco", "train.finetune", "train.detect")


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
    history: list[list[str]]
    process: subprocess.Popen[bytes]
    since: float
    earlier: float  # seconds before it was stopped


def run_jobs(
    jobs: Sequence[Job], folder: Path, *, at_once: int, threads: int, say: Callable[[str], None] = print
) -> dict[str, float]:
    """Run what is not done yet, at most at_once commands at a time with so many threads each; the seconds that every
    command took.

    What is done is written to folder/NAME.json with its command and those that it needs: when one of them changed, a
    job is run again, anew. A job that was stopped is started with the same command, and goes on by itself. No command
    outlives this one, but for kill -9. Raises JobFailed, OSError, and Terminated at SIGTERM.
    """
    names = {job.name for job in jobs}
    for job in jobs:
        check(set(job.needs) <= names, f"{job.name} needs {sorted(set(job.needs) - names)}, which are no jobs")
    folder.mkdir(parents=True, exist_ok=True)
    history = _histories(jobs)
    done = {
        job.name: seconds for job in jobs if (seconds := _seconds(_path(job, folder), history[job.name])) is not None
    }
    waiting = [job for job in jobs if job.name not in done]
    running: list[_Running] = []
    if done:
        say(f"{len(done)} of {counted(len(jobs), 'run')} done before")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= set(done)][: at_once - len(running)]:
                waiting.remove(job)
                running.append(_start(job, history[job.name], folder, threads))
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
            _write(_part(one.job, folder), one)
        signal.signal(signal.SIGTERM, before)
    return done


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _histories(jobs: Sequence[Job]) -> dict[str, list[list[str]]]:
    """Of every job its command, and those of what it needs, of what that needs, ..."""
    by_name = {job.name: job for job in jobs}

    def history(job: Job) -> list[list[str]]:
        return [list(job.arguments), *(command for name in job.needs for command in history(by_name[name]))]

    return {job.name: history(job) for job in jobs}


def _start(job: Job, history: list[list[str]], folder: Path, threads: int) -> _Running:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    stopped = _seconds(_part(job, folder), history)
    # what another command left behind is not gone on with
    is_other = stopped is None and (_path(job, folder).exists() or _part(job, folder).exists())
    anew = ["--resume", "never"] if is_other and job.arguments[0] in _TRAININGS else []
    with (folder / f"{job.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *job.arguments, *anew], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    running = _Running(job, history, process, time.monotonic(), stopped or 0.0)
    _path(job, folder).unlink(missing_ok=True)
    _write(_part(job, folder), running)
    return running


def _path(job: Job, folder: Path) -> Path:
    return folder / f"{job.name}.json"


def _part(job: Job, folder: Path) -> Path:
    return folder / f"{job.name}.stopped.json"


def _settle(one: _Running, folder: Path) -> float:
    if one.process.returncode != 0:
        log = folder / f"{one.job.name}.log"
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        raise JobFailed(f"{one.job.name} ended with {one.process.returncode}: {last} (all of it: {log})")
    seconds = _write(_path(one.job, folder), one)
    _part(one.job, folder).unlink(missing_ok=True)
    return seconds


def _write(path: Path, one: _Running) -> float:
    """Record the seconds up to now, with those before a stop."""
    seconds = round(time.monotonic() - one.since + one.earlier, 1)
    record = json.dumps({"history": one.history, "seconds": seconds}) + "\n"
    write_atomically(path, lambda file: file.write_text(record))
    return seconds


def _seconds(path: Path, history: list[list[str]]) -> float | None:
    """What a record says; None when there is none, or it is of other commands."""
    try:
        record = json.loads(path.read_text())
        return record["seconds"] if record["history"] == history else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
