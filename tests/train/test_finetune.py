"""The command from end to end on small labelled videos: what it learns and leaves behind, that nothing it draws depends
on how a run is split, and what it refuses."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import videomae
from tests.runs import assert_same, metrics, wait_for, weights
from tests.runs import run as pretrain
from tests.videos import moving_frames, write_video
from train.evaluate import main as evaluate
from train.finetune import Finetuning, main
from train.finetune_recipes import FINETUNE
from train.objective import ClassifyObjective
from videomae.data import prepare
from videomae.data.decode import Video
from videomae.data.mix import Mix
from videomae.data.sampling import Sampling

SIZE = "--model.size vit_tiny --model.frames 4 --model.image-size 16 --model.cube 2 8 8"
FAST = f"demo {SIZE} --batch-size 4 --workers 0 --log.every 1 --log.tensorboard false --checkpoint.keep 9".split()
# everything that is drawn: two views, RandAugment, erasing, mixing, drop path, dropout
ALL = ["--data.views-per-decode", "2", "--rand-augment.ops", "4", "--erasing.probability", "0.5"]
ALL += ["--mix.probability", "1", "--model.drop-path", "0.2", "--model.head-dropout", "0.5", "--ema", "0.5"]
COLOURS = {"blue": (20, 40, 230), "green": (20, 220, 40), "red": (230, 30, 20)}


def run(data, out, *flags):
    return main([*FAST, "--data", str(data), "--out", str(out), *map(str, flags)])


def evaluations(out):
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder for each class, which is a colour; training and validation videos."""
    folder = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 4), ("val", 2)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                frames = moving_frames(14, 24, 32, seed=i) // 4 + np.array(colour, dtype=np.uint8) // 4 * 3
                write_video(folder / split / name / f"{i}.mp4", frames, crf="18")
    return folder


def test_learns_and_leaves_a_classifier_its_accuracy_and_curves(classes, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(classes, out, "--steps", 40, "--validate-every", 4, "--log.tensorboard", "true") == 0
    printed = capsys.readouterr().out
    assert "top-1 100.00" in printed
    assert f"python -m train.evaluate demo --weights {out} --data {classes}" in printed
    assert (out / "curves.png").exists()
    lines = evaluations(out)
    # twelve videos in batches of four: every fourth epoch ends at each twelfth step
    assert [line["step"] for line in lines] == [12, 24, 36, 40]
    assert lines[-1]["val_top1"] == lines[-1]["val_top5"] == 100
    losses = [line["loss"] for line in metrics(out)]
    assert losses[0] == pytest.approx(math.log(3), abs=0.01)
    model, report = videomae.weights.model_from(out / "checkpoints/step_40")
    assert model.classes == ("blue", "green", "red")
    assert model.input.sampling == Sampling("dense", 1)
    assert report.fresh == ()


def test_validates_as_a_look_at_every_video_does(classes, tmp_path):
    out = tmp_path / "run"
    assert run(classes, out, "--steps", 2) == 0
    model, _ = videomae.weights.model_from(out / "checkpoints/step_2")
    logits = []
    for name in sorted(COLOURS):
        for i in range(2):
            video = Video(classes / "val" / name / f"{i}.mp4")
            # 4 of 14 frames at stride 1, in the middle, ends included and the last one left out
            frames = torch.from_numpy(video.read([5, 6, 7, 8])).permute(0, 3, 1, 2)
            resized = torch.nn.functional.interpolate(frames.float(), (16, 21), mode="bilinear").round().byte()
            clip = resized[:, :, :, 2:18].permute(0, 2, 3, 1).contiguous()
            logits.append(model.eval()(clip[None])[0])
    logits, labels = torch.stack(logits).detach(), torch.arange(3).repeat_interleave(2)
    last = evaluations(out)[-1]
    assert last["val_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=2e-3)
    assert last["val_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_a_step_is_the_same_by_any_micro_batch_and_number_of_workers(classes, tmp_path):
    flags = ["--steps", 2, *ALL, "--model.drop-path", 0, "--model.head-dropout", 0, "--validate-every", 0]
    assert run(classes, tmp_path / "one", *flags) == 0
    assert run(classes, tmp_path / "two", *flags, "--micro-batch", 4, "--workers", 2) == 0
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    first, second = (weights(tmp_path / name, 2) for name in ("one", "two"))
    for name, value in first.items():
        # Adam's first steps are as long whatever the gradient, so rounding shows where it is next to nothing
        assert (value - second[name]).abs().max() < 2.1e-3, name
        assert (value - second[name]).abs().mean() < 1e-5, name


def test_goes_on_after_a_stop_as_if_there_had_been_none(classes, tmp_path, monkeypatch):
    assert run(classes, tmp_path / "whole", "--steps", 6, *ALL) == 0
    partly = tmp_path / "partly"
    assert run(classes, partly, "--steps", 6, *ALL, "--checkpoint.every", 3) == 0
    for path in ("step_6",):
        shutil.rmtree(partly / "checkpoints" / path)
    torch.manual_seed(99)
    assert run(classes, partly, "--steps", 6, *ALL, "--checkpoint.every", 3) == 0
    assert_same(weights(tmp_path / "whole", 6), weights(partly, 6))
    ema = "checkpoints/step_6/ema.safetensors"
    assert_same(load_file(tmp_path / "whole" / ema), load_file(partly / ema))
    assert evaluations(tmp_path / "whole") == evaluations(partly)


@pytest.mark.long
@pytest.mark.parametrize("step", [3, 6])
def test_a_validation_that_was_interrupted_is_made_up_for(step, classes, tmp_path, monkeypatch, capsys):
    """After three of six steps, and after the last, whose checkpoint is there."""
    flags = ("--steps", 6, *ALL, "--checkpoint.every", 3)
    assert run(classes, tmp_path / "whole", *flags) == 0
    original = Finetuning._validate

    def interrupted(self, run, log, done):
        if done == step:
            raise SystemExit
        original(self, run, log, done)

    monkeypatch.setattr(Finetuning, "_validate", interrupted)
    with pytest.raises(SystemExit):
        run(classes, tmp_path / "partly", *flags)
    monkeypatch.setattr(Finetuning, "_validate", original)
    with (tmp_path / "partly" / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 6, "val_t')  # as a kill leaves it
    assert run(classes, tmp_path / "partly", *flags) == 0
    assert evaluations(tmp_path / "partly") == evaluations(tmp_path / "whole")
    assert_same(weights(tmp_path / "whole", 6), weights(tmp_path / "partly", 6))
    capsys.readouterr()
    assert run(classes, tmp_path / "partly", *flags) == 0
    assert "Already finished" in capsys.readouterr().out


@pytest.mark.long
def test_survives_kill_9(classes, tmp_path):
    flags = ["--steps", "40", *ALL, "--checkpoint.every", "2"]
    assert run(classes, tmp_path / "whole", *flags) == 0
    command = [sys.executable, "-m", "train.finetune", *FAST, "--data", str(classes), "--out", str(tmp_path / "killed")]
    for steps in (4, 12, 26):
        process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for((tmp_path / "killed" / "checkpoints" / f"step_{steps}").exists)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert run(classes, tmp_path / "killed", *flags) == 0
    assert_same(weights(tmp_path / "whole", 40), weights(tmp_path / "killed", 40))


def test_the_command_that_it_ends_with_can_be_given(classes, tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "a folder", tmp_path / "a run"
    folder.mkdir()
    for name, split in (("fit", "train"), ("held", "val")):
        videos = sorted((classes / split).glob("*/*.mp4"))
        (folder / f"{name}.csv").write_text("".join(f"{path} {number % 3}\n" for number, path in enumerate(videos)))
    given = (folder / "fit.csv", out, "--steps", 2, "--sampling.stride", 2, "--ema", 0.5)
    assert run(*given, "--data.val", folder / "held.csv", "--validate-every", 1e-9) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
    weights = str(out / "checkpoints" / "step_2" / "ema.safetensors")
    expected = ["--weights", weights, "--data", str(folder / "held.csv")]
    assert command == ["python", "-m", "train.evaluate", *expected]
    monkeypatch.chdir(tmp_path)
    assert evaluate([*command[3:], "--workers", "0", "--views", "1x1"]) == 0
    # where no other videos are known, there is a place for them
    assert run(folder / "fit.csv", tmp_path / "none", "--steps", 1) == 0
    printed = capsys.readouterr()
    assert "train.evaluate demo --weights " in printed.out
    assert printed.out.endswith(" --data TEST\n")
    assert "note: no validation, which --data.val may give: " in printed.err


def test_the_best_validation_is_that_of_the_whole_run(classes, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(classes, out, "--steps", 6, "--validate-every", 1e-9) == 0
    rows = evaluations(out)
    rows[1]["val_top1"] = 200.0
    (out / "evaluations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    capsys.readouterr()
    assert run(classes, out, "--steps", 7, "--validate-every", 1e-9) == 0
    assert "(best top-1 200.00, step 2)" in capsys.readouterr().out


def test_outputs_that_are_not_finite_recognise_nothing(classes, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(Finetuning, "initialize", lambda self, model: model.head.bias.data.fill_(math.nan))
    assert run(classes, tmp_path / "run", "--steps", 1) == 0
    assert evaluations(tmp_path / "run") == [{"step": 1, "val_top1": 0.0, "val_top5": 0.0, "val_unreadable": 0}]
    assert "counted as wrong: 6 videos for which the model's outputs are not finite" in capfd.readouterr().err


def test_averages_the_weights(classes, tmp_path):
    out = tmp_path / "run"
    assert run(classes, out, "--steps", 3, "--checkpoint.every", 1, "--ema", 0.75, "--validate-every", 0) == 0
    after = [weights(out, step) for step in (1, 2, 3)]
    ema = load_file(out / "checkpoints/step_3/ema.safetensors")
    for name, value in ema.items():
        # the first is taken as it is
        wanted = 0.75 * (0.75 * after[0][name] + 0.25 * after[1][name]) + 0.25 * after[2][name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)


def test_starts_from_a_pre_training_run(classes, tmp_path, capsys):
    before = tmp_path / "pretrained"
    assert pretrain(classes / "train", before, "--steps", 2, "--checkpoint.every", 1) == 0
    flags = [*FAST, "--data", str(classes), "--steps", "1", "--weights", str(before), "--optim.base-lr", "1e-30"]
    assert main([*flags, "--optim.min-lr", "0", "--out", str(tmp_path / "tuned")]) == 0
    printed = capsys.readouterr().out
    assert f"{before / 'checkpoints/step_2'}" in printed
    source, tuned = weights(before, 2), weights(tmp_path / "tuned", 1)
    taken = [name for name in tuned if f"encoder.{name}" in source]
    # everything but the final norm, and fc_norm and head are fresh
    assert len(taken) == len(tuned) - 4
    for name in taken:
        assert torch.equal(tuned[name], source[f"encoder.{name}"]), name
    assert torch.equal(tuned["fc_norm.weight"], torch.ones(64))


@pytest.mark.long
def test_starts_from_an_image_model_of_ones_own(classes, tmp_path, capsys):
    one_frame = ["--model.frames", 1, "--model.cube", 1, 8, 8, "--mask.kind", "random", "--mask.ratio", 0.75]
    assert pretrain(classes / "train", tmp_path / "image", "--steps", 2, *one_frame, "--target.loss", "smooth-l1") == 0
    assert "random mask hides 3 of 4 cubes" in capsys.readouterr().out
    flags = ["--steps", 1, "--weights", tmp_path / "image", "--optim.base-lr", 1e-30, "--optim.min-lr", 0]
    assert run(classes, tmp_path / "tuned", *flags) == 0
    assert "an image model: its kernel is spread over 2 frames" in capsys.readouterr().out
    image, clips = (weights(tmp_path / run, step) for run, step in (("image", 2), ("tuned", 1)))
    kernel = image["encoder.patch_embed.proj.weight"] / 2
    assert torch.equal(clips["patch_embed.proj.weight"], torch.cat([kernel, kernel], dim=2))
    with pytest.raises(SystemExit):
        run(classes, tmp_path / "other", *flags, "--model.cube", 2, 16, 16)
    assert "has patches of 8x8 pixels, the model's cubes have 16x16" in capsys.readouterr().err


def test_frames_for_erasing_are_normalised_as_the_weights_were_trained(classes, tmp_path):
    torch.manual_seed(0)
    source = videomae.classifier("vit_tiny", num_classes=3, frames=4, image_size=16, cube=(2, 8, 8), init_scale=30)
    source.input = dataclasses.replace(source.input, mean=(0.1, 0.5, 0.9), std=(0.5, 0.2, 0.1))
    videomae.weights.save_weights(source, tmp_path / "w.safetensors")
    losses = []
    for probability in ("0", "1e-12"):  # bytes for the model; float frames of which nothing is erased
        out = tmp_path / probability
        flags = ["--weights", tmp_path / "w.safetensors", "--erasing.probability", probability, "--validate-every", 0]
        assert run(classes, out, "--steps", 1, *flags) == 0
        losses.append(metrics(out)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(math.log(3), abs=0.05)  # the pixels matter


def test_leaves_out_a_video_that_cannot_be_read_and_spares_its_partner(classes, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(classes, data)
    broken = data / "train" / "green" / "1.mp4"
    broken.write_bytes(broken.read_bytes()[:200])
    (data / "val" / "red" / "1.mp4").write_bytes(b"no video")
    out = tmp_path / "run"
    assert run(data, out, "--steps", 3, "--mix.probability", 1, "--validate-every", 1) == 0
    assert "green/1.mp4" in (out / "skipped.jsonl").read_text()
    assert "counted as wrong" in capfd.readouterr().err
    last = evaluations(out)[-1]
    assert last["val_unreadable"] == 1
    assert metrics(out)[-1]["skipped_clips"] == 1
    assert all(math.isfinite(line["loss"]) for line in metrics(out))


def test_the_published_recipe_runs_with_everything_on(classes, tmp_path, capfd):
    """k400-base-800 on a tiny model: mixing, erasing, RandAugment, layer decay, drop path, flips."""
    flags = f"k400-base-800 {SIZE} --sampling.stride 2 --steps 3 --batch-size 8 --workers 0".split()
    out = tmp_path / "run"
    assert main([*flags, "--log.every", "1", "--data", str(classes), "--out", str(out)]) == 0
    assert [line["loss"] for line in metrics(out)][0] == pytest.approx(math.log(3), abs=0.01)
    record = json.loads((out / "config.json").read_text())
    assert record["plan"]["classes"] == ["blue", "green", "red"]
    assert "half of the clips mirrored" in capfd.readouterr().out


@pytest.mark.long
def test_reads_the_nearest_frames_of_a_strided_set_if_told_to(classes, tmp_path, capsys):
    stored = tmp_path / "stored"
    list_file = classes / "train.csv"
    lines = [f"train/{name}/{i}.mp4 {label}\n" for label, name in enumerate(COLOURS) for i in range(4)]
    list_file.write_text("".join(lines))
    try:
        assert prepare.main([str(list_file), str(stored), "--stride", "2", "--phases", "first"]) == 0
    finally:
        list_file.unlink()
    with pytest.raises(SystemExit):
        run(stored, tmp_path / "run", "--steps", 1)
    assert "--allow-nearest" in capsys.readouterr().err
    assert run(stored, tmp_path / "run", "--steps", 2, "--allow-nearest") == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["data.allow_nearest"] is True


def test_warns_of_mirrored_sides(tmp_path, capsys):
    for name in ("turn_left", "turn-right"):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_video(tmp_path / "data" / name / "a.mp4", moving_frames(8, 24, 32))
    assert run(tmp_path / "data", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--augment.flip", "true") == 0
    assert "tell left from right (turn-right, turn_left)" in capsys.readouterr().err


def test_a_validation_set_is_absent_or_right(classes, tmp_path, capsys):
    (tmp_path / "train.csv").write_text("".join(f"{path} 0\n" for path in classes.glob("train/*/*.mp4")))
    config = FINETUNE["demo"]()
    made = Finetuning(dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path))))
    made.find_videos()
    assert made._val is None
    assert "note: no validation, which --data.val may give: no val.csv in" in capsys.readouterr().err
    (tmp_path / "val.csv").write_text(f"{next(classes.glob('val/*/*.mp4'))} 7\n")
    with pytest.raises(ValueError, match="label 7"):
        made.find_videos()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["k400-base-800"], "needs --data"),
        (["demo", "--data", "nothing"], "nothing"),
        (["demo", "--weights", "nothing.pth", "--data", "CLASSES"], "nothing.pth"),
        (["demo", "--data", "CLASSES/train/red"], "label|class|split"),
        (["ssv2-base-800", "--data", "CLASSES", "--augment.flip", "true"], "left from right"),
        (["demo", "--data", "CLASSES", "--batch-size", "3", "--mix.probability", "1"], "multiple"),
        (["demo", "--data", "CLASSES", "--micro-batch", "1", "--mix.probability", "1"], "mixed with each other"),
        (["demo", "--data", "CLASSES", "--data.val", "CLASSES/train"], "train"),
        (["demo", "--data", "CLASSES", "--model.image-size", "20"], "20"),
        (["demo", "--data", "CLASSES", "--model.init-scale", "nan"], "error: model.init-scale must be in [0, 1e6]"),
    ],
)
def test_refuses_in_one_line(flags, says, classes, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([flag.replace("CLASSES", str(classes)) for flag in flags])
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m train.finetune: error: ")
    assert any(choice in error for choice in says.split("|"))
    assert os.listdir(tmp_path) == []


def test_the_objective_compiles_in_one_piece():
    torch.manual_seed(0)
    model = videomae.classifier("vit_tiny", num_classes=5, frames=4, image_size=16, cube=(2, 8, 8), init_scale=1.0)
    objective = ClassifyObjective(model.eval(), 0.1)
    frames = torch.randint(0, 256, (4, 4, 16, 16, 3), dtype=torch.uint8)
    lam, partner = torch.tensor([0.3, 1.0, 1.0, 0.3]), torch.tensor([3, 2, 1, 0])
    inputs = {"labels": torch.tensor([0, 4, 2, 1]), "lam": lam, "partner": partner, "blend": lam}
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for function in (objective, compiled):
        model.zero_grad()
        loss = function(frames, weight=torch.tensor([1.0, 1, 0, 1]), scale=torch.tensor(0.5), **inputs)
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])
    # and it is the mixed cross-entropy of what the model says of mixed tokens
    tokens = model.embed(frames)
    mixed = lam[:, None, None] * tokens + (1 - lam)[:, None, None] * tokens[partner]
    log_p = model.classify(mixed).log_softmax(-1)
    own = 0.9 * torch.eye(5)[inputs["labels"]] + 0.02
    target = lam[:, None] * own + (1 - lam)[:, None] * own[partner]
    each = -(target * log_p).sum(-1)
    torch.testing.assert_close(results[0][0], (0.5 * each[[0, 1, 3]].mean()).detach())
    assert Mix(lam, partner, lam).lam is lam


def test_every_recipe_describes_a_model_that_can_be_built():
    for make in FINETUNE.values():
        verb = Finetuning(make())
        assert verb.sequences()["encoder"][0] == verb.input.num_cubes
        if verb.config.mix.probability > 0:
            assert verb.together % verb.config.data.views_per_decode == 0
        else:  # nothing is mixed, so any clips may be apart
            assert verb.together == 1


def test_refuses_to_go_on_from_pre_training(classes, tmp_path, capsys):
    before = tmp_path / "pretrained"
    assert pretrain(classes / "train", before, "--steps", 1) == 0
    with pytest.raises(SystemExit) as end:
        run(classes, tmp_path / "run", "--steps", 2, "--resume", before / "checkpoints/step_1")
    assert end.value.code == 2
    assert "train.pretrain, not of train.finetune: start from it with --weights" in capsys.readouterr().err
