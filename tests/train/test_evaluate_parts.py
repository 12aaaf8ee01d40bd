"""Evaluations that are killed, shared out, or meet videos that cannot be read: one result all the same."""

import csv
import shutil
import signal
from pathlib import Path

import pytest

from tests.runs import wait_for
from tests.train.classifiers import DENSE, tiny_classifier, write_labelled
from tests.train.evaluations import assert_same_predictions, evaluate, lines, numbers, result, start
from train import evaluate as command

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
def without_picture(monkeypatch):
    """It takes longer than all the rest."""
    monkeypatch.setattr(command, "draw_confusion", lambda *_: None)


@pytest.fixture
def broken(data, tmp_path):
    """A copy in which two of the videos cannot be read."""
    folder = Path(shutil.copytree(data.parent, tmp_path / "broken"))
    (folder / "2.mp4").write_bytes(b"no video")
    (folder / "5.mp4").unlink()
    return folder / "test.csv"


@pytest.mark.long
@pytest.mark.parametrize("cut", [1, 40, 200])
def test_goes_on_behind_a_line_that_was_cut_off(data, weights, tmp_path, cut):
    assert evaluate(data, weights, tmp_path / "whole", "--views", "2x2") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    text = (tmp_path / "whole" / "predictions.jsonl").read_text()
    few = "".join(text.splitlines(keepends=True)[:4])
    (tmp_path / "cut" / "predictions.jsonl").write_text(few[:-cut])
    (tmp_path / "cut" / "result.json").unlink()
    assert evaluate(data, weights, tmp_path / "cut", "--views", "2x2") == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert_same_predictions(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.long
def test_a_killed_evaluation_goes_on(data, weights, tmp_path):
    # many videos, so that there is time to kill it
    (tmp_path / "long.csv").write_text("".join(f"{data.parent}/{i % COUNT}.mp4 {i % 3}\n" for i in range(400)))
    flags = ("--views", "2x2")
    assert evaluate(tmp_path / "long.csv", weights, tmp_path / "whole", *flags) == 0
    for kill in range(2):
        file = tmp_path / "killed" / "predictions.jsonl"
        before = file.read_text().count("\n") if kill else 0
        process = start(tmp_path / "long.csv", weights, tmp_path / "killed", *flags)
        wait_for(lambda b=before, f=file: f.exists() and f.read_text().count("\n") > b)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "result.json").exists()
    assert evaluate(tmp_path / "long.csv", weights, tmp_path / "killed", *flags) == 0
    assert [row["index"] for row in lines(tmp_path / "killed")] == list(range(400))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert_same_predictions(tmp_path / "killed", tmp_path / "whole")
    for name in ("per_class.csv", "confusion.csv"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.long
def test_a_signal_ends_it_after_the_videos_at_hand(data, weights, tmp_path):
    (tmp_path / "long.csv").write_text("".join(f"{data.parent}/{i % COUNT}.mp4 {i % 3}\n" for i in range(400)))
    process = start(tmp_path / "long.csv", weights, tmp_path / "out", "--views", "2x2")
    wait_for(lambda: (tmp_path / "out" / "predictions.jsonl").exists() and lines(tmp_path / "out"))
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from here" in said
    assert 0 < len(lines(tmp_path / "out")) < 400


def test_three_shares_are_one_evaluation(data, weights, tmp_path, capsys):
    assert evaluate(data, weights, tmp_path / "one", "--views", "2x2") == 0
    for part in (2, 0, 1):
        capsys.readouterr()
        assert not (tmp_path / "three" / "result.json").exists()
        assert evaluate(data, weights, tmp_path / "three", "--views", "2x2", "--shard", f"{part}/3") == 0
        said = capsys.readouterr().out
        assert ("top-1" in said) == (part == 1)
    assert numbers(tmp_path / "three") == numbers(tmp_path / "one")
    assert_same_predictions(tmp_path / "three", tmp_path / "one")
    assert not list((tmp_path / "three").glob("predictions-*"))
    # any of them again, or all in one
    for flags in (("--shard", "0/3"), ()):
        assert evaluate(data, weights, tmp_path / "three", "--views", "2x2", *flags) == 0
        assert numbers(tmp_path / "three") == numbers(tmp_path / "one")


@pytest.mark.long
def test_other_shares_count_no_video_twice(data, weights, tmp_path):
    assert evaluate(data, weights, tmp_path / "one", "--views", "2x2") == 0
    for shard in ("0/3", "1/2", "0/2"):
        assert evaluate(data, weights, tmp_path / "two", "--views", "2x2", "--shard", shard) == 0
    assert [row["index"] for row in lines(tmp_path / "two")] == list(range(COUNT))
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")


@pytest.mark.long
def test_shares_may_run_at_the_same_time(data, weights, tmp_path):
    assert evaluate(data, weights, tmp_path / "one", "--views", "2x2") == 0
    shares = [start(data, weights, tmp_path / "three", "--views", "2x2", "--shard", f"{i}/3") for i in range(3)]
    said = [share.communicate()[0] for share in shares]
    assert [share.returncode for share in shares] == [0, 0, 0]
    assert any("top-1" in text for text in said)
    assert numbers(tmp_path / "three") == numbers(tmp_path / "one")
    assert_same_predictions(tmp_path / "three", tmp_path / "one")


def test_unreadable_videos_are_an_error_that_names_all_of_them(broken, weights, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        assert evaluate(broken, weights, out) == 1
        said = capsys.readouterr().err
        assert "no result: 2 of 7 videos cannot be read" in said
        assert f"  {broken.parent}/2.mp4: Invalid data" in said
        assert f"  {broken.parent}/5.mp4: no such file" in said
        assert not (out / "result.json").exists()
        assert sorted(row["index"] for row in lines(out)) == list(range(COUNT))


def test_unreadable_videos_can_count_as_wrong_without_reading_anything_again(broken, data, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(broken, weights, out) == 1
    for path in broken.parent.glob("*.mp4"):
        path.unlink()
    assert evaluate(broken, weights, out, "--unreadable", "wrong") == 0
    assert "2 could not be read and count as wrong" in capsys.readouterr().out
    assert evaluate(data, weights, tmp_path / "sound") == 0
    rows = lines(tmp_path / "sound")
    right = sum(row["label"] == row["predicted"] for row in rows if row["index"] not in (2, 5))
    made = result(out)
    assert made["top1"] == pytest.approx(100 * right / COUNT, abs=1e-3)
    assert made["top5"] == pytest.approx(100 * 5 / COUNT, abs=1e-3)
    assert (made["videos"], made["unreadable"], made["protocol"]["unreadable"]) == (COUNT, 2, "wrong")
    first, second = made["unreadable_videos"]
    assert (first["path"], second["path"]) == (f"{broken.parent}/2.mp4", f"{broken.parent}/5.mp4")
    # as it was found at first: by now this file is gone as well
    assert "Invalid data" in first["reason"]
    table = list(csv.DictReader((out / "per_class.csv").open()))
    assert [(row["videos"], row["unreadable"]) for row in table] == [("3", "0"), ("2", "0"), ("2", "2")]


@pytest.mark.long
def test_repaired_videos_are_all_that_is_read_again(broken, data, weights, tmp_path):
    out = tmp_path / "out"
    assert evaluate(broken, weights, out) == 1
    for path in broken.parent.glob("*.mp4"):
        path.unlink()
    for i in (2, 5):
        shutil.copy(data.parent / f"{i}.mp4", broken.parent)
    assert evaluate(broken, weights, out) == 0
    assert evaluate(data, weights, tmp_path / "sound") == 0
    assert numbers(out) == numbers(tmp_path / "sound")
    assert_same_predictions(out, tmp_path / "sound")


@pytest.mark.long
def test_shares_name_unreadable_videos_too(broken, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(broken, weights, out, "--shard", "0/2") == 1
    assert "2.mp4" in capsys.readouterr().err
    assert evaluate(broken, weights, out, "--shard", "1/2") == 1
    said = capsys.readouterr().err
    assert "no result: 2 of 7" in said
    assert evaluate(broken, weights, out, "--shard", "0/2", "--unreadable", "wrong") == 0
    assert result(out)["unreadable"] == 2
