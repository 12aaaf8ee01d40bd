"""The command that probes frozen features: its numbers, what it writes, and what it refuses."""

import contextlib
import json

import numpy as np
import pytest
import torch

import videomae
from tests.train.classifiers import tiny_classifier
from tests.videos import moving_frames, write_video
from train import probe as command
from train.evaluation import weights_hash
from train.probe import Known, main
from train.probe_config import ProbeConfig
from train.probe_features import features_in
from train.probing import STRENGTHS, Pass, fit_linear, knn_probabilities, share_right
from train.shares import Shares
from videomae.data.augment import resize_short
from videomae.data.decode import Video
from videomae.data.sampling import Sampling
from videomae.features import features_of
from videomae.weights import save_weights

CLASSES = ("dark", "light", "medium")
FLAGS = "--workers 0 --sampling.kind dense --sampling.stride 2 --paper.epochs 8 --paper.warmup-epochs 1 --paper.lr 1"
FLAGS += " --paper.batch-size 7 --attentive.epochs 8 --attentive.batch-size 4 --attentive.lr 0.01"


@pytest.fixture
def videos(tmp_path):
    """Three classes by brightness, in train.csv and test.csv."""
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    for split, count in (("train", 21), ("test", 9)):
        lines = []
        for i in range(count):
            shade = (0, 190, 95)[i % 3]
            name = f"{split}-{i}.mp4"
            write_video(folder / name, moving_frames(12 + i % 5, 20, 24, seed=i) // 4 + np.uint8(shade))
            lines.append(f"{name} {i % 3}\n")
        (folder / f"{split}.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(7)
    model = videomae.pretrain_model("vit_tiny", frames=4, image_size=16, cube=(2, 8, 8), decoder_depth=1)
    save_weights(model, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def run(videos, weights, *flags):
    return main(["--weights", str(weights), "--data", str(videos), *FLAGS.split(), *map(str, flags)])


def result(out):
    return json.loads((out / "result.json").read_text())


def test_every_method_learns_what_is_plain_to_see(videos, weights, tmp_path, capsys):
    assert run(videos, weights, "--method", "all", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    found = result(tmp_path / "out")
    assert list(found["accuracy"]) == ["knn", "linear", "linear-paper", "attentive"]
    for method, right in found["accuracy"].items():
        assert right["top1"] > 85, method
        assert right["top5"] == 100
        assert f"{method:<16}{right['top1']:7.2f}   100.00" in printed.out
    assert found["commonest_class"] == pytest.approx(100 / 3)
    assert found["train"] | {"list": ""} == {"videos": 21, "used": 21, "unreadable": 0, "list": ""}
    assert found["test"] | {"list": ""} == {"videos": 9, "used": 9, "unreadable": 0, "list": ""}
    assert found["chosen"]["paper.steps"] == 8 * 21 // 7
    assert found["sampling"] == {"kind": "dense", "stride": 2}
    assert found["config"]["method"] == ["all"]
    assert {"command", "commit", "versions"} <= set(found)


def test_the_result_says_what_was_read_and_how(videos, weights, tmp_path):
    run(videos, weights, "--out", tmp_path / "out", "--knn.k", 3, "--views", "2x1", "--videos", 8)
    found = result(tmp_path / "out")
    assert list(found["accuracy"]) == ["knn", "linear"]
    assert found["train"]["used"] == found["test"]["used"] == 8
    assert found["config"]["knn.k"] == 3
    assert found["chosen"]["linear.l2"] in STRENGTHS
    model = videomae.model_from(weights)[0].encoder
    assert found["weights"] == {"read": str(weights), "random": False, "hash": weights_hash(model)}


def test_the_same_command_gives_the_same_and_a_random_encoder_something_else(videos, weights, tmp_path):
    flags = ("--method", "linear-paper", "attentive", "--paper.epochs", 3, "--attentive.epochs", 2)
    for name, more in (("a", ()), ("b", ()), ("random", ("--random",))):
        run(videos, weights, *flags, *more, "--out", tmp_path / name)
    first, again, random = (result(tmp_path / name) for name in ("a", "b", "random"))
    assert first["accuracy"] == again["accuracy"]
    assert random["weights"]["random"] is True
    assert random["weights"]["hash"] != first["weights"]["hash"]


def test_a_classifiers_features_are_probed_too_as_it_was_trained(videos, tmp_path):
    tiny_classifier(tmp_path / "w.safetensors", sampling=Sampling("uniform"))
    flags = ["--weights", str(tmp_path / "w.safetensors"), "--data", str(videos), "--workers", "0"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert result(tmp_path / "out")["sampling"]["kind"] == "uniform"


def test_test_videos_may_lie_elsewhere(videos, weights, tmp_path):
    (videos / "test.csv").rename(videos / "other.csv")
    flags = ("--test-data", videos / "other.csv", "--out", tmp_path / "out")
    assert run(videos / "train.csv", weights, *flags) == 0
    assert result(tmp_path / "out")["test"]["videos"] == 9


def prepared(videos, weights, *flags):
    arguments = ["--weights", str(weights), "--data", str(videos), *FLAGS.split(), *map(str, flags)]
    config = command.parse_flags(arguments, ProbeConfig, prog="x", about="")
    return command.prepare(config, Shares(), contextlib.ExitStack())


def test_features_are_those_of_the_videos_in_their_order(videos, weights):
    probe = prepared(videos, weights, "--videos", 6)
    known = features_in(probe, probe.train, "train")
    assert known.features.shape == (6, 1, 64)
    assert not known.features.is_inference()
    model = probe.inference.model
    for index, row, label in zip(probe.train.indices, known.features[:, 0], known.labels.tolist(), strict=True):
        assert label == index % 3
        numbers = Sampling("dense", 2).middle(12 + index % 5, 4)
        frames = resize_short(Video(videos / f"train-{index}.mp4").read(numbers), 16)
        assert frames.shape == (4, 16, 19, 3)
        clip = torch.from_numpy(frames[:, :, 1:17].copy())[None]
        with torch.no_grad():
            torch.testing.assert_close(row, features_of(model, clip)[0], rtol=1e-4, atol=1e-5)


def test_views_are_averaged_as_probabilities(videos, weights):
    probe = prepared(videos, weights, "--linear.l2", 0.1, "--knn.k", 4)
    torch.manual_seed(0)
    train = Known(torch.randn(21, 1, 8), torch.arange(21) % 3)
    test = Known(torch.randn(5, 4, 8), torch.arange(5) % 3)
    fit = fit_linear(train.features[:, 0], train.labels, 3, l2=0.1)
    expected = torch.stack([fit(test.features[:, view]).softmax(1) for view in range(4)]).mean(0)
    torch.testing.assert_close(command._by_regression(probe, train, test), expected.float())
    votes = [
        knn_probabilities(train.features[:, 0], train.labels, test.features[:, view], 3, neighbours=4)
        for view in range(4)
    ]
    torch.testing.assert_close(command._by_neighbours(probe, train, test), torch.stack(votes).mean(0))


def test_tokens_computed_anew_are_those_that_were_kept(videos, weights, monkeypatch, capsys):
    passes = {}
    for budget in (1 << 40, 0):
        probe = prepared(videos, weights, "--attentive.epochs", 2)
        monkeypatch.setattr(command, "memory_budget", lambda device, budget=budget: budget)
        passes[budget] = list(command._tokens(probe, 21))
    assert "kept on cpu" in (printed := capsys.readouterr().out)
    assert "computed anew in every epoch" in printed
    assert [len(labels) for _, labels in passes[0]] == [4, 4, 4, 4, 4, 1] * 2
    for kept, anew in zip(*passes.values(), strict=True):
        assert torch.equal(kept.labels, anew.labels)
        torch.testing.assert_close(kept.inputs, anew.inputs, rtol=1e-3, atol=1e-3)


def test_augmented_batches_have_the_size_and_labels_asked_for(videos, weights, monkeypatch):
    monkeypatch.setattr(command, "_MICRO_BATCH", 3)
    probe = prepared(videos, weights, "--videos", 10)
    passes = list(command._augmented(probe, batch=5, steps=4))
    assert [one.inputs.shape for one in passes] == [(5, 64)] * 4
    counts = torch.bincount(torch.cat([one.labels for one in passes]), minlength=3)
    wanted = torch.tensor([index % 3 for index in probe.train.indices])
    assert torch.equal(counts, 2 * torch.bincount(wanted, minlength=3))
    # crops differ from epoch to epoch
    assert not torch.equal(passes[0].inputs, passes[2].inputs)


def test_the_papers_probe_can_have_batch_norm(videos, weights, monkeypatch):
    # features that share a large mean
    torch.manual_seed(0)
    features, labels = torch.randn(21, 1, 64), torch.arange(21) % 3
    features[:, 0, 0] += 3 * labels
    features[:, 0] = 0.01 * features[:, 0] + 5
    known, right = Known(features, labels), {}
    for flag in ("--paper.no-batch-norm", "--paper.batch-norm"):
        probe = prepared(videos, weights, flag, "--paper.lr", 0.1)
        monkeypatch.setattr(command, "_augmented", lambda *_: [Pass(features[:, 0], labels)] * 100)
        right[flag] = share_right(command._by_paper(probe, known, known), labels)
    assert right["--paper.no-batch-norm"] < 60
    assert right["--paper.batch-norm"] == 100


def test_unreadable_test_videos_are_an_error_or_wrong_as_asked(videos, weights, tmp_path, capsys):
    (videos / "test-1.mp4").write_bytes(b"none")
    (videos / "train-4.mp4").write_bytes(b"none")
    assert run(videos, weights) == 1
    assert "stopped: 1 of 9 test videos cannot be read" in capsys.readouterr().err
    assert (
        run(videos, weights, "--unreadable", "wrong", "--method", "all", "--paper.epochs", 2, "--out", tmp_path / "out")
        == 0
    )
    found = result(tmp_path / "out")
    assert found["test"]["unreadable"] == found["train"]["unreadable"] == 1
    for right in found["accuracy"].values():
        assert right["top5"] == pytest.approx(100 * 8 / 9)


def test_wrong_use_is_one_line(videos, weights, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        assert end.value.code == 2
        *notes, error = capsys.readouterr().err.splitlines()
        assert all(line.startswith("note: ") for line in notes)
        assert error.startswith("python -m train.probe: error: ")
        return error

    data = ("--data", videos)
    assert "nothing to learn from: give --data" in refused("--weights", weights)
    assert "--weights" in refused(*data)
    assert "the weights do not say how frames were sampled" in refused("--weights", weights, *data)
    assert "no such file or folder" in refused("--weights", tmp_path / "none.pth", *data)
    assert "is the training list" in refused("--weights", weights, "--data", videos / "train.csv")
    same = ("--data", videos / "train.csv", "--test-data", videos / "train.csv", "--sampling.stride", 2)
    assert "is the training list" in refused("--weights", weights, *same)
    assert "views must be CLIPSxCROPS" in refused("--weights", weights, *data, "--views", "3")
    assert "paper.warmup-epochs must be fewer" in refused("--weights", weights, *data, "--paper.epochs", 1)
    assert "method" in refused("--weights", weights, *data, "--method", "svm")
    given = ("--weights", weights, *data, "--workers", 0, "--sampling.stride", 2)
    assert "seed must fit 64 bits" in refused(*given, "--seed", 2**63)
    assert "linear.l2 must be in (0, 1e6]; got inf" in refused(*given, "--linear.l2", "inf")
    assert "knn.temperature must be in [1e-6, 1e6]" in refused(*given, "--knn.temperature", "1e-320")
    assert "--out must be a folder" in refused(*given, "--out", videos / "train.csv")
    assert "a fifth of 4 training videos" in refused(*given, "--videos", 4)


def test_too_few_training_videos_that_can_be_read_choose_no_penalty(videos, weights, capsys):
    for i in range(4, 21):
        (videos / f"train-{i}.mp4").write_bytes(b"none")
    assert run(videos, weights, "--method", "knn", "linear") == 1
    assert "stopped: a fifth of 4 training videos, on which the penalty" in capsys.readouterr().err
    assert run(videos, weights, "--method", "knn", "linear", "--linear.l2", 0.01) == 0
    for i in range(4):
        (videos / f"train-{i}.mp4").write_bytes(b"none")
    capsys.readouterr()
    assert run(videos, weights) == 1
    assert capsys.readouterr().err.endswith("stopped: 21 of 21 train videos cannot be read\n")


def test_a_method_that_fails_gives_no_result(videos, weights, monkeypatch, capsys):
    monkeypatch.setattr(command, "_by_neighbours", lambda *_: torch.full((9, 3), torch.nan))
    assert run(videos, weights, "--method", "knn") == 1
    assert "stopped: knn ended with numbers that are not finite" in capsys.readouterr().err


@pytest.mark.long
def test_workers_change_nothing(videos, weights, tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        run(videos, weights, "--method", "all", "--workers", workers,
            "--out", tmp_path / name)  # fmt: skip
    assert result(tmp_path / "a")["accuracy"] == result(tmp_path / "b")["accuracy"]
