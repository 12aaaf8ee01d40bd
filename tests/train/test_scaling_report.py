"""What `train.plan --gpus` prints and refuses, and the page that shows it."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.fault_runs import make_videos, newest
from tests.runs import FAST, metrics, wait_for
from train.cli import parse
from train.plan import forecast, main, workload
from train.recipes import PRETRAIN, PretrainData
from train.scaling_report import check_shared, report, run_steps, take_flags

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
PARAMETERS = {"k400-base-800": 94_210_944, "k400-huge-1600": 692_487_296, "tiny": 500_000}  # RECIPES A.7


def printed(line, recipe="k400-base-800", **changes):
    """The command's lines, without making the model."""
    flags, rest = take_flags(line.split(), "plan")
    assert not rest
    config = replace(PRETRAIN[recipe](), **changes)
    work = workload(config, PARAMETERS[recipe], "bfloat16")
    return report(config, work, flags, [forecast(config, work, flags, n) for n in flags.gpus])


def figures(lines, label):
    line = next(line for line in lines if line.startswith(label))
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", line)]


def test_says_what_a_run_on_many_gpus_takes():
    lines = printed("--gpus 64 --gpu h200 --clips-per-second 1000 --cores 1024")
    assert max(map(len, lines)) <= 100
    assert figures(lines, "batch") == [2048, 32, 1, 64, 8]
    arithmetic, gradients = 32.0, 4 * 94_210_944
    update = 1000 * 32 * 94_210_944 / (0.9 * 4.8e12)
    # twice as long as the all-reduce is the backward pass
    reduced = 1000 * 2 * 63 / 64 * gradients / 50e9
    waits = reduced * 25 * 2**20 / gradients
    step = arithmetic + update + waits
    assert figures(lines, "step")[:2] == pytest.approx([step, 2048 * 1000 / step], rel=2e-3)
    assert figures(lines, "  ms") == pytest.approx([arithmetic, 0, update, waits, 0], abs=0.06)
    steps = 800 * 240_436 // 2048
    assert figures(lines, "run") == pytest.approx([steps, steps * step / 60_000], abs=0.6)
    second = lines.index(next(line for line in lines if line.startswith("network"))) + 1
    assert figures(lines[second:], "  ms") == pytest.approx([reduced, 50, reduced - waits], abs=0.06)
    machine = 8 * 32_000 / step
    assert figures(lines, "data") == pytest.approx(
        [machine, machine * 2_408_448 / 1e9, machine * 1.921e6 / 1e9], abs=0.6
    )
    assert figures(lines, "  cores")[:2] == [-(-machine // 18.26), -(-machine // 103)]
    assert "; 1,016 of its 1,024 may" in lines[-4]
    assert figures(lines, "checkpoint")[:3] == [1.1, 1000, round(step)]
    assert figures(lines, "faults")[0] == pytest.approx(54 * 16_384 / 419 / 64, abs=0.05)
    assert lines[-1] == "first       nothing"


def test_calls_estimates_so():
    assert "estimated, at 40 % of the peak" in printed("--gpus 8")[2]
    assert "estimated, at 25 % of the peak" in printed("--gpus 8 --mfu 0.25")[2]
    assert "measured, as given; the rest is estimated" in printed("--gpus 8 --clips-per-second 1e3")[2]


def test_several_numbers_of_gpus_make_a_table():
    lines = printed("--gpus 1 8 64 1024 --cores 112")
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines[5:9]]
    assert [row[0] for row in rows] == ["1", "8", "64", "1,024"]
    assert [row[1:4] for row in rows[1:]] == [["256", "x", "1"], ["32", "x", "1"], ["2", "x", "1"]]
    assert [row[-2].rstrip(",") for row in rows] == ["19", "decoding", "network", "network"]
    # every figure ends under the end of its name
    ends = [name.end() for name in re.finditer(r"\S+(?: \S+)*", lines[4])][:-1]
    assert all(line[end - 1] != " " == line[end] for line in lines[4:9] for end in ends)


@pytest.mark.parametrize("gpu", ["h200", "h100", "a100-80", "a100-40", "l40s", "rtx4090", "b200"])
def test_knows_every_gpu(gpu):
    lines = printed(f"--gpus 1 8 1024 --gpu {gpu} --parallel ddp", "k400-huge-1600")
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith(gpu)


def test_fsdp_takes_less_memory_and_more_of_the_network():
    ddp, fsdp = (printed(f"--gpus 64 --parallel {name}", "k400-huge-1600") for name in ("ddp", "fsdp"))
    # weights, moments and gradients: 16 bytes of 692 million; and the whole model that the first process keeps
    assert figures(ddp, "memory")[0] == pytest.approx(11.1, abs=0.1)
    assert figures(fsdp, "memory")[0] == pytest.approx(2.8 + 11.1 / 64 + 2.2, abs=0.2)
    sent = [figures(lines, "network")[1] for lines in (ddp, fsdp)]
    assert sent[1] == pytest.approx(1.5 * sent[0], abs=0.1)


def test_fsdp_leaves_room_for_more_clips_at_a_time():
    ddp, fsdp = (printed(f"--gpus 8 --gpu-memory 16 --parallel {name}", "k400-huge-1600") for name in ("ddp", "fsdp"))
    assert figures(ddp, "batch")[1] < figures(fsdp, "batch")[1]


def test_cores_are_those_that_would_keep_the_gpus_busy():
    few, many = (printed(f"--gpus 8 --cores {cores}") for cores in (16, 1024))
    assert figures(few, "  cores")[:2] == figures(many, "  cores")[:2]
    assert figures(few, "step") != figures(many, "step")


def test_a_video_of_more_views_is_read_once():
    one, four = (printed("--gpus 8", data=PretrainData(views_per_decode=views)) for views in (1, 4))
    assert figures(four, "data")[0] == pytest.approx(figures(one, "data")[0], rel=0.01)
    assert 4 * figures(four, "data")[2] == pytest.approx(figures(one, "data")[2], rel=0.02)


def test_says_when_a_step_does_not_fit():
    lines = printed("--gpus 8 --gpu-memory 2")
    assert "too large" in next(line for line in lines if line.startswith("memory"))
    assert any("More than a step should take" in line for line in printed("--gpus 8 16 --gpu-memory 1"))


def test_finds_the_length_of_a_run():
    config = PRETRAIN["k400-base-800"]()
    assert run_steps(config, None) == 800 * 240_436 // 2048
    assert run_steps(config, 2048) == 800
    assert run_steps(PRETRAIN["demo"](), None) == 1800
    assert run_steps(PRETRAIN["ssv2-base-800"](), None) == 800 * 168_913 // 2048


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpus 0", "--gpus must be from 1 to 1,000,000; got 0"),
        ("--gpus 8 -1", "--gpus must be from 1 to 1,000,000; got -1"),
        ("--gpus 8 1000001", "got 1000001"),
        ("--gpus 8 --network nan", "--network must be positive, in GB/s; got nan"),
        ("--gpus 8 --mfu 0", "--mfu must be above 0"),
        ("--gpus 8 --mfu 0.4 --clips-per-second 9", "not both"),
        ("--gpus 8 --cores 0", "--cores must be at least 1"),
        ("--gpus 8 --videos 0", "--videos must be at least 1"),
        ("--cores 8", "--cores is of a run on GPUs: give --gpus N as well"),
        ("--clips-per-second 8", "--clips-per-second is of a run"),
        ("--gpu-memory nan", "--gpu-memory takes a number of gigabytes"),
    ],
)
def test_refuses_nonsense(line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        take_flags(line.split(), "plan")


@pytest.mark.parametrize("line", ["--gpus", "--gpus eight", "--gpu v100", "--gpus 8 --parallel tensor", "--cores 1.5"])
def test_refuses_what_it_cannot_read_in_one_line(line, capsys):
    with pytest.raises(SystemExit) as end:
        take_flags(line.split(), "plan")
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("gpus", "would"), [(1000, "2000 or 3000"), (3000, "3000 could"), (3, "2046 or 2049"), (2049, "2049 could")]
)
def test_says_which_batches_could_be_shared(gpus, would):
    with pytest.raises(ValueError, match=f"{gpus} GPUs cannot share a step's 2048 clips equally: --batch-size {would}"):
        check_shared(PRETRAIN["k400-base-800"](), gpus)


def test_counts_views_among_what_is_shared():
    tiny = PRETRAIN["tiny"]()  # 4 videos, 4 views each
    check_shared(tiny, 16)
    with pytest.raises(ValueError, match="16 clips equally: --batch-size 8 could"):
        check_shared(tiny, 32)


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        ("--gpus 1 --parallel fsdp", {}, "over several GPUs"),
        ("--gpus 8", {"engine": "graph"}, "--engine graph captures a step whose gradients stay in one process"),
        ("--gpus 8 --parallel fsdp", {"engine": "compile"}, "use eager, or ddp"),
        ("--gpus 8", {"precision": "float32"}, "give --clips-per-second"),
    ],
)
def test_refuses_what_it_cannot_tell_of(line, changes, message):
    with pytest.raises(ValueError, match=message):
        printed(line, **changes)


@pytest.mark.long
def test_the_page_shows_what_its_commands_print(capsys):
    shown = re.findall(r"^```\n\$ (python -m train\.plan [^\n]*)\n(.*?)^```", PAGE, re.M | re.S)
    assert len(shown) >= 4
    for command, text in shown:
        assert main(shlex.split(command)[3:]) == 0
        assert capsys.readouterr().out == text, command


def script():
    return PAGE.split("```bash\n")[1].split("```")[0]


def test_the_page_s_torchrun_lines_are_read_by_torchrun():
    lines = re.findall(r"torchrun (?:[^\n]*\\\n)*[^\n]*", PAGE)
    lines = [line for line in lines if " -m train.pretrain" in line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("\\\n", " ").replace("$SLURM_NNODES", "8"))
        given = get_args_parser().parse_args(words[1:])
        assert (given.module, given.training_script, given.nproc_per_node) == (True, "train.pretrain", "8")
        parse(given.training_script_args, PRETRAIN, "demo", prog="pretrain", about="")
    assert (given.nnodes, given.rdzv_backend) == ("8", "c10d")


@pytest.mark.parametrize(("code", "seconds", "queued"), [(0, 700, False), (1, 700, True), (1, 0, False)])
def test_the_page_s_script_is_queued_again_when_it_was_stopped(tmp_path, code, seconds, queued):
    """SLURM's two commands are stood in for: srun by its exit code."""
    stands = {"srun": f"exit {code}", "scontrol": f'[ "$1" = show ] && echo a || echo "$@" > {tmp_path}/asked'}
    for name, line in stands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SECONDS": str(seconds)}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "8", "SLURM_CPUS_PER_TASK": "112", "SLURM_JOB_NODELIST": "a"}
    subprocess.run(["bash", "-n"], input=script(), check=True, text=True)
    done = subprocess.run(["bash", "-u"], input=script(), env=environment, capture_output=True, text=True)
    asked = tmp_path / "asked"
    assert done.returncode == code, done.stderr
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if queued else "")


@pytest.mark.long
def test_the_page_s_script_saves_is_queued_again_and_goes_on(tmp_path):
    """Two processes of one machine; srun starts what it is given, whose number scontrol's stand-in does not need."""
    videos, out, asked = make_videos(tmp_path / "videos"), tmp_path / "run", tmp_path / "asked"
    stands = {
        "srun": f'shift; echo $$ > {tmp_path}/task; exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" >> {asked}',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, line in stands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    body = script().replace("k400-base-800 --data /shared/k400-prepared --out /shared/runs/b", '"${RUN[@]}"')
    body = body.replace("--nproc-per-node 8", "--nproc-per-node 2").replace("$first:29500", f"$first:{port}")

    def queue(count, steps):
        flags = {"log.every": 1, "data": videos, "out": out, "steps": steps}
        run = shlex.join(["demo", *FAST.split(), *(f"--{name}={value}" for name, value in flags.items())])
        slurm = {"JOB_ID": "7", "NNODES": "1", "CPUS_PER_TASK": "2", "JOB_NODELIST": "localhost"}
        slurm |= {"RESTART_COUNT": str(count)} if count else {}
        environment = {f"SLURM_{name}": value for name, value in slurm.items()}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SECONDS": "700", "OMP_NUM_THREADS": "1"}
        words = ["bash", "-uc", f"RUN=({run})\n{body}"]
        with open(tmp_path / f"log{count}", "w") as log:
            return subprocess.Popen(words, env={**os.environ, **environment}, stdout=log, stderr=log)

    first = queue(0, 100_000)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 3)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM)
    assert first.wait(60) == 1
    assert asked.read_text() == "requeue 7\n"
    done = newest(out)
    assert done == metrics(out)[-1]["step"]
    assert queue(1, done + 4).wait(120) == 0
    assert f"resuming  at step {done}" in (tmp_path / "log1").read_text()
    assert newest(out) == done + 4
    assert asked.read_text() == "requeue 7\n"
