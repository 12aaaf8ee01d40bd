"""Fine-tuning and testing by the commands on real videos: what is learned from the first part of each is known in the
rest."""

import json
from contextlib import ExitStack
from fractions import Fraction

import av
import pytest

from train.evaluate import main as evaluate
from train.finetune import main as finetune

pytestmark = pytest.mark.long

SHARE = Fraction(3, 5)  # of a video's frames that are trained on
MODEL = "--model.size vit_tiny --model.frames 16 --model.image-size 112 --model.cube 2 16 16"
TRAINING = "--batch-size 7 --data.views-per-decode 4 --steps 60 --optim.base-lr 0.08 --validate-every 0"
CLASSES = 7


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
    folder = parts.parent / f"mislabelled-{''.join(map(str, labels))}"
    names = sorted(path.name for path in (parts / "test").iterdir())
    for name, label in zip(names, labels, strict=True):
        (folder / "test").mkdir(parents=True, exist_ok=True)
        (folder / "test" / names[label]).symlink_to(parts / "test" / name)
    return folder


def result_of(data, weights, out):
    flags = ["--data", str(data), "--weights", str(weights), "--out", str(out), "--views", "5x3", "--workers", "0"]
    assert evaluate([*flags, "--device", "cpu"]) == 0
    return json.loads((out / "result.json").read_text())


def test_what_is_learned_from_a_videos_first_part_is_known_in_the_rest(parts, tmp_path):
    tuned = tmp_path / "tuned"
    flags = ["demo", *MODEL.split(), *TRAINING.split(), "--data", str(parts), "--out", str(tuned), "--workers", "0", "--device", "cpu"]
    assert finetune([*flags, "--log.every", "10", "--log.tensorboard", "false"]) == 0
    result = result_of(parts, tuned, tmp_path / "tested")
    assert result["videos"] == CLASSES
    assert result["protocol"]["views"] == "5x3"
    assert result["top1"] == 100

    # and it is the labels that this depends on
    shifted = [(label + 1) % CLASSES for label in range(CLASSES)]
    assert result_of(mislabelled(parts, shifted), tuned, tmp_path / "shifted")["top1"] == 0
