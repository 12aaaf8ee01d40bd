"""The probe that looks at the features of a pre-training run: what it writes, and that the run does not notice it."""

import json
import os

import pytest

from tests.runs import assert_same, metrics, run, weights
from tests.videos import moving_frames, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 3), ("test", 2)):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                path = folder / split / label / f"{i}.mp4"
                write_video(path, moving_frames(10, 24, 32, seed=i) // (1 if label == "a" else 3))
    return folder


def test_looks_at_the_features_and_leaves_the_run_as_it_is(videos, tmp_path, capsys):
    flags = ["--steps", 4, "--checkpoint.every", 2]
    assert run(videos / "train", tmp_path / "without", *flags) == 0
    probed = tmp_path / "with"
    assert run(videos / "train", probed, *flags, "--probe.data", videos, "--probe.every", 2) == 0
    assert_same(weights(tmp_path / "without", 4), weights(probed, 4))
    assert [line["loss"] for line in metrics(probed)] == [line["loss"] for line in metrics(tmp_path / "without")]
    lines = [json.loads(line) for line in (probed / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        assert 0 <= line["probe_knn"] <= 100
        assert 0 <= line["probe_linear"] <= 100
    out, err = capsys.readouterr()
    assert "6 labelled clips tell 4 others apart" in out
    assert "probe after step 2: knn " in err
    # the curves have a place for it
    assert (probed / "curves.png").stat().st_size > (tmp_path / "without" / "curves.png").stat().st_size


def test_goes_on_with_or_without_it(videos, tmp_path):
    flags = ["--steps", 4, "--checkpoint.every", 2, "--probe.every", 2]
    out = tmp_path / "run"
    assert run(videos / "train", out, *flags, "--probe.data", videos) == 0
    os.rename(out / "checkpoints/step_4", tmp_path / "step_4")
    assert run(videos / "train", out, *flags) == 0
    lines = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]


def test_refuses_a_probe_set_without_labels(videos, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(videos / "train", tmp_path / "run", "--probe.data", videos / "train" / "a")
    assert end.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
