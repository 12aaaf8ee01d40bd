"""Contrastive pre-training: what a step minimises, and the command from end to end on small videos."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from tests.runs import assert_same, metrics, weights
from tests.videos import moving_frames, write_video
from train import moco
from train.checkpoint import read_state
from train.features import main as features
from train.finetune import main as finetune
from train.moco import Contrasting, ContrastObjective, main
from train.moco_recipes import MOCO
from train.probe import main as probe
from videomae.blocks import Attention
from videomae.moco import Contrasted, momentum_at, momentum_encoder_of
from videomae.model import Input, size_of

LONG = pytest.mark.long
FAST = "--model.size vit_tiny --model.frames 4 --model.image-size 16 --model.cube 2 8 8 --model.hidden 16"
FAST += " --model.width 8 --batch-size 6 --workers 0 --log.every 2 --log.tensorboard false --checkpoint.keep 9"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten, of two classes."""
    folder = tmp_path_factory.mktemp("videos")
    for split, name in itertools.product(("train", "val"), ("a", "b")):
        (folder / split / name).mkdir(parents=True)
    for i in range(10):
        write_video(folder / ("train", "val")[i > 7] / "ab"[i % 2] / f"{i}.mp4", moving_frames(14, 24, 32, seed=9 * i))
    return folder


def run(videos, out, *flags):
    return main(["demo", *FAST.split(), "--data", str(videos / "train"), "--out", str(out), *map(str, flags)])


def start_two(videos, out, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "train.moco", "demo", *FAST.split()]
    command += ["--data", str(videos / "train"), "--out", str(out), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def objective(seed=0):
    torch.manual_seed(seed)
    model = Contrasted(size_of("vit_tiny"), Input(4, 16, (2, 8, 8)), hidden=12, width=8)
    momentum = momentum_encoder_of(model)
    for parameter in momentum.parameters():
        parameter.mul_(1.1)
    return ContrastObjective(model, momentum, 0.3, torch.zeros(4))


def clips(count):
    return torch.randint(0, 256, (count, 4, 16, 16, 3), dtype=torch.uint8)


def test_each_view_is_to_find_the_other_view_of_its_video():
    made, frames, count = objective(), clips(10), torch.ones(5)
    model, momentum, views = made.model, made.momentum, (frames[::2].contiguous(), frames[1::2].contiguous())
    one, two = (model.predictor(model.projector(model.pooled(x), count), count) for x in views)
    first, second = (momentum.projector(momentum.pooled(x), count) for x in views)
    wanted = 0
    for queries, keys in ((one, second), (two, first)):
        cosines = functional.cosine_similarity(queries[:, None].double(), keys[None].double(), dim=2)
        wanted -= 2 * 0.3 * (cosines / 0.3).log_softmax(1).diagonal().mean()
    loss = made(frames, scale=3.0)
    assert loss.item() == pytest.approx(3 * wanted.item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in momentum.parameters())


def test_videos_that_do_not_count_change_nothing():
    made, frames = objective(), clips(10)
    others = torch.cat((frames[:4], clips(2), frames[4:8], clips(2)))
    weight = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0], dtype=torch.float32)
    found = []
    for arguments in ((frames[:8], None), (others, weight)):
        made.model.zero_grad()
        made.seen.zero_()
        loss = made(*arguments)
        loss.backward()
        found.append((loss.detach(), made.seen.clone(), made.model.blocks[0].mlp.fc1.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert made(others, 0 * weight) == 0


def test_sees_when_views_are_found_and_when_all_collapses():
    made, frames = objective(), clips(8)
    made(frames.repeat_interleave(2, dim=0))
    made(frames.repeat_interleave(2, dim=0))
    found, queries, features, count = made.seen.tolist()
    assert count == 2
    assert 0 <= found <= 2
    assert 1 < queries <= 2.02
    assert features > 0.002
    made.seen.zero_()
    made.model.norm.weight.data.zero_()
    made.model.norm.bias.data.fill_(1.0)
    made(frames)
    assert made.seen[2] < 1e-3
    made.model.norm.bias.data.fill_(float("nan"))
    made(frames)
    assert made.seen[3] == 1


def test_a_step_is_one_micro_batch_unless_several_are_asked_for():
    assert Contrasting(MOCO["demo"]()).together == 128
    assert Contrasting(replace(MOCO["demo"](), micro_batch=32)).together == 32


def test_refuses_weights_that_are_spread():
    with pytest.raises(ValueError, match="the encoder of keys follows whole weights: --parallel ddp"):
        Contrasting(replace(MOCO["demo"](), parallel="fsdp")).find_videos()


@LONG
def test_leaves_weights_that_other_commands_take_and_says_how_views_are_found(videos, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(videos, out, "--steps", 6, "--probe.data", videos, "--probe.every", 3) == 0
    printed = capsys.readouterr()
    assert "contrast  6 videos at a time, 5 negatives; temperature 0.1, momentum 0.99 to 1" in printed.out
    assert "of the views find their video (chance 16.7 %)" in printed.err
    assert "Traceback" not in printed.err
    seen = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [x["step"] for x in seen if "contrast_top1" in x] == [2, 4, 6]
    assert [x["step"] for x in seen if "probe_knn" in x] == [0, 3, 6]
    geometry = "--model.size vit_tiny --model.frames 4 --model.image-size 16 --model.cube 2 8 8 --log.tensorboard false"
    flags = [*geometry.split(), "--batch-size", "4", "--workers", "0", "--epochs", "1"]
    tuned = ["demo", "--data", str(videos), "--weights", str(out), "--out", str(tmp_path / "tuned"), *flags]
    assert finetune(tuned) == 0
    common = ["--weights", str(out), "--out", str(tmp_path / "probe"), "--workers", "0"]
    assert probe(["--data", str(videos), "--method", "knn", *common]) == 0
    assert features([str(videos), *common[:2], "--out", str(tmp_path / "features"), "--workers", "0"]) == 0


def test_the_encoder_of_keys_attends_as_asked():
    verb = Contrasting(replace(MOCO["demo"](), attention="triton"))
    momentum = verb.objective(verb.build(), "float32").momentum
    assert {module.backend for module in momentum.modules() if isinstance(module, Attention)} == {"triton"}


@LONG
def test_the_encoder_of_keys_follows_the_trained_one_and_patches_stay(videos, tmp_path):
    run(videos, tmp_path / "run", "--steps", 2, "--checkpoint.every", 1)
    keys = [load_file(tmp_path / f"run/checkpoints/step_{step}/momentum.safetensors") for step in (1, 2)]
    model = weights(tmp_path / "run", 2)
    rate = momentum_at(1, 2, 0.99)
    for name, value in keys[1].items():
        torch.testing.assert_close(value, rate * keys[0][name] + (1 - rate) * model[name])
    name = "patch_embed.proj.weight"
    assert torch.equal(weights(tmp_path / "run", 1)[name], model[name])
    assert not torch.equal(weights(tmp_path / "run", 1)["blocks.0.mlp.fc1.weight"], model["blocks.0.mlp.fc1.weight"])


@LONG
def test_a_run_gone_on_with_ends_bit_identical_to_one_that_never_stopped(videos, tmp_path):
    flags = ("--steps", 12, "--checkpoint.every", 3)
    run(videos, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (9, 12):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step_{step}")
    assert run(videos, tmp_path / "stopped", *flags, "--workers", 1) == 0
    ends = [tmp_path / name / "checkpoints" / "step_12" for name in ("whole", "stopped")]
    assert ends[1].stat().st_mtime > ends[0].stat().st_mtime
    for name in ("model", "momentum"):
        assert_same(*(load_file(end / f"{name}.safetensors") for end in ends))
    assert_same(*(read_state(end)["optimizer"] for end in ends))
    assert [x["loss"] for x in metrics(tmp_path / "whole")] == [x["loss"] for x in metrics(tmp_path / "stopped")]


@LONG
def test_refuses_to_go_on_with_other_negatives(videos, tmp_path, capsys):
    run(videos, tmp_path / "run", "--steps", 2)
    with pytest.raises(SystemExit):
        run(videos, tmp_path / "run", "--steps", 4, "--micro-batch", 4)
    assert "that run told 6 videos apart at a time, this one would 2" in capsys.readouterr().err


@LONG
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch-size", "12"], "8 videos cannot be 12 different ones"),
        (["--micro-batch", "5"], "micro-batch must be even"),
    ],
)
def test_refuses(videos, tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        run(videos, tmp_path / "run", "--steps", 2, *flags)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@LONG
def test_two_processes_train_as_one_does(videos, tmp_path):
    # one video cannot be read: it counts in neither
    broken = videos / "train" / "a" / "broken.mp4"
    broken.write_bytes(b"broken")
    flags = ("--steps", 3, "--batch-size", 8, "--log.every", 1)
    two = start_two(videos, tmp_path / "2", *flags)
    assert run(videos, tmp_path / "1", *flags) == 0
    _, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    broken.unlink()
    for one, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["skipped_clips"] == other["skipped_clips"] > 0


@LONG
def test_the_loss_falls(videos, tmp_path):
    views = "--augment.jitter 0 --augment.grey 0 --augment.area 0.8 1 --data.windows 1"
    run(videos, tmp_path / "run", "--steps", 50, "--optim.base-lr", "0.1", "--log.every", 10, *views.split())
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    seen = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.75 * losses[0]
    # chance is 16.7
    assert sum(line["contrast_top1"] for line in seen[-3:]) / 3 > 40


def test_refuses_processes_that_would_part_a_videos_views(videos, tmp_path, monkeypatch):
    """9 clips of each of 8: a pair would be torn."""
    monkeypatch.setattr(moco, "processes", lambda: (0, 8))
    config = replace(MOCO["demo"](), batch_size=36)
    with pytest.raises(
        ValueError, match="36 videos cannot be shared equally by 8 processes: give another --batch-size"
    ):
        Contrasting(config)
