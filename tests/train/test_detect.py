"""`python -m train.detect`: runs that go on, tests whose files agree, and predictions of given boxes."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.runs import assert_same, metrics, weights
from tests.train.classifiers import tiny_classifier
from train.detect import Detection, main
from train.detect_recipes import DETECT
from train.predict import main as predict
from videomae.data.box_rows import read_rows
from videomae.data.dataset import Sample
from videomae.data.demo import MOTIONS
from videomae.data.demo_scenes import make_scenes
from videomae.data.key_frames import find_key_frames
from videomae.data.sampling import KeyFrameClip
from videomae.detector import Detector
from videomae.metrics import frame_map
from videomae.weights import model_from, save_weights

FAST = "--model.size vit_tiny --model.frames 4 --model.image-size 32 --clip.short-side 40 --batch-size 4"
FAST += " --workers 0 --log.every 1 --log.tensorboard false --checkpoint.keep 9 --checkpoint.every 2"
CLIP = KeyFrameClip(stride=1, rate=None, short_side=40)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "set", train=10, test=5, frames=8, size=40).parent


def run(scenes, out, *flags):
    return main(["demo", *FAST.split(), "--data", str(scenes), "--out", str(out), *map(str, flags)])


@pytest.fixture(scope="module")
def done(scenes, tmp_path_factory):
    """A whole run: 6 steps, validated after 5 and at the end."""
    out = tmp_path_factory.mktemp("done") / "run"
    assert run(scenes, out, "--steps", 6, "--validate-every", 2) == 0
    return out


@pytest.fixture(scope="module")
def opinionated(scenes, tmp_path_factory):
    """Weights of a detector that tells boxes apart, which a fresh one hardly does."""
    torch.manual_seed(3)
    made, _ = model_from(_detector(tmp_path_factory.mktemp("weights") / "fresh.safetensors", scenes))
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if name.startswith("head") else 0.2)
    path = tmp_path_factory.mktemp("weights") / "detector.safetensors"
    save_weights(made, path)
    return path


def _detector(path, scenes):
    config = DETECT["demo"]()
    model = replace(config.model, size="vit_tiny", frames=4, image_size=32)
    verb = Detection(replace(config, model=model, clip=CLIP, data=replace(config.data, path=str(scenes))))
    verb.find_videos()
    save_weights(verb.build(), path)
    return path


def evaluations(out):
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


def test_a_run_is_validated_and_its_weights_say_what_they_are_of(done):
    assert [row["step"] for row in evaluations(done)] == [5, 6]
    assert all(0 <= row["val_map"] <= 100 and row["val_unreadable"] == 0 for row in evaluations(done))
    assert [row["step"] for row in metrics(done)] == list(range(1, 7))
    model, _ = model_from(done / "checkpoints" / "step_6")
    assert isinstance(model, Detector)
    assert (model.classes, model.class_ids, model.key_clip) == (MOTIONS, tuple(range(12)), CLIP)


def test_gone_on_with_it_is_the_same_run(scenes, done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    for step in (4, 6):
        shutil.rmtree(out / "checkpoints" / f"step_{step}")
    assert run(scenes, out, "--steps", 6, "--validate-every", 2) == 0
    assert_same(weights(out, 6), weights(done, 6))
    assert evaluations(out) == evaluations(done)


def test_micro_batches_change_only_rounding(scenes, done, tmp_path):
    assert run(scenes, tmp_path / "run", "--steps", 6, "--validate-every", 0, "--micro-batch", 2) == 0
    one, other = weights(done, 6), weights(tmp_path / "run", 6)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_the_head_alone_learns_where_the_rest_is_frozen(scenes, opinionated, tmp_path):
    out = tmp_path / "run"
    assert (
        run(scenes, out, "--steps", 2, "--model.frozen", "true", "--weights", opinionated, "--validate-every", 0) == 0
    )
    before, _ = model_from(opinionated)
    after = weights(out, 2)
    for name, value in before.state_dict().items():
        assert torch.equal(after[name], value) != name.startswith("head"), name


@pytest.fixture(scope="module")
def tested(scenes, opinionated, tmp_path_factory):
    """What a test of these weights wrote."""
    out = tmp_path_factory.mktemp("test") / "out"
    flags = ("--evaluate", "--weights", str(opinionated), "--pictures", "2")
    assert main(["demo", *flags, "--data", str(scenes), "--out", str(out), "--workers", "0"]) == 0
    return out


def test_the_files_of_a_test_agree(scenes, tested):
    result = json.loads((tested / "result.json").read_text())
    found = read_rows(tested / "detections.csv", score=True)
    truth = find_key_frames(scenes, "val").ground_truth
    assert len(found) == 5 * 2 * 12
    again = frame_map(truth, found, classes=range(12))
    # scores have five decimals in the file
    assert again["mAP"] == pytest.approx(result["mAP"], abs=0.02)
    with (tested / "per_class.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == list(MOTIONS)
    assert sum(int(row["annotated"]) for row in table) == 10
    shown = [float(row["AP"]) for row in table if row["AP"]]
    assert np.mean(shown) == pytest.approx(100 * result["mAP"], abs=0.01)
    assert result["protocol"]["key_frames"] == 5
    assert result["protocol"]["boxes"] == "as annotated"
    assert len(list((tested / "pictures").glob("*.png"))) == 2


def test_a_prediction_is_the_test_s(scenes, tested, opinionated, tmp_path, capsys):
    rows = read_rows(tested / "detections.csv", score=True)
    frames = find_key_frames(scenes, "test")
    lines = ["path,second,x1,y1,x2,y2"]
    for i in range(len(frames)):
        sides = [",".join(f"{side:.6f}" for side in box) for box in frames.boxes_of(i)]
        lines += [f"{frames.names[i]},{frames.seconds[i]:g},{each}" for each in sides]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    flags = ["--detector", str(opinionated), "--boxes", str(tmp_path / "boxes.csv"), "--out", str(tmp_path / "out")]
    assert predict([str(scenes / "test"), *flags, "--json", "--top", "12"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 5
    scores = rows.score.reshape(5, 2, 12)
    for place, key_frame in enumerate(said):
        assert key_frame["video"].endswith(frames.names[place])
        for box, wanted in zip(key_frame["boxes"], scores[place], strict=True):
            found = dict(map(tuple, box["top"]))
            assert [found[name] for name in MOTIONS] == pytest.approx(wanted, abs=1e-5)
    assert len(list((tmp_path / "out").glob("*.png"))) == 5


def test_a_video_that_cannot_be_read_is_an_error_or_missed(scenes, opinionated, tmp_path, capsys):
    copied = tmp_path / "set"
    shutil.copytree(scenes, copied)
    broken = copied / "test" / "test_00002.mp4"
    data = bytearray(broken.read_bytes())
    half = len(data) // 2
    data[half : half + 400] = bytes(400)
    broken.write_bytes(data)
    flags = ["demo", "--evaluate", "--weights", str(opinionated), "--data", str(copied), "--workers", "0"]
    flags += ["--pictures", "0", "--out", str(tmp_path / "out")]
    assert main(flags) == 1
    assert "1 of 5 key frames cannot be read" in (error := capsys.readouterr().err)
    assert "test_00002.mp4" in error
    assert not (tmp_path / "out" / "result.json").exists()
    assert main([*flags, "--unreadable", "missed"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["unreadable"]) == 1
    assert len(read_rows(tmp_path / "out" / "detections.csv", score=True)) == 4 * 2 * 12


@pytest.fixture(scope="module")
def verb(scenes):
    config = DETECT["demo"]()
    model = replace(config.model, size="vit_tiny", frames=4, image_size=32)
    made = Detection(replace(config, model=model, clip=CLIP, data=replace(config.data, path=str(scenes))))
    made.find_videos()
    return made


def test_boxes_are_moved_only_by_what_is_asked_for(verb):
    still = Detection(replace(verb.config, augment=replace(verb.config.augment, jitter=False, max_boxes=1)))
    still._train = verb.train_set
    both = Detection(replace(verb.config, augment=replace(verb.config.augment, jitter=False)))
    both._train = verb.train_set
    for index in range(4):
        sample = Sample(0, index, 0)
        moved, plain = verb._boxes(sample), still._boxes(sample)
        assert (len(moved), len(plain)) == (2, 1)
        # the first, as its labels are
        assert np.array_equal(plain, both._boxes(sample)[:1])
        assert not np.allclose(moved[0], plain[0])
        # at most a fifth of its width, or a pixel; both within the crop
        assert np.abs(moved[0] - plain[0]).max() <= max(0.2 * 40, 1)
        assert moved.min() >= 0
        assert moved.max() <= 31
        assert np.array_equal(moved, verb._boxes(sample))
        assert not np.array_equal(moved, verb._boxes(Sample(1, index, 0)))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["ava-base"], "needs --data"),
        (["demo", "--evaluate", "--weights", "no/such"], "no/such"),
        (["demo", "--boxes", ""], "boxes must not be empty"),
        (["demo", "--model.image-size", "64"], "do not fit"),
    ],
)
def test_refuses_in_one_line(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert says in error[-1]


def test_refuses_what_is_no_detector_and_other_classes(scenes, opinionated, tmp_path, capsys):
    tiny_classifier(tmp_path / "classifier.safetensors")
    common = ["demo", "--evaluate", "--data", str(scenes)]
    with pytest.raises(SystemExit):
        main([*common, "--weights", str(tmp_path / "classifier.safetensors")])
    assert "no detector" in capsys.readouterr().err
    rows = (scenes / "test.csv").read_text().replace("clockwise", "flies")
    (tmp_path / "val.csv").write_text(rows.replace("test/", f"{scenes}/test/"))
    with pytest.raises(SystemExit):
        main([*common[:2], "--data", str(tmp_path / "val.csv"), "--weights", str(opinionated)])
    assert "flies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("second,x1,y1,x2\n1,0,0,1\n", "must name the columns"),
        ("second,x1,y1,x2,y2\n", "no boxes"),
        ("second,x1,y1,x2,y2\n0.5,0,0,90,50\n", "fractions of the frame"),
        ("second,x1,y1,x2,y2\n0.5,0.5,0,0.5,1\n", "empty"),
        ("second,x1,y1,x2,y2\n0.5,0.5,0,nan,1\n", "x2 must be a number"),
        ("second,x1,y1,x2,y2\n77,0,0,1,1\n", "no second 77"),
        ("path,second,x1,y1,x2,y2\nother.mp4,0.5,0,0,1,1\n", "has no boxes"),
    ],
)
def test_a_prediction_refuses_boxes_that_cannot_be(scenes, opinionated, text, says, tmp_path, capsys):
    (tmp_path / "boxes.csv").write_text(text)
    flags = ["--detector", str(opinionated), "--boxes", str(tmp_path / "boxes.csv"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        predict([str(scenes / "test" / "test_00000.mp4"), *flags])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_learns_a_few_scenes_by_heart(scenes, tmp_path):
    flags = "--model.size vit_mini --model.image-size 40 --clip.short-side 40 --steps 120 --batch-size 10 --workers 0"
    rows = (scenes / "train.csv").read_text().replace("train/", f"{scenes}/train/")
    (tmp_path / "val.csv").write_text(rows)
    flags += f" --optim.base-lr 0.05 --data.val {tmp_path}/val.csv --data {scenes} --log.tensorboard false"
    assert main(["demo", *flags.split(), "--validate-every", "60", "--out", str(tmp_path / "run")]) == 0
    assert evaluations(tmp_path / "run")[-1]["val_map"] > 90
