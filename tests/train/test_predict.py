"""Predictions of single videos, as the evaluation makes them."""

import json

import pytest

from tests.train.classifiers import DENSE, NAMES, tiny_classifier, write_labelled
from tests.videos import moving_frames, write_video
from train.evaluate import main as evaluate
from train.predict import main
from videomae.model import pretrain_model
from videomae.weights import save_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights and a list of three videos."""
    folder = tmp_path_factory.mktemp("made")
    tiny_classifier(folder / "w.safetensors", classes=NAMES, sampling=DENSE)
    return folder / "w.safetensors", write_labelled(folder / "videos", 3)


def predict(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def test_says_what_the_evaluation_says(made, tmp_path, capsys):
    weights, listed = made
    given = ["--data", str(listed), "--weights", str(weights), "--out", str(tmp_path), "--workers", "0"]
    assert evaluate([*given, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert predict(listed.parent, "--weights", weights, "--json") == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [one["video"] for one in said] == [row["path"] for row in rows]
    for one, row in zip(said, rows, strict=True):
        ours = [(top["label"], top["class"], top["probability"]) for top in one["top"]]
        assert ours == [(c, NAMES[c], pytest.approx(p, abs=1e-5)) for c, p in row["top5"]]


def test_shows_names_and_percent(made, capsys):
    weights, listed = made
    assert predict(listed.parent / "1.mp4", "--weights", weights, "--top", 2, "--views", "2x2") == 0
    path, first, second = capsys.readouterr().out.splitlines()
    assert path == str(listed.parent / "1.mp4")
    shares = [float(line.split(" %  ")[0]) for line in (first, second)]
    assert shares[0] >= shares[1] > 0
    assert {line.split(" %  ")[1] for line in (first, second)} < set(NAMES)


def test_classes_without_names_are_numbers(made, tmp_path, capsys):
    tiny_classifier(tmp_path / "w.safetensors", sampling=DENSE)
    assert predict(made[1].parent / "0.mp4", "--weights", tmp_path / "w.safetensors") == 0
    names = [line.split(" %  ")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert sorted(names) == ["0", "1", "2"]


def test_an_unreadable_video_costs_itself(made, tmp_path, capsys):
    weights, listed = made
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    videos = (tmp_path / "broken.mp4", listed.parent / "0.mp4", tmp_path / "missing.mp4")
    assert predict(*videos, "--weights", weights, "--json") == 1
    said = capsys.readouterr()
    assert [json.loads(line)["video"] for line in said.out.splitlines()] == [str(videos[1])]
    complaints = [line for line in said.err.splitlines() if not line.startswith("note:")]
    assert len(complaints) == 2
    assert f"{videos[0]}: Invalid data" in complaints[0]
    assert f"{videos[2]}: no such file" in complaints[1]


def test_a_video_given_twice_is_shown_once(made, capsys):
    weights, listed = made
    assert predict(listed.parent / "0.mp4", listed.parent, "--weights", weights, "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--views", "5"), "views must be CLIPSxCROPS"),
        (("--top", "0"), "--top must be at least 1"),
        (("--workers", "-1"), "--workers must not be negative"),
        (("--sampling.kind", "uniform", "--sampling.stride", "2"), "uniform sampling has no stride"),
    ],
)
def test_wrong_use_is_refused(made, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        predict(made[1].parent, "--weights", made[0], *flags)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_weights_without_a_head_and_folders_without_a_video_are_refused(made, tmp_path, capsys):
    save_weights(pretrain_model("vit_tiny", frames=4, image_size=16, cube=(2, 8, 8)), tmp_path / "p.safetensors")
    (tmp_path / "empty").mkdir()
    asked = ((made[1].parent, tmp_path / "p.safetensors", "without a head"), (tmp_path / "empty", made[0], "no videos"))
    for source, weights, says in asked:
        with pytest.raises(SystemExit) as end:
            predict(source, "--weights", weights)
        assert end.value.code == 2
        assert says in capsys.readouterr().err


@pytest.mark.long
def test_many_videos_are_read_by_workers(made, tmp_path, capsys):
    for i in range(9):
        write_video(tmp_path / f"{i}.mp4", moving_frames(12, 24, 32, seed=i))
    assert predict(tmp_path, "--weights", made[0], "--json") == 0
    there = capsys.readouterr().out.splitlines()
    assert predict(tmp_path, "--weights", made[0], "--json", "--workers", 0) == 0
    here = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in there] == [json.loads(line) for line in here]
    assert len(here) == 9
