"""The fault campaign in short, and what it does not do: a disk that is full, a checkpoint that is damaged."""

import resource
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fault_runs import Life, Setup, damage, make_videos, newest
from tests.faults import HOWS, Campaign, run_whole, tell
from tests.runs import metrics, start, wait_for

LONG = pytest.mark.long


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"))


@LONG
def test_runs_that_are_killed_end_as_those_that_are_not(videos, tmp_path):
    """Three ways for the only process; under torchrun the launcher alone, and all at once."""
    kinds = *(("trainer", how) for how in HOWS), ("launcher", "-9"), ("all", "-15")
    campaign = Campaign(videos, tmp_path, kinds)
    setups = [Setup(processes, 0, 160) for processes in (0, 2)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(run_whole, [campaign] * 2, setups))
        stories = list(pool.map(tell, [campaign] * 2, setups, [3, 2], ["alone", "two"]))
    assert [fault for story in stories for fault in story.faults] == []
    assert all(story.identical and story.kills for story in stories)


@LONG
def test_a_full_disk_is_said_every_time_and_the_run_goes_on_and_saves_once_there_is_room(videos, tmp_path):
    out = tmp_path / "run"
    process = start(videos, out, "--steps", 100_000, "--checkpoint.every", 20, "--log.every", 20)
    wait_for(lambda: newest(out))
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    # no room for a line more, nor for a checkpoint
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, ((out / "metrics.jsonl").stat().st_size, hard))
    said = _read_warnings(process, 1)
    good = newest(out)
    said += _read_warnings(process, 8)
    assert newest(out) == good
    for what in ("checkpoint of step", "metrics.jsonl"):
        assert sum(line.startswith(f"warning: {what}") for line in said) >= 3
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    wait_for(lambda: newest(out) > good)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert damage(out) == []
    steps = [line["step"] for line in metrics(out)]
    assert steps == list(range(20, newest(out) + 1, 20))


def _read_warnings(process, count):
    """The next ones of a run."""
    found = []
    while len(found) < count:
        line = process.stderr.readline()
        assert line, f"it ended: {found}"
        if line.startswith("warning:"):
            found.append(line)
    return found


@LONG
def test_two_processes_pass_over_a_damaged_checkpoint_aloud_and_once(videos, tmp_path):
    out = tmp_path / "run"
    assert Life(Setup(0, 0, 8), videos, out).end(120) == []
    file = out / "checkpoints" / "step_8" / "optimizer" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    life = Life(Setup(2, 0, 12), videos, out)
    assert life.end(120) == []
    assert life.process.returncode == 0
    assert life.resumed_at() == 4
    assert life.said().count("damaged checkpoint passed over") == 1
    assert newest(out) == 12
