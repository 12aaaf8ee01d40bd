"""Small pre-training runs to be killed: their command, their processes, what they said, where a kill finds them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.runs import FAST
from tests.videos import moving_frames, write_video
from train.checkpoint import Damaged, checkpoints, read_state

# on two cores a step takes 15 ms, and a checkpoint is being written half of the time
FLAGS = [*FAST.split(), "--batch-size", "4", "--log.every", "1", "--checkpoint.every", "4", "--checkpoint.keep", "3"]
# seconds until the first step; from a kill to the end; until what that leaves, importing torch perhaps, is gone
START, END, ORPHANS = 180.0, 60.0, 20.0
_MARK = "VIDEOMAE_FAULTS"  # a variable that every process of a run inherits


@dataclass(frozen=True)
class Setup:
    """processes: of torchrun; 0 is the plain command. workers: that decode, of each process."""

    processes: int
    workers: int
    steps: int

    def command(self, videos: Path, out: Path) -> list[str]:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes), "-m"]
        return [
            *(sys.executable, "-m", *(launcher if self.processes else []), "train.pretrain", "demo", *FLAGS),
            *("--steps", str(self.steps), "--workers", str(self.workers), "--data", str(videos), "--out", str(out)),
        ]

    @property
    def name(self) -> str:
        return f"{self.processes} processes" if self.processes else "one process"


def make_videos(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(6):
        write_video(folder / f"{i}.mp4", moving_frames(14, 24, 32, seed=i))
    return folder


class Life:
    """One start of a run's command, until it ends."""

    def __init__(self, setup: Setup, videos: Path, out: Path) -> None:
        self.out, self._log, self._mark = out, out.with_suffix(".log"), uuid.uuid4().hex
        self._old = _unfinished(out)
        self.begun = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", _MARK: self._mark}
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                setup.command(videos, out), stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def step(self) -> int | None:
        """The last that it reported."""
        found = re.findall(r"^step (\d+)/", self.said()[-1000:], re.MULTILINE)
        return int(found[-1]) if found else None

    def resumed_at(self) -> int | None:
        found = re.search(r"^resuming  at step (\d+), from", self.said(), re.MULTILINE)
        return int(found[1]) if found else None

    def writes(self) -> set[str]:
        """Checkpoints that it is writing."""
        return {entry[0] for entry in _unfinished(self.out) - self._old}

    def members(self) -> dict[int, str]:
        """All its processes: launcher, rank 0, ..., or trainer, and data worker."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            except OSError:  # gone, or another user's
                continue
            variables = dict(line.split(b"=", 1) for line in environment.split(b"\0") if b"=" in line)
            if variables.get(_MARK.encode()) == self._mark.encode():
                found[int(folder.name)] = _role(command, variables.get(b"RANK"))
        return found

    def wait(self, condition: Callable[[], object], seconds: float, pause: float = 0.005) -> bool:
        """Whether it came true in that time, before the process ended."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until or self.process.poll() is not None:
                return False
            time.sleep(pause)
        return True

    def end(self, seconds: float = END) -> list[str]:
        """Wait for all of its processes to end, and end them; what was wrong with that."""
        wrong = []
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            wrong.append(f"has not ended after {seconds:g} s")
            self.process.kill()
            self.process.wait()
        until = time.monotonic() + (0.0 if wrong else ORPHANS)
        left, reported = self.members(), None
        while left and time.monotonic() < until:
            time.sleep(0.2)
            now = last_reported(self.out)
            if reported not in (None, now):
                break
            left, reported = self.members(), now
        if left and not wrong:
            wrong.append(f"{', '.join(sorted(left.values()))} still there after it ended")
        while left:
            send(left, signal.SIGKILL)
            time.sleep(0.02)
            left = self.members()
        return wrong


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def newest(out: Path) -> int | None:
    """The step of the newest checkpoint."""
    return max((int(path.name.removeprefix("step_")) for path in checkpoints(out / "checkpoints")), default=None)


def last_reported(out: Path) -> int:
    """The last step of metrics.jsonl; 0 where there is none."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def damage(out: Path) -> list[str]:
    """What is wrong with the checkpoints that pass for whole."""
    wrong = []
    for path in checkpoints(out / "checkpoints"):
        try:
            state = read_state(path)
        except Damaged as error:
            wrong.append(f"half-written: {error}")
            continue
        if f"step_{state['step']}" != path.name or not (path / "model.safetensors").exists():
            wrong.append(f"{path.name} is not what it says")
    return wrong


def _unfinished(out: Path) -> set[tuple[str, int, int]]:
    """Names, and what tells one folder from another of the same name."""
    found = set()
    for path in (out / "checkpoints").glob(".step_*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.add((path.name, status.st_ino, status.st_mtime_ns))
    return found


def _role(command: bytes, rank: bytes | None) -> str:
    if b"videomae.data.worker" in command:
        return "data worker"
    if b"torch.distributed.run" in command:
        return "launcher"
    return "trainer" if rank is None else f"rank {rank.decode()}"
