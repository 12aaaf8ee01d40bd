"""Fine-tuning and testing by the commands on real videos: what is learned from the first part of each is known in the
rest."""

import json
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import pytest

from train import evaluate
from train.finetune import main as finetune
from videomae.metrics import average_views

pytestmark = pytest.mark.long

SHARE = Fraction(3, 5)  # of a video's frames that are trained on
MODEL = "--model.size vit_mini --model.frames 16 --model.image-size 112 --model.cube 2 16 16"
TRAINING = "--batch-size 7 --data.views-per-decode 4 --steps 80 --optim.base-lr 0.08 --augment.area 0.7 1.0"
TRAINING += " --smoothing 0 --validate-every 0"  # the test videos would be validated on
# the second is the first at 6 frames a second, with boxes drawn
ONE_SCENE = {"arm_wrestling", "ava_like"}
CLASSES, VIEWS = 7, 15


def cut(source, before, after):
    """Encode the first frames of a video into one file and all others into another; how many each has."""
    with av.open(str(source)) as container:
        total = sum(1 for _ in container.decode(video=0))
    counts = [int(SHARE * total), total - int(SHARE * total)]
    with av.open(str(source)) as container, ExitStack() as opened:
        outputs = [opened.enter_context(av.open(str(path), "w")) for path in (before, after)]
        streams = [_stream(output, container.streams.video[0]) for output in outputs]
        for number, frame in enumerate(container.decode(video=0)):
            part = int(number >= counts[0])
            image = frame.reformat(format="yuv420p")
            image.pts, image.time_base, image.pict_type = number - part * counts[0], Fraction(1, 25), 0
            outputs[part].mux(streams[part].encode(image))
        for output, stream in zip(outputs, streams, strict=True):
            output.mux(stream.encode())
    return counts


def _stream(output, like):
    stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "12", "threads": "1"})
    stream.width, stream.height, stream.pix_fmt = like.width, like.height, "yuv420p"
    stream.gop_size = 8  # a clip is decoded from the key frame before it
    stream.gop_size = 8  # a clip is decoded from the key frame before it
    return stream


@pytest.fixture
def parts(clips, tmp_path):
    """A class for each video: train/CLASS/before.mp4 and test/CLASS/after.mp4, which share no frame."""
    for source in sorted(clips.iterdir()):
        before, after = (tmp_path / "parts" / split / source.stem for split in ("train", "test"))
        before.mkdir(parents=True)
        after.mkdir(parents=True)
        counts = cut(source, before / "before.mp4", after / "after.mp4")
        assert min(counts) > 16
    return tmp_path / "parts"


def mislabelled(parts, labels):
    """The same test videos, of which number i is said to be of class labels[i]."""
    folder = parts.parent / "mislabelled"
    (folder / "test").mkdir(parents=True)
    names = sorted(path.name for path in (parts / "test").iterdir())
    for name, label in zip(names, labels, strict=True):
        (folder / "test" / names[label]).symlink_to(parts / "test" / name)
    return folder


def result_of(data, weights, out):
    flags = ["--data", str(data), "--weights", str(weights), "--out", str(out), "--views", "5x3", "--workers", "0"]
    assert evaluate.main([*flags, "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == CLASSES
    return json.loads((out / "result.json").read_text()), [row for row in rows if row["predicted"] != row["label"]]


def test_what_is_learned_from_a_videos_first_part_is_known_in_the_rest(parts, tmp_path, monkeypatch):
    counted = []

    def averaged(logits, how):
        counted.extend([logits.shape[1]] * len(logits))
        return average_views(logits, how)

    monkeypatch.setattr(evaluate, "average_views", averaged)
    tuned = tmp_path / "tuned"
    flags = f"demo {MODEL} {TRAINING} --workers 0 --device cpu --log.every 10 --log.tensorboard false".split()
    assert finetune([*flags, "--data", str(parts), "--out", str(tuned)]) == 0
    result, wrong = result_of(parts, tuned, tmp_path / "tested")
    assert result["protocol"]["views"] == "5x3"
    assert counted == [VIEWS] * CLASSES
    # six with this seed, seven with another: of one scene the two are told apart by a little, if at all
    assert len(wrong) <= 1
    assert {Path(row["path"]).parent.name for row in wrong} <= ONE_SCENE
    assert result["top1"] == pytest.approx(100 * (CLASSES - len(wrong)) / CLASSES, abs=1e-3)

    # other labels, of which none is by chance the predicted one, even within the scene
    labels = [(label + 3) % CLASSES for label in range(CLASSES)]
    assert result_of(mislabelled(parts, labels), tuned, tmp_path / "mistested")[0]["top1"] == 0
