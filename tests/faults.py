"""The fault campaign: small pre-training runs are killed at random moments and started again by the same command, until
they are done: `python -m tests.faults [--kills N] [--seed S] [--lanes L] [--out FILE]`.

Kills are -9, -15, and -STOP for a while, then -9: of the only process; under torchrun of either process, of the
launcher alone, or of all at once, as a scheduler does; and -9 of data workers, which a run outlives. After every one
the run must be gone within a minute, no process of it left, every checkpoint whole; after -15 all that was learned must
be saved, within 30 seconds; the next start must go on from the newest checkpoint. In the end weights and metrics must
be those of a run that nobody killed. Faults are listed, and make the exit code 1.
"""

import argparse
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.fault_report import Kill, Story, write_report
from tests.fault_runs import START, Life, Setup, damage, last_reported, make_videos, newest, send
from tests.runs import metrics, weights
from train.checkpoint import checkpoints
from videomae.data.pool import available_cpus

HOWS = ("-9", "-15", "-STOP, -9")
SAVE = 30.0  # seconds that -15 leaves a run to save
_WRITE = 0.1  # seconds that a checkpoint takes, about
_CALM = 1.0  # seconds of training that a kill comes at any moment of
_AIMED, _EARLY = 0.4, 0.04  # shares of kills that wait for a write to begin, and that do not wait for the first step


@dataclass(frozen=True)
class Campaign:
    """What all stories share. kinds: victims and ways to kill them; all if empty."""

    videos: Path
    folder: Path
    kinds: tuple[tuple[str, str], ...] = ()

    def reference(self, setup: Setup) -> Path:
        return self.folder / f"whole_{setup.processes}_{setup.steps}"

    def kinds_of(self, setup: Setup) -> list[tuple[str, str]]:
        victims = ("rank 0", "rank 1", "launcher", "all") if setup.processes else ("trainer",)
        every = [(victim, how) for victim in victims for how in HOWS]
        return [kind for kind in every if not self.kinds or kind in self.kinds]


def run_whole(campaign: Campaign, setup: Setup) -> None:
    """The run that nobody kills."""
    life = Life(setup, campaign.videos, campaign.reference(setup))
    wrong = life.end(600)
    if wrong or life.process.returncode:
        raise SystemExit(f"a run that nobody killed failed: {wrong}\n{life.said()[-2000:]}")


def tell(campaign: Campaign, setup: Setup, kills: int, name: str) -> Story:
    """Start, kill, start again: so many times that count, or until the run is done; then to its end."""
    story, out, chance = Story(name, setup), campaign.folder / name, random.Random(name)
    kinds = campaign.kinds_of(setup)
    chance.shuffle(kinds)
    while True:
        before = newest(out)
        life = Life(setup, campaign.videos, out)
        story.starts += 1
        strikes = sum(kill.counts for kill in story.kills) < kills
        early = strikes and chance.random() < _EARLY
        if early:
            time.sleep(chance.uniform(0, 4))
        elif life.wait(lambda life=life: life.step() is not None, START):
            _see_start(story, life, before)
        elif life.process.poll() is None:
            story.fault(f"no step {START:g} s after its start")
        if strikes and not early and setup.workers:
            _strike_worker(story, life, chance)
        if not strikes or not _strike(story, life, chance, kinds[len(story.kills) % len(kinds)], early):
            break
        for text in damage(out):
            story.fault(text)
        story.read += len(checkpoints(out / "checkpoints"))
        if life.process.returncode == 0:  # -15 in its last step
            break
    _finish(campaign, story, life)
    return story


def _see_start(story: Story, life: Life, before: int | None) -> None:
    """It trains: from where it should? before: the newest checkpoint's step."""
    if story.kills and story.kills[-1].resumed is None:
        story.kills[-1] = replace(story.kills[-1], resumed=time.monotonic() - life.begun)
    if life.resumed_at() != before:
        story.fault(f"resumed at {life.resumed_at()} where the newest checkpoint was of {before}")
    if "passed over" in life.said():
        story.fault(f"passed over a checkpoint: {life.said()[-1000:]}")


def _strike(story: Story, life: Life, chance: random.Random, kind: tuple[str, str], early: bool) -> bool:
    """Kill, wait for the end, see what was left; False where it ended before."""
    victim, how = kind
    if not early:
        if chance.random() < _AIMED:
            life.wait(life.writes, 10, pause=0.001)
            time.sleep(chance.uniform(0, _WRITE))
        else:
            time.sleep(chance.uniform(0, _CALM))
    members = life.members()
    if life.process.poll() is not None or not members:
        return False
    pids = [pid for pid, role in members.items() if victim in (role, "all")]
    if not pids:  # it has not come so far, or is about to end
        victim, pids = "all", list(members)
    seen = life.writes()
    send(pids, signal.SIGKILL if how == "-9" else signal.SIGTERM if how == "-15" else signal.SIGSTOP)
    seen &= life.writes()
    if how == "-STOP, -9":
        time.sleep(chance.uniform(0.05, 0.5))
        send(pids, signal.SIGKILL)
    begin = time.monotonic()
    wrong = life.end()
    ended = time.monotonic() - begin
    # who is killed while writing leaves a folder behind; others may go on after this look
    inside = bool(life.writes()) if how != "-15" and victim in ("trainer", "rank 0", "all") else bool(seen)
    place = "start" if early else "write" if inside else "training"
    story.kills.append(Kill(story.setup, victim, how, place, ended))
    if how == "-15" and not early:
        wrong += _unsaved(life, ended)
    for text in wrong:
        story.fault(text)
    return True


def _unsaved(life: Life, ended: float) -> list[str]:
    """What was lost of a run that was asked to stop."""
    if life.process.returncode == 0:  # its last step
        return []
    wrong = [] if ended < SAVE else [f"took {ended:.0f} s to save and end"]
    if newest(life.out) != last_reported(life.out):
        wrong.append(f"saved step {newest(life.out)}, not {last_reported(life.out)}: {life.said()[-700:]}")
    return wrong


def _strike_worker(story: Story, life: Life, chance: random.Random) -> None:
    """Kill a data worker at any moment of it: the run goes on, and loses no clip."""
    time.sleep(chance.uniform(0, _CALM))
    pids = [pid for pid, role in life.members().items() if role == "data worker"]
    at = life.step()
    if not pids or at is None:
        return
    send([chance.choice(pids)], signal.SIGKILL)
    story.workers_killed += 1
    # more than the batches that were ready
    if not life.wait(lambda: (life.step() or 0) > at + 8, 60) and life.process.poll() != 0:
        story.fault(f"did not go on after a data worker was killed: {life.said()[-1000:]}")


def _finish(campaign: Campaign, story: Story, life: Life) -> None:
    """The run's last start is its end: what came of it?"""
    out, whole = life.out, campaign.reference(story.setup)
    for text in life.end(600):
        story.fault(text)
    if life.process.returncode != 0 or newest(out) != story.setup.steps:
        story.fault(f"ended by itself, with code {life.process.returncode}: {life.said()[-2000:]}")
        return
    left = [path.name for path in out.rglob("*") if path.name.startswith(".step_") or path.suffix == ".writing"]
    if left:
        story.fault(f"half-written at the end: {', '.join(left)}")
    if (out / "skipped.jsonl").exists() and (lost := (out / "skipped.jsonl").read_text()):
        story.fault(f"clips were lost: {lost}")
    mine, theirs = weights(out, story.setup.steps), weights(whole, story.setup.steps)
    story.identical = all(torch.equal(value, theirs[name]) for name, value in mine.items())
    story.difference = max(float((mine[name] - x).norm() / x.norm().clamp_min(1e-30)) for name, x in theirs.items())
    if not story.identical and not (story.setup.processes and story.difference <= 1e-6):
        story.fault(f"weights are {story.difference:.1e} off")
    told = [[(line["step"], line["loss"]) for line in metrics(folder)] for folder in (out, whole)]
    if story.identical and told[0] != told[1]:
        story.fault("metrics.jsonl is not that of a run that nobody killed")


def run_campaign(
    kills: int, seed: int, lanes: int, folder: Path, *, steps: int = 400, a_run: int = 25
) -> Iterator[Story]:
    """All stories: two thirds of the kills on one process, the others under torchrun; every third run has data workers.
    lanes: processes that train at a time; steps: of a run; a_run: the most kills of one."""
    campaign = Campaign(make_videos(folder / "videos"), folder)
    for processes, left in ((0, kills - kills // 3), (2, kills // 3)):
        run_whole(campaign, Setup(processes, 0, steps))
        at_once, number = max(lanes // max(processes, 1), 1), 0
        with ThreadPoolExecutor(at_once) as pool:
            while left > 0:
                each, numbers = min(-(-left // at_once), a_run), range(number, number + at_once)
                setups = [Setup(processes, int(n % 3 == 2), steps) for n in numbers]
                names = [f"{processes}_{seed}_{n}" for n in numbers]
                told = list(pool.map(tell, [campaign] * at_once, setups, [each] * at_once, names))
                yield from told
                counted = sum(story.counted for story in told)
                if not counted:
                    return  # their faults say why
                left, number = left - counted, number + at_once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in training or in a save; at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=available_cpus(), help="processes that train at a time")
    parser.add_argument("--out", type=Path, default=Path("results/faults.md"))
    chosen = parser.parse_args(arguments)
    command = f"python -m tests.faults --kills {chosen.kills} --seed {chosen.seed} --lanes {chosen.lanes}"
    begin, stories = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for story in run_campaign(chosen.kills, chosen.seed, chosen.lanes, Path(folder)):
            stories.append(story)
            print("\n  FAULT ".join([story.line, *story.faults]), flush=True)
            write_report(chosen.out, stories, command, time.monotonic() - begin)
    return int(any(story.faults for story in stories))


if __name__ == "__main__":
    raise SystemExit(main())
