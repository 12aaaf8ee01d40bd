"""How a batch is cut into micro-batches, and what this machine has."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train import machine
from train.distributed import World
from train.finetune_recipes import FINETUNE
from train.machine import free_memory, pick_device
from train.memory import Workload, estimate
from train.plan import finetune_workload, main, plan_batch, workload
from train.pretrain import Pretraining
from train.recipes import PRETRAIN, build
from train.run import _budget, _plan
from videomae.blocks import RECOMPUTE
from videomae.data.mix import Erasing
from videomae.data.pool import available_cpus
from videomae.masking import counts
from videomae.model import SIZES, Input

GRID = (8, 14, 14)
WORK = Workload(SIZES["vit_base"], Input(), counts("tube", GRID, 0.9), 4, 94_210_944)


def test_takes_the_whole_batch_when_it_fits():
    plan = plan_batch(256, WORK, budget=1 << 50)
    assert (plan.micro_batch, plan.accumulation, plan.fits) == (256, 1, True)
    assert plan.peak_bytes == estimate(WORK, 256).peak


@pytest.mark.parametrize(
    ("clips", "most", "micro"), [(2048, 100, 64), (192, 50, 48), (7, 3, 1), (12, 5, 4), (1024, 1, 1)]
)
def test_accumulates_in_equal_parts_that_fit(clips, most, micro):
    work = replace(WORK, accumulates=True)
    plan = plan_batch(clips, WORK, budget=estimate(work, most).peak)
    assert (plan.micro_batch, plan.accumulation, plan.fits) == (micro, clips // micro, True)
    assert plan.peak_bytes == estimate(work, micro).peak


def test_takes_one_clip_at_a_time_where_not_even_one_fits_and_says_so():
    plan = plan_batch(12, WORK, budget=10)
    assert (plan.micro_batch, plan.fits) == (1, False)


def test_takes_a_micro_batch_by_hand_and_refuses_one_that_does_not_divide():
    assert plan_batch(12, WORK, budget=0, micro_batch=3).accumulation == 4
    with pytest.raises(ValueError, match="micro-batch 5 does not divide a step's 12 clips"):
        plan_batch(12, WORK, budget=0, micro_batch=5)


@pytest.mark.parametrize(
    ("clips", "together", "most", "micro"), [(16, 4, 7, 4), (48, 4, 20, 16), (24, 8, 30, 24), (24, 8, 1, 8)]
)
def test_parts_no_group_of_clips_that_are_mixed(clips, together, most, micro):
    budget = estimate(replace(WORK, accumulates=most < clips), most).peak
    plan = plan_batch(clips, WORK, budget=budget, together=together)
    assert (plan.micro_batch, plan.fits) == (micro, micro <= most)
    with pytest.raises(ValueError, match=f"would part the {together} clips"):
        plan_batch(clips, WORK, budget=0, together=together, micro_batch=together // 2)
    with pytest.raises(ValueError, match="cannot be mixed in groups"):
        plan_batch(clips + 2, WORK, budget=budget, together=together)


def test_decoders_on_a_gpu_leave_less_of_it(monkeypatch):
    monkeypatch.setattr("train.run.memory_budget", lambda *_: 20 * 10**9)
    config = PRETRAIN["demo"]()
    beside = replace(config, data=replace(config.data, reader="torchcodec", device="cuda"))
    budgets = [_budget(each, torch.device("cuda"), World(0, 8), 15) for each in (config, beside)]
    assert budgets == [20 * 10**9, 12_500_000_000]


def test_spread_weights_leave_room_for_more_clips_at_a_time():
    config = PRETRAIN["k400-base-800"]()
    config = replace(config, batch_size=256, model=replace(config.model, recompute="block"))
    with torch.device("meta"):
        model = build(config.model)
    shared = replace(workload(config, 94_210_944, "bfloat16"), spread_over=8)

    def plan(parallel):
        verb = Pretraining(replace(config, parallel=parallel))
        return _plan(verb, model, torch.device("cuda"), "bfloat16", World(0, 8), estimate(shared, 32).peak, None)

    spread, whole = plan("fsdp"), plan("ddp")
    assert (spread.micro_batch, spread.accumulation, spread.fits) == (32, 1, True)
    assert spread.peak_bytes == estimate(shared, 32).peak
    # 12 bytes a parameter instead of 12 / 8 + 4, and two blocks
    saved = 94_210_944 * (12 - 1.5 - 4) - 2 * 4 * 12 * 768**2
    assert estimate(replace(shared, spread_over=0), 32).peak - spread.peak_bytes == pytest.approx(saved, abs=2)
    assert whole.micro_batch < 32
    assert whole.accumulation > 1


def test_fine_tuning_counts_pixels_that_were_normalised_and_an_average_of_the_weights():
    config = FINETUNE["k400-base-800"]()
    clip, numbers = 16 * 224 * 224 * 3, 86_534_800

    def peak(device="cuda", **changes):
        return estimate(finetune_workload(replace(config, **changes), numbers, "bfloat16", device), 4).peak

    def plain(device="cuda", **changes):
        return peak(device, erasing=Erasing(0.0), **changes)

    assert peak(ema=0.9999) - peak() == 4 * numbers
    # one arrives while one is in use; a graph reads from a place of its own
    assert plain() - plain("cpu") == plain(engine="graph") - plain() == 4 * clip
    assert peak() - plain() == peak("cpu") - plain("cpu") == 4 * 4 * clip
    assert peak(engine="graph") - peak() == 4 * 4 * clip


def test_refuses_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert pick_device(None).type == "cpu"
    with pytest.raises(ValueError, match="no GPU"):
        pick_device("cuda")


def test_sees_this_process_cores_and_memory():
    assert available_cpus() >= 1
    assert 2**28 < free_memory(torch.device("cpu")) < 2**46
    if Path("/usr/bin/taskset").exists():
        code = "from videomae.data.pool import available_cpus; print(available_cpus())"
        out = subprocess.run(
            ["taskset", "-c", "0", sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == "1"


def test_the_command_says_what_a_recipe_takes_without_a_gpu(capsys):
    assert main(["k400-huge-1600", "--gpu-memory", "80", "--model.frames", "32", "--model.image-size", "320"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "k400-huge-1600: vit_huge, decoder depth 12, 692.5 M parameters, 32 x 320 x 320"
    assert printed[1].startswith("640 of 6400 cubes visible, 6400 tokens in the decoder; bfloat16; a step may take 68")
    most = {line.split()[0]: int(line.split()[3]) for line in printed[4:]}
    assert list(most) == list(RECOMPUTE)
    assert most["none"] < most["norms"] < most["mlp"] < most["block"]
    assert main(["k400-huge-1600", "--gpu-memory", "8"]) == 0
    assert "too large" in capsys.readouterr().out
    assert main(["--gpu-memory=40"]) == 0
    assert "a step may take 34 of 40 GB" in capsys.readouterr().out


@pytest.mark.parametrize("memory", ["much", "nan", "inf", "-5", "0", ""])
def test_the_command_refuses_what_is_no_memory(memory, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--gpu-memory", memory])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_container_keeps_of_files_is_free_memory(tmp_path, monkeypatch):
    for name, text in {
        "memory.max": "3000000\n",
        "memory.current": "2900000\n",
        "memory.stat": "anon 400000\ninactive_file 2000000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_CONTAINER", tmp_path)
    assert free_memory(torch.device("cpu")) == 2_100_000
