"""Several processes, as torchrun starts them, over gloo: the same run whatever their number, however it is parted, and
an end for all when one of them ends."""

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.runs import FAST, metrics, wait_for, weights
from tests.train.test_finetune import ALL
from tests.train.test_finetune import FAST as FAST_FINETUNE
from tests.videos import moving_frames, write_video
from train.checkpoint import checkpoints, read_state
from train.distributed import ALONE, World, joined, place
from train.heartbeat import Watch
from train.memory import Workload
from train.plan import plan_batch
from train.recipes import PRETRAIN
from train.skipped import Skipped, merge_parts, part_of
from videomae.data.dataset import Sample
from videomae.data.loader import Skip
from videomae.masking import Counts
from videomae.model import Input, size_of

LONG = pytest.mark.long
PRETRAIN_FLAGS = ["demo", *FAST.split(), "--batch-size", "12", "--micro-batch", "3", "--log.every", "1"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven, of which one cannot be read: a step of twelve lies across two epochs or three."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(7):
        write_video(folder / f"{i}.mp4", moving_frames(14, 24, 32, seed=i))
    (folder / "3.mp4").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 4), ("val", 1)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                write_video(folder / split / name / f"{i}.mp4", moving_frames(14, 24, 32, seed=i + len(name)))
    return folder


def start(processes, verb, data, out, flags, torchrun=()):
    """Without torchrun, and its flags, where processes is 0."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *torchrun, "-m"]
    launcher = launcher if processes else []
    command = [sys.executable, "-m", *launcher, f"train.{verb}", *flags, "--data", data, "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def end(process, code=0, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err
    return out, err


def run(*arguments):
    return end(start(*arguments))


def assert_close(one, other, step, rtol=1e-6):
    theirs = weights(other, step)
    for name, value in weights(one, step).items():
        assert (value - theirs[name]).norm() <= rtol * theirs[name].norm(), name


def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert place() is ALONE
    with joined("cpu", 1) as world:
        assert world is ALONE
        with world.in_turn():
            pass
        assert (world.from_first("a"), world.least(3), world.is_first) == ("a", 3, True)
        world.check_same(videos="abc")


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "no such place: RANK 2, WORLD_SIZE 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "must be numbers; got x, 2, 0, 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "must be numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK 1"),
    ],
)
def test_a_place_that_cannot_be_is_refused(variables, complaint, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=complaint):
        place()


def test_a_place_is_what_torchrun_says(monkeypatch):
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert place() == World(9, 16, 1, 8)
    assert not place().is_first


def test_a_batch_is_shared_equally_or_refused():
    config = PRETRAIN["demo"]()
    size, clip = size_of("vit_tiny"), Input(4, 16, (2, 8, 8))
    work = Workload(size, clip, Counts(4, 4, 4, 4), config.model.decoder_depth, 10_000)
    plan = plan_batch(24, work, budget=1 << 40, processes=4)
    assert (plan.micro_batch, plan.accumulation, plan.clips) == (6, 1, 24)
    # on another number of processes a run keeps its micro-batches, or takes the largest that are no larger
    assert plan_batch(24, work, budget=1 << 40, processes=2, at_most=6).micro_batch == 6
    assert plan_batch(24, work, budget=1 << 40, processes=6, at_most=3).micro_batch == 2
    assert plan_batch(24, work, budget=0, processes=3, together=4).micro_batch == 4
    with pytest.raises(ValueError, match="24 clips cannot be shared equally by 5 processes: give another --batch-size"):
        plan_batch(24, work, budget=1 << 40, processes=5)
    with pytest.raises(ValueError, match="2 clips cannot be shared equally by 4 processes"):
        plan_batch(2, work, budget=1 << 40, processes=4)
    with pytest.raises(ValueError, match="by 4 processes in groups of 4"):
        plan_batch(24, work, budget=1 << 40, processes=4, together=4)
    with pytest.raises(ValueError, match="micro-batch 8 does not divide a step's 6 clips in each of 4 processes"):
        plan_batch(24, work, budget=1 << 40, processes=4, micro_batch=8)


def test_what_every_process_skipped_is_known_to_all_of_the_next_part(tmp_path):
    path, paths = tmp_path / "skipped.jsonl", [f"/videos/{i}.mp4" for i in range(2000)]
    for rank, step in ((0, 3), (1, 4), (2, 9)):
        sample = Sample(0, rank, 0)
        Skipped(path, paths, 0, rank).see([sample], [Skip(sample, paths[rank], "damaged")], step)
    assert part_of(path, 2).exists()
    with part_of(path, 1).open("a") as file:
        file.write('{"step": 4, "ep')  # a kill can leave half a line
    merge_parts(path, 4)
    # that of step 9 is tried again
    assert [Skipped(path, paths, 4, rank).known for rank in (0, 1)] == [
        {Sample(0, 0, 0): "damaged", Sample(0, 1, 0): "damaged"}
    ] * 2
    assert [child.name for child in tmp_path.iterdir()] == ["skipped.jsonl"]


@LONG
def test_two_and_four_processes_do_what_one_does(videos, tmp_path):
    flags = [*PRETRAIN_FLAGS, "--steps", 20, "--data.views-per-decode", 2]
    for processes in (0, 1, 2, 4):
        run(processes, "pretrain", videos, tmp_path / str(processes), flags)
    # one process of a group is bit by bit what one alone is
    for name, value in weights(tmp_path / "0", 20).items():
        assert torch.equal(value, weights(tmp_path / "1", 20)[name]), name
    alone = metrics(tmp_path / "0")
    assert alone[-1]["skipped_clips"] > 10
    for processes in ("2", "4"):
        assert_close(tmp_path / processes, tmp_path / "0", 20)
        for one, other in zip(metrics(tmp_path / processes), alone, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert one["skipped_clips"] == other["skipped_clips"]
        plan = json.loads((tmp_path / processes / "config.json").read_text())["plan"]
        assert plan["processes"] * plan["accumulation"] == 8
        told = json.loads((tmp_path / processes / "config.json").read_text())["processes"]
        assert [one["rank"] for one in told] == list(range(int(processes)))
        assert {one["host"] for one in told} == {platform.node()}


@LONG
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_more_processes_than_videos_do_what_one_does(parallel, tmp_path):
    """Three videos, of which one cannot be read, and four processes with a clip each: in most steps one of them has
    nothing to learn from. The five steps leave a clip of the seven passes."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(3):
        write_video(folder / f"{i}.mp4", moving_frames(14, 24, 32, seed=i))
    (folder / "1.mp4").write_bytes(b"broken")
    flags = ["demo", *FAST.split(), "--batch-size", "4", "--log.every", "1", "--epochs", "7"]
    run(0, "pretrain", folder, tmp_path / "0", flags)
    run(4, "pretrain", folder, tmp_path / "4", [*flags, "--parallel", parallel])
    assert_close(tmp_path / "4", tmp_path / "0", 5, rtol=3e-6)
    alone, four = metrics(tmp_path / "0"), metrics(tmp_path / "4")
    assert [line["step"] for line in four] == [1, 2, 3, 4, 5]
    # of five steps of four clips, those of the second video
    assert alone[-1]["skipped_clips"] in (6, 7)
    for one, other in zip(four, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["skipped_clips"] == other["skipped_clips"]


@LONG
@pytest.mark.parametrize("recompute", ["none", "norms", "mlp", "block"])
def test_spread_weights_learn_the_same(recompute, videos, tmp_path):
    flags = [*PRETRAIN_FLAGS, "--steps", 8, "--model.recompute", recompute, "--optim.clip-grad", 0.5]
    flags += ["--log.picture-every", 3, "--checkpoint.every", 5]
    run(0, "pretrain", videos, tmp_path / "0", flags)
    run(2, "pretrain", videos, tmp_path / "2", [*flags, "--parallel", "fsdp"])
    for step in (5, 8):
        assert_close(tmp_path / "2", tmp_path / "0", step, rtol=3e-6)
        moments = [read_state(tmp_path / n / f"checkpoints/step_{step}")["optimizer"] for n in ("0", "2")]
        assert moments[0].keys() == moments[1].keys()
        for name, value in moments[0].items():
            assert (value - moments[1][name]).norm() <= 1e-4 * value.norm(), name
    assert [line["grad_norm"] for line in metrics(tmp_path / "0")] == pytest.approx(
        [line["grad_norm"] for line in metrics(tmp_path / "2")], rel=1e-5
    )


@LONG
def test_weights_are_spread_and_brought_together_again(videos, tmp_path):
    """A run goes on from one way to the other."""
    flags = [*PRETRAIN_FLAGS, "--checkpoint.every", 5, "--checkpoint.keep", 99]
    run(0, "pretrain", videos, tmp_path / "whole", [*flags, "--steps", 15])
    out = tmp_path / "parts"
    for processes, parallel, step in ((2, "fsdp", 5), (4, "ddp", 10), (0, "ddp", 15)):
        # as if it had been killed after that step
        run(processes, "pretrain", videos, out, [*flags, "--steps", 15, "--parallel", parallel])
        for path in (out / "checkpoints").iterdir():
            if int(path.name.removeprefix("step_")) > step:
                shutil.rmtree(path)
    assert_close(out, tmp_path / "whole", 15, rtol=1e-5)


@LONG
def test_a_run_goes_on_with_another_number_of_processes(videos, tmp_path):
    flags = ["demo", *FAST.split(), "--batch-size", "12", "--log.every", "1", "--steps", 300, "--checkpoint.every", 20]
    run(0, "pretrain", videos, tmp_path / "whole", flags)
    out, done = tmp_path / "parts", 0
    for processes in (1, 2, 4):
        process = start(processes, "pretrain", videos, out, flags)
        wait_for(lambda done=done: (out / "checkpoints" / f"step_{done // 20 * 20 + 40}").exists())
        process.send_signal(signal.SIGTERM)
        printed, err = process.communicate(timeout=60)
        assert "checkpoint saved" in printed, err
        assert (f"resuming  at step {done}" in printed) == (done > 0)
        done = metrics(out)[-1]["step"]
    assert done < 300
    run(0, "pretrain", videos, out, flags)
    assert_close(out, tmp_path / "whole", 300, rtol=1e-4)
    assert [line["step"] for line in metrics(out)] == list(range(1, 301))


@LONG
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_fine_tuning_with_all_that_it_draws(parallel, labelled, tmp_path):
    flags = [*FAST_FINETUNE, *ALL, "--batch-size", 8, "--micro-batch", 4, "--steps", 6, "--mix.group", 4]
    flags += ["--ema", "None"] if parallel == "fsdp" else []
    for processes in (0, 2):
        ways = ["--parallel", parallel] if processes else []
        run(processes, "finetune", labelled, tmp_path / str(processes), [*flags, *ways])
    assert_close(tmp_path / "2", tmp_path / "0", 6, rtol=1e-5)
    scores = [json.loads((tmp_path / str(n) / "evaluations.jsonl").read_text().splitlines()[-1]) for n in (0, 2)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@LONG
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, None), (signal.SIGUSR1, None), (signal.SIGUSR1, 1)])
def test_a_signal_ends_all_after_the_same_step_and_nothing_is_lost(number, rank, videos, tmp_path):
    """Told to torchrun, which hands it on, or to one process."""
    flags, out = [*PRETRAIN_FLAGS, "--steps", 100_000], tmp_path / "run"
    handled = [] if number == signal.SIGTERM else ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    process = start(2, "pretrain", videos, out, flags, torchrun=handled)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 3)
    told = [process.pid] if rank is None else [pid for pid in children(process.pid) if rank_of(pid) == rank]
    os.kill(told[0], number)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 1
    if rank is not None:
        assert f"exitcode  : {128 + number}" in err
    assert "checkpoint saved" in printed
    # what was drawn while torchrun ended the others is whole
    assert not list(out.glob(".*.tmp"))
    assert (out / "curves.png").exists()
    done = int(next((out / "checkpoints").iterdir()).name.removeprefix("step_"))
    assert metrics(out)[-1]["step"] == done
    printed, _ = run(2, "pretrain", videos, out, [*PRETRAIN_FLAGS, "--steps", done + 2])
    assert f"resuming  at step {done}" in printed


@LONG
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_the_others(rank, videos, tmp_path):
    flags, out = [*PRETRAIN_FLAGS, "--steps", 100_000, "--checkpoint.every", 3], tmp_path / "run"
    process = start(2, "pretrain", videos, out, flags)
    wait_for(lambda: (out / "checkpoints").exists() and list((out / "checkpoints").glob("step_*")))
    ranks = [pid for pid in children(process.pid) if rank_of(pid) == rank]
    os.kill(ranks[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"rank      : {rank}" in err.split("Root Cause")[1]
    assert "exitcode  : -9" in err.split("Root Cause")[1]
    assert f"stopped: process {1 - rank} of 2" in err
    assert f"[rank{1 - rank}]: Traceback" not in err


@LONG
def test_one_that_hangs_is_named_and_ends_the_others(videos, tmp_path):
    flags, out = [*PRETRAIN_FLAGS, "--steps", 100_000, "--patience", 0.3], tmp_path / "run"
    process = start(2, "pretrain", videos, out, flags)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 3)
    (hung,) = (pid for pid in children(process.pid) if rank_of(pid) == 1)
    os.kill(hung, signal.SIGSTOP)
    try:
        _, err = process.communicate(timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(hung, signal.SIGKILL)
    assert process.returncode == 1
    assert f"warning: process 1 of 2, on {socket.gethostname()}, has not been heard of for" in err, err
    assert "stopped: process 0 of 2" in err
    # what was learned until then is there
    assert int(checkpoints(out / "checkpoints")[0].name.removeprefix("step_")) >= 4


def test_the_first_process_says_who_is_silent_and_who_has_no_clips():
    watch = Watch(3, limit=60, now=0)

    def beats(n, *counts):
        return {rank: f"{n} {count} process {rank} of 3, on node{rank}" for rank, count in enumerate(counts)}

    assert watch.see(beats(1, 5, 5, 5), 10) == []
    # all wait for the first, which validates
    assert watch.see(beats(2, 5, 5, 5), 200) == []
    assert watch.see(beats(3, 6, 6, 5), 205) == [
        "warning: process 2 of 3, on node2, has waited 195 s for its clips: the others wait for it"
    ]
    assert watch.see(beats(4, 6, 6, 5), 215) == []
    assert watch.see(beats(5, 7, 7, 7), 220) == []
    silent = beats(6, 8, 8, 7) | {1: beats(5, 7, 7, 7)[1]}
    assert watch.see(silent, 250) == []
    (said,) = watch.see(beats(7, 8, 8, 8) | {1: silent[1]}, 281)
    assert said == "warning: process 1 of 3, on node1, has not been heard of for 61 s: the others wait for it"


@LONG
def test_losses_that_are_not_finite_end_all(videos, tmp_path):
    flags = [*PRETRAIN_FLAGS, "--steps", 50, "--optim.base-lr", "1e38", "--optim.max-nonfinite", 4]
    _, err = end(start(2, "pretrain", videos, tmp_path / "run", flags), code=1)
    assert err.count("loss or gradient was not finite for 4 steps in a row") == 1
    # the weights before them
    assert (tmp_path / "run" / "checkpoints").exists()


@LONG
def test_what_the_user_can_mend_is_said_once(videos, tmp_path):
    for flags, complaint in (
        (("--batch-size", 9), "a step's 9 clips cannot be shared equally by 2 processes"),
        (("--batch-sice", 9), "--batch-sice"),
    ):
        _, err = end(start(2, "pretrain", videos, tmp_path / "run", [*PRETRAIN_FLAGS, *flags]), code=1)
        assert err.split("Root Cause")[0].count(complaint) == 1
    assert not (tmp_path / "run").exists()


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True).stdout.split()
    return list(map(int, found))


def rank_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        variables = dict(line.split(b"=", 1) for line in file.read().split(b"\0") if b"=" in line)
    return int(variables.get(b"RANK", b"-1"))


@LONG
def test_a_barrier_waits_as_long_as_patience_says(tmp_path):
    """3 seconds, and neither torch's half an hour nor until the other comes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from train.distributed import joined\n"
        "with joined('cpu', 0.05) as world:\n"
        "    if world.rank:\n"
        "        time.sleep(15)\n"
        "    else:\n"
        "        since = time.monotonic()\n"
        "        try:\n"
        "            world.meet()\n"
        "        except RuntimeError as error:\n"
        "            print('Ranks 1 failed' in str(error), time.monotonic() - since)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120).stdout
    named, seconds = told.split()
    assert named == "True"
    assert 2.5 < float(seconds) < 10
