"""Multi-view evaluation: its numbers against a slow one, what it writes, what it refuses."""

import csv
import json
import shutil
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from tests.train.classifiers import DENSE, UNIFORM, tiny_classifier, write_labelled
from tests.train.evaluations import QUICK, assert_same_predictions, evaluate, lines, numbers, result, vectors
from train import evaluate as command
from train.evaluate import main
from videomae.data.decode import Video
from videomae.data.prepare import main as prepare
from videomae.model import pretrain_model
from videomae.weights import save_weights

COUNT = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The list of seven videos of three classes."""
    return write_labelled(tmp_path_factory.mktemp("data"), COUNT)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    tiny_classifier(path, sampling=DENSE)
    return path


@pytest.fixture(autouse=True)
def without_picture(request, monkeypatch):
    """It takes longer than all the rest; the tests that look at it ask for `picture`."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr(command, "draw_confusion", lambda *_: None)


@pytest.fixture
def picture():
    return "confusion.png"


def refused(capsys, data, weights, out, *flags):
    with pytest.raises(SystemExit) as end:
        evaluate(data, weights, out, *flags)
    assert end.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("note:", "warning:"))]
    assert len(said) == 1
    return said[0]


def slow_probabilities(model, path, clips, crops, stride):
    """One view at a time: frames, resize, crop, logits, softmax, mean (RECIPES F.4, G)."""
    length, side = model.input.frames, model.input.size[0]
    video = Video(path)
    stored = list(range(0, len(video), stride))
    stored += [stored[-1]] * (length - len(stored))
    total = np.zeros(model.head.out_features)
    for clip in range(clips):
        first = int(clip * max((len(stored) - length) / (clips - 1), 0))
        frames = video.read(stored[first : first + length])
        height, width = frames.shape[1:3]
        size = (side * height // min(height, width), side * width // min(height, width))
        planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
        resized = interpolate(planes, size=size, mode="bilinear").permute(0, 2, 3, 1)
        for crop in range(crops):
            offset = int(crop * (max(size) - side) / (crops - 1))
            at = (slice(offset, offset + side), slice(0, side))
            view = resized[(slice(None), *(at if height >= width else at[::-1]))]
            with torch.inference_mode():
                logits = model(view[None].contiguous()).double()[0].tolist()
            total += np.exp(logits) / sum(map(exp, logits))
    return total / (clips * crops)


def test_numbers_are_those_of_a_slow_evaluation(data, weights, tmp_path, capsys):
    assert evaluate(data, weights, tmp_path, "--views", "3x2") == 0
    model = tiny_classifier(tmp_path / "again.safetensors", sampling=DENSE)
    ours = vectors(tmp_path)
    right = []
    for i in range(COUNT):
        exact = slow_probabilities(model, str(data.parent / f"{i}.mp4"), 3, 2, 2)
        assert ours[i] == pytest.approx(exact, abs=1e-5)
        right.append(int(np.argmax(exact)) == i % 3)
    # neither all nor none: the next line would say little
    assert 0 < sum(right) < COUNT
    assert result(tmp_path)["top1"] == pytest.approx(100 * sum(right) / COUNT, abs=1e-3)
    assert f"{100 * sum(right) / COUNT:.2f} %   {sum(right)} of {COUNT} videos" in capsys.readouterr().out


def test_everything_is_written(data, weights, tmp_path, picture):
    assert evaluate(data, weights, tmp_path) == 0
    rows = lines(tmp_path)
    assert [row["index"] for row in rows] == list(range(COUNT))
    for i, row in enumerate(rows):
        vector = vectors(tmp_path)[i]
        assert (row["path"], row["label"]) == (str(data.parent / f"{i}.mp4"), i % 3)
        assert row["predicted"] == row["top5"][0][0] == vector.argmax()
        assert row["top5"] == [[c, pytest.approx(vector[c], abs=1e-6)] for c in np.argsort(-vector)]
    table = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [row["videos"] for row in table] == ["3", "2", "2"]
    right = [sum(row["label"] == row["predicted"] == c for row in rows) for c in range(3)]
    assert [int(row["top1_right"]) for row in table] == right
    matrix = [row[1:] for row in csv.reader((tmp_path / "confusion.csv").open())][1:]
    counts = [[sum((row["label"], row["predicted"]) == (i, j) for row in rows) for j in range(3)] for i in range(3)]
    assert matrix == [list(map(str, row)) for row in counts]
    with Image.open(tmp_path / picture) as drawn:
        assert min(drawn.size) > 300
    made = result(tmp_path)
    assert made["top5"] == 100
    assert made["mean_class_top1"] == pytest.approx(100 * np.mean(np.array(right) / (3, 2, 2)), abs=1e-3)
    assert made["videos_per_second"] == pytest.approx(COUNT / made["seconds"], rel=0.1)
    assert made["protocol"] | {"list": "", "weights": ""} == {
        "sampling": "dense, stride 2",
        "views": "5x3",
        "clip": "4x16x16",
        "resize": "short side to 16, bilinear, not antialiased",
        "crops": "evenly along the long side, from end to end",
        "frames": "exact",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "average": "mean of probabilities",
        "videos": COUNT,
        "classes": 3,
        "precision": "float32",
        "list": "",
        "weights": "",
        "unreadable": "error",
    }
    assert made["versions"]["torch"]
    assert json.loads((tmp_path / "protocol.json").read_text())["commit"] == made["commit"]


def test_one_view_is_the_middle(data, weights, tmp_path):
    assert evaluate(data, weights, tmp_path, "--views", "1x1") == 0
    model = tiny_classifier(tmp_path / "again.safetensors", sampling=DENSE)
    for i in range(COUNT):
        video = Video(str(data.parent / f"{i}.mp4"))
        frames = video.read(DENSE.middle(len(video), 4))
        height, width = frames.shape[1:3]
        size = (16 * height // min(height, width), 16 * width // min(height, width))
        resized = interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2), size=size, mode="bilinear")
        top, left = (size[0] - 16) // 2, (size[1] - 16) // 2
        view = resized[:, :, top : top + 16, left : left + 16].permute(0, 2, 3, 1)
        with torch.inference_mode():
            exact = model(view[None].contiguous()).softmax(1)[0]
        assert vectors(tmp_path)[i] == pytest.approx(exact.numpy(), abs=1e-5)


@pytest.mark.long
def test_scores_are_averaged_where_it_is_asked(data, weights, tmp_path):
    for how in ("prob", "score"):
        assert evaluate(data, weights, tmp_path / how, "--average", how, "--views", "3x2") == 0
    ours, theirs = vectors(tmp_path / "prob"), vectors(tmp_path / "score")
    assert max(abs(ours[i] - theirs[i]).max() for i in range(COUNT)) > 1e-3
    assert result(tmp_path / "score")["protocol"]["average"] == "mean of logits"


def test_a_second_time_nothing_is_read(data, weights, tmp_path, capsys):
    folder = Path(shutil.copytree(data.parent, tmp_path / "data"))
    assert evaluate(folder, weights, tmp_path / "out") == 0
    before, kept = numbers(tmp_path / "out"), (tmp_path / "out" / "predictions.jsonl").read_text()
    for path in folder.glob("*.mp4"):
        path.unlink()
    capsys.readouterr()
    assert evaluate(folder, weights, tmp_path / "out") == 0
    assert "7 of 7 videos are done" in capsys.readouterr().out
    assert numbers(tmp_path / "out") == before
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == kept


def test_another_protocol_in_the_same_folder_is_refused(data, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(data, weights, out, "--views", "2x2") == 0
    before = (out / "result.json").read_text()
    said = refused(capsys, data, weights, out)
    assert "another protocol (views: 2x2 then, 5x3 now); give another --out" in said
    assert "average: mean of prob" in refused(capsys, data, weights, out, "--views", "2x2", "--average", "score")
    tiny_classifier(tmp_path / "other.safetensors", sampling=DENSE, seed=1)
    assert "weights: " in refused(capsys, data, tmp_path / "other.safetensors", out, "--views", "2x2")
    (tmp_path / "less.csv").write_text(f"{data.parent}/0.mp4 0\n{data.parent}/1.mp4 1\n")
    said = refused(capsys, tmp_path / "less.csv", weights, out, "--views", "2x2")
    assert "videos: 7 then, 2 now; list: " in said
    assert (out / "result.json").read_text() == before


def test_sampling_is_the_weights_own(data, tmp_path):
    tiny_classifier(tmp_path / "uniform.safetensors", sampling=UNIFORM)
    assert evaluate(data, tmp_path / "uniform.safetensors", tmp_path / "out") == 0
    card = result(tmp_path / "out")["protocol"]
    assert (card["sampling"], card["views"]) == ("uniform", "2x3")


def test_another_sampling_than_in_training_is_mentioned(data, weights, tmp_path, capsys):
    assert evaluate(data, weights, tmp_path / "out", "--sampling.stride", 1) == 0
    assert "note: sampling was dense, stride 2 in training and is dense, stride 1 here\n" in capsys.readouterr().err


def test_sampling_that_nothing_says_is_refused(data, tmp_path, capsys):
    tiny_classifier(tmp_path / "silent.safetensors")
    said = refused(capsys, data, tmp_path / "silent.safetensors", tmp_path / "out")
    assert "do not say how frames were sampled" in said
    assert evaluate(data, tmp_path / "silent.safetensors", tmp_path / "out", "--sampling.stride", 3) == 0
    assert result(tmp_path / "out")["protocol"]["sampling"] == "dense, stride 3"


def test_pretraining_weights_are_refused(data, tmp_path, capsys):
    path = tmp_path / "pretrain.safetensors"
    save_weights(pretrain_model("vit_tiny", frames=4, image_size=16, cube=(2, 8, 8), decoder_depth=1), path)
    said = refused(capsys, data, path, tmp_path / "out")
    assert "holds pre-training weights, without a head for classes: fine-tune first" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--views", "5"), "views must be CLIPSxCROPS, as 5x3; got '5'"),
        (("--views", "0x3"), "views must be 1 to 1000 clips"),
        (("--shard", "3/3"), "shard must be i/n, i below n; got '3/3'"),
        (("--sampling.kind", "uniform", "--sampling.stride", "2"), "uniform sampling has no stride"),
        (("--data.split", "train"), "must be one of test, val; got train"),
        (("--sampling.stride", "0"), "sampling.stride must be at least 1; got 0"),
    ],
)
def test_wrong_flags_are_refused(data, weights, tmp_path, capsys, flags, says):
    assert says in refused(capsys, data, weights, tmp_path / "out", *flags)


def test_what_is_missing_is_asked_for(data, weights, tmp_path, capsys):
    for given, says in ((["--data", str(data)], "give --weights"), (["--weights", str(weights)], "give --data")):
        with pytest.raises(SystemExit) as end:
            main(given)
        assert end.value.code == 2
        assert says in capsys.readouterr().err
    assert "no such" in refused(capsys, data, tmp_path / "none.safetensors", tmp_path / "out")


def test_the_demo_says_what_makes_its_weights(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--data", str(data)])
    assert end.value.code == 2
    assert "no runs/finetune-demo: `python -m train.finetune demo` makes it" in capsys.readouterr().err


def test_results_go_to_a_folder_named_after_recipe_or_weights(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "finetune-mine" / "checkpoints" / "step_7"
    run.mkdir(parents=True)
    tiny_classifier(run / "model.safetensors", sampling=DENSE)
    shutil.copy(run / "model.safetensors", tmp_path / "w.safetensors")
    given = ["--data", str(data), *QUICK, "--views", "1x1"]
    assert main([*given, "--weights", str(run.parents[1])]) == 0
    shutil.copy("w.safetensors", run / "ema.safetensors")
    assert main([*given, "--weights", str(run / "ema.safetensors")]) == 0
    assert main([*given, "--weights", "w.safetensors"]) == 0
    assert main(["hmdb51", *given, "--weights", "w.safetensors", "--split", "val"]) == 0
    made = [path.parent.name for path in (tmp_path / "runs").glob("evaluate-*/result.json")]
    mine = "evaluate-finetune-mine-step_7"
    assert sorted(made) == [mine, f"{mine}-ema", "evaluate-hmdb51", "evaluate-w"]


def test_weights_that_give_no_numbers_give_no_result(data, tmp_path, capsys):
    model = tiny_classifier(tmp_path / "w.safetensors", sampling=DENSE)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    save_weights(model, tmp_path / "w.safetensors")
    assert evaluate(data, tmp_path / "w.safetensors", tmp_path / "out") == 1
    assert "are not finite, in float32" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.long
def test_a_set_of_some_frames_is_read_where_it_will_do(data, weights, tmp_path, capsys):
    flags = ("--stride", "4", "--phases", "first", "--short-side", "32", "--workers", "1")
    assert prepare([str(data), str(tmp_path / "set"), *flags]) == 0
    said = refused(capsys, tmp_path / "set", weights, tmp_path / "out")
    assert "the set does not hold: it has 0, 4, 8, ... only; --allow-nearest takes the nearest" in said
    assert evaluate(tmp_path / "set", weights, tmp_path / "near", "--allow-nearest") == 0
    assert result(tmp_path / "near")["protocol"]["frames"] == "the nearest of 0, 4, 8, ..."
    assert evaluate(tmp_path / "set", weights, tmp_path / "out", "--sampling.stride", 4) == 0
    assert result(tmp_path / "out")["protocol"]["frames"] == "exact"


@pytest.mark.long
def test_workers_give_the_same(data, weights, tmp_path):
    assert evaluate(data, weights, tmp_path / "here") == 0
    assert evaluate(data, weights, tmp_path / "there", "--workers", 2) == 0
    assert numbers(tmp_path / "there") == numbers(tmp_path / "here")
    assert_same_predictions(tmp_path / "there", tmp_path / "here")


@pytest.mark.long
def test_another_image_size_and_length_are_the_weights(data, tmp_path):
    tiny_classifier(tmp_path / "large.safetensors", sampling=DENSE, frames=8, image_size=32)
    assert evaluate(data, tmp_path / "large.safetensors", tmp_path / "out") == 0
    assert result(tmp_path / "out")["protocol"]["clip"] == "8x32x32"
