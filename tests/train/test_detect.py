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
from train.cli import parse
from train.detect import Detection, main
from train.detect_evaluation import clip_of, flags_of_test
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
from videomae.weights import main as weights_command
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
    verb = verb_of(scenes)
    verb.find_videos()
    save_weights(verb.build(), path)
    return path


def verb_of(path, **flags):
    """Its run would be of a tiny model on that data; data.val and the like as they are called."""
    config = DETECT["demo"]()
    model = replace(config.model, size="vit_tiny", frames=4, image_size=32)
    return Detection(replace(config, model=model, clip=CLIP, data=replace(config.data, path=str(path), **flags)))


def list_of(scenes, split, path):
    """The list of a split and the classes' names, wherever these lie."""
    shutil.copy(scenes / "classes.txt", path.parent)
    path.write_text((scenes / f"{split}.csv").read_text().replace(f"{split}/", f"{scenes}/{split}/"))
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
    made = verb_of(scenes)
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


def test_one_list_is_not_its_own_validation_set(scenes, tmp_path, capsys):
    own, other = list_of(scenes, "train", tmp_path / "own.csv"), list_of(scenes, "test", tmp_path / "other.csv")
    alone, both = verb_of(own), verb_of(own, val=str(other))
    for made in (alone, both):
        made.find_videos()
    assert (alone._val, len(both._val)) == (None, 5)
    assert capsys.readouterr().err.count("note: no validation, which --data.val may give: ") == 1
    assert (alone.to_test(), both.to_test()) == (["--data", "TEST"], ["--data", str(other)])
    with pytest.raises(ValueError, match="is one list, which is trained on"):
        verb_of(own, val=str(own)).find_videos()


def test_a_validation_set_is_absent_or_right(scenes, tmp_path, capsys):
    list_of(scenes, "train", tmp_path / "train.csv")
    made = verb_of(tmp_path)
    made.find_videos()
    assert made._val is None
    assert "no boxes of val" in capsys.readouterr().err
    (tmp_path / "val.csv").write_text("path;second;x1\n")
    with pytest.raises(ValueError, match=r"val\.csv"):
        verb_of(tmp_path).find_videos()
    with pytest.raises(ValueError, match=r"nope\.csv"):
        verb_of(scenes, boxes=str(tmp_path / "nope.csv")).find_videos()


def test_boxes_over_the_most_are_noted(scenes, capsys):
    made = verb_of(scenes)
    made.find_videos()
    assert "left out" not in capsys.readouterr().err
    made = Detection(replace(made.config, augment=replace(made.config.augment, max_boxes=1)))
    made.find_videos()
    assert "note: 10 boxes are left out: --augment.max-boxes 1" in capsys.readouterr().err


def test_the_command_that_a_run_ends_with_tests_the_same(scenes):
    config = verb_of(scenes, starts_at=0.25, allow_missing=True, boxes="b.csv", cache_gb=1.0).config
    flags = flags_of_test(replace(config, iou=0.4, seed=3))
    wanted = "--data.boxes b.csv --data.starts-at 0.25 --data.allow-missing true --iou 0.4"
    assert flags == wanted.split()
    again = parse(["demo", *flags], DETECT, "demo", prog="p", about="")
    assert (again.iou, again.data) == (0.4, replace(config.data, path=None, cache_gb=again.data.cache_gb))


def test_a_test_counts_what_is_missing(scenes, opinionated, tmp_path, capsys):
    copied = tmp_path / "set"
    shutil.copytree(scenes, copied)
    (copied / "test" / "test_00002.mp4").unlink()
    flags = ["demo", "--evaluate", "--weights", str(opinionated), "--data", str(copied), "--workers", "0"]
    assert main([*flags, "--pictures", "0", "--out", str(tmp_path / "out"), "--data.allow-missing"]) == 0
    assert "boxes of 1 annotated key frames count as missed" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "result.json").read_text())["protocol"]["missing"] == 1


def test_says_that_weights_do_not_say_their_clip(opinionated, tmp_path, capsys):
    assert weights_command([str(opinionated), str(tmp_path / "w.pth"), "--to", "official"]) == 0
    stated, unstated = model_from(opinionated)[0], model_from(tmp_path / "w.pth")[0]
    capsys.readouterr()
    usual = KeyFrameClip()
    assert (clip_of(stated, usual, usual), capsys.readouterr().err) == (CLIP, "")
    assert clip_of(unstated, CLIP, usual) == CLIP
    assert "note: the weights do not say how clips were taken in training: as 16 frames" in capsys.readouterr().err


def test_the_weights_command_takes_a_run(done, capsys):
    assert weights_command([str(done)]) == 0
    assert "step_6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["ava-base"], "needs --data"),
        (["demo", "--evaluate", "--steps", "3", "--model.frames", "4"], "leave out --steps, --model.frames"),
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


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(scenes, opinionated, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "boxes.csv").write_text("second,x1,y1,x2,y2\n0.1,0,0,1,1\n")
    out, video = str(tmp_path / "file" / "out"), str(scenes / "test" / "test_00000.mp4")
    with pytest.raises(SystemExit):
        main(["demo", "--evaluate", "--weights", str(opinionated), "--data", str(scenes), "--out", out])
    assert f"cannot write in --out {out}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict([video, "--detector", str(opinionated), "--boxes", str(tmp_path / "boxes.csv"), "--out", out])
    assert f"cannot write in --out {out}" in capsys.readouterr().err


def test_predictions_read_what_they_can_and_count_the_rest(scenes, opinionated, tmp_path, capsys):
    shutil.copy(scenes / "test" / "test_00000.mp4", tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    rows = ["", " Second ,y1,x1,x2,Y2,path,colour"]
    # two moments that look the same
    rows += [f"{second},0,0.25,0.75,1,{name}.mp4,red" for second in ("0.10000001", "0.1") for name in "abc"]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    flags = ["--detector", str(opinionated), "--boxes", str(tmp_path / "boxes.csv"), "--out", str(tmp_path / "out")]
    assert predict([str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), *flags, "--json"]) == 1
    printed = capsys.readouterr()
    said = [json.loads(line) for line in printed.out.splitlines()]
    assert [one["second"] for one in said] == [0.1, 0.10000001]
    assert [one["boxes"][0]["box"] for one in said] == [[0.25, 0, 0.75, 1]] * 2
    assert len({one["picture"] for one in said}) == len(list((tmp_path / "out").glob("*.png"))) == 2
    scores = [score for one in said for _, score in one["boxes"][0]["top"]]
    assert scores == [round(score, 6) for score in scores]
    for note in ("b.mp4: ", "not read: colour", "2 of 6 boxes are of videos that were not given"):
        assert note in printed.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--top", "0"], "--top must be at least 1"),
        (["--views", "2x3"], "leave out --views"),
        (["--boxes", "/nope.csv"], "cannot read --boxes /nope.csv: No such file"),
        (["--boxes", "/"], "cannot read --boxes /: Is a directory"),
    ],
)
def test_predictions_of_boxes_refuse_wrong_use(scenes, opinionated, flags, says, capsys):
    with pytest.raises(SystemExit) as end:
        predict([str(scenes / "test" / "test_00000.mp4"), "--detector", str(opinionated), *flags])
    assert end.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("second,x1,y1,x2\n1,0,0,1\n", "must name the columns"),
        ("second,x1,y1,x2,y2\n", "no boxes"),
        ("second,x1,y1,x2,y2\n0.5,0,0,90,50\n", "fractions of the frame"),
        ("second,x1,y1,x2,y2\n0.5,0.5,0,0.5,1\n", "empty"),
        ("second,x1,y1,x2,y2\n0.5,0.5,0,nan,1\n", "x2 must be a number"),
        ("second,x1,y1,x2,y2\n0.5,1,0,1.0005,1\n", "empty"),
        ("second,x1,y1,x2,y2\n0.5,0,0,1\n", "boxes.csv:2 should have 5 columns"),
        ("second,x1,y1,x2,y2,score\n0.5,0,0,1,1,95\n", "boxes.csv:2: score must be in [0, 1]"),
        ("\nsecond,x1,y1,x2,y2\n0,0,0,1,1\n77,0,0,1,1\n", "boxes.csv:4: "),
        ("second,x1,y1,x2,y2\n77,0,0,1,1\n", "no second 77; it has 0 to "),
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
