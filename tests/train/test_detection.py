"""What a test makes of detected boxes, by the words of RECIPES H.2 to H.6: frames read, cut and resized by hand."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from tests.videomae.data.test_key_frame_reader import write
from train.detection import Detections, inference_of, score_boxes
from train.inference import Reading
from videomae.data.decode import Video
from videomae.data.key_frame_reader import KeyFrameReader
from videomae.data.key_frames import KeyFrames, find_key_frames
from videomae.data.sampling import KeyFrameClip
from videomae.detector import Detector, detector

SHORT, CLIP = 24, KeyFrameClip(stride=1, rate=None, short_side=24)
SIZES = {"upright": (64, 36), "wide": (40, 60)}
# of 30 frames, at second 1: frames 25 - 2 to 25 + 1
NUMBERS = [23, 24, 25, 26]
# corner, sides and score, in pixels of the movie; the first of `wide` is its annotated person
FOUND = {"wide": [((15, 10, 30, 20), 0.9), ((0, 0, 60, 40), 0.8)], "upright": [((20, 30, 16, 34), 0.95)]}


class Done(NamedTuple):
    model: Detector
    key_frames: KeyFrames
    found: Detections


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ava")
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        coarse = rng.integers(0, 256, (30, height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        frames = coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width]
        write(folder / "videos" / f"{name}.mkv", frames, codec="ffv1")
    rows = ["wide,0001,0.25,0.25,0.75,0.75,1,0", "wide,0001,0.25,0.25,0.75,0.75,2,0", "wide,0000,0,0,1,1,1,0"]
    (folder / "ava_val_v2.2.csv").write_text("\n".join([*rows, "upright,0001,0,0,0.1,0.1,3,0"]))
    (folder / "ava_val_excluded_timestamps_v2.2.csv").write_text("wide,0000")
    (folder / "ava_file_names_trainval_v2.1.txt").write_text("\n".join(f"{name}.mkv" for name in SIZES))
    boxes = [
        {"image_id": 10_000 * list(SIZES).index(name) + 1, "bbox": box, "score": score}
        for name, people in FOUND.items()
        for box, score in people
    ]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    key_frames = find_key_frames(folder, "val", boxes=folder / "boxes.json")
    torch.manual_seed(0)
    model = detector("vit_tiny", num_classes=80, frames=4, image_size=24, cube=(2, 8, 8), init_scale=30)
    inference = inference_of(model, key_frames, SHORT, device="cpu", precision="float32")
    found = Detections(key_frames)
    reader = KeyFrameReader.for_test(key_frames, CLIP, 4)
    for scored, skips in score_boxes(inference, key_frames, reader, reading=Reading(0), say=print):
        assert not skips
        found.add(scored)
    return Done(model, key_frames, found)


def seen(name, box):
    """A box as a test looks at it (H.3, H.4): inclusive, resized, and wider by a tenth and higher by a twentieth."""
    height, width = SIZES[name]
    down, across = (side * SHORT // min(height, width) for side in (height, width))
    x, y, w, h = box
    x1, x2 = (side * across / width for side in (x, x + w - 1))
    y1, y2 = (side * down / height for side in (y, y + h - 1))
    more, taller = 0.05 * (x2 - x1 + 1), 0.025 * (y2 - y1 + 1)
    return max(x1 - more, 0), max(y1 - taller, 0), min(x2 + more, across - 1), min(y2 + taller, down - 1)


def scores_of(done, name):
    """[boxes, 80]."""
    height, width = SIZES[name]
    path = done.key_frames.videos.paths[done.key_frames.names.index(name)]
    size = (height * SHORT // min(height, width), width * SHORT // min(height, width))
    planes = torch.from_numpy(Video(path).read(NUMBERS)).permute(0, 3, 1, 2)
    frames = interpolate(planes, size=size, mode="bilinear").permute(0, 2, 3, 1)
    boxes = torch.tensor([seen(name, box) for box, _ in FOUND[name]])
    with torch.inference_mode():
        logits = done.model(frames[None], boxes[None])[0]
    return logits.sigmoid().numpy() * np.array([[score] for _, score in FOUND[name]])


def test_a_score_is_the_models_times_the_detectors(done):
    assert sorted(done.key_frames.names) == sorted(SIZES)
    for index, name in enumerate(done.key_frames.names):
        wanted = scores_of(done, name)
        assert wanted.std() > 0.05
        np.testing.assert_allclose(done.found.scores_of(index), wanted, rtol=1e-5)


def test_rows_have_the_boxes_as_they_were_found(done):
    rows = done.found.rows()
    wanted = [
        (name, 1.0, label, np.array((x, y, x + w, y + h)) / (*SIZES[name][::-1], *SIZES[name][::-1]))
        for name in done.key_frames.names
        for (x, y, w, h), _ in FOUND[name]
        for label in range(1, 81)
    ]
    assert [(rows.names[v], s, n) for v, s, n in zip(rows.video, rows.second, rows.label, strict=True)] == [
        one[:3] for one in wanted
    ]
    np.testing.assert_allclose(rows.box, [box for *_, box in wanted], atol=1e-7)
    np.testing.assert_allclose(
        rows.score, np.concatenate([scores_of(done, name).ravel() for name in done.key_frames.names]), rtol=1e-5
    )


def test_classes_count_that_ava_lists_and_moments_that_it_does_not_exclude(done):
    ones = [score for name in SIZES for score in scores_of(done, name)[:, 0]]
    rank = sorted(ones, reverse=True).index(scores_of(done, "wide")[0, 0]) + 1
    # class 1 has one box, the annotated one, class 3 one that nobody found; class 2 is not among the sixty
    official = done.found.measure(iou=0.5, protocol="official")
    assert official["per_class"] == pytest.approx({1: 1 / rank, 3: 0})
    assert official["per_group"] == {"person_movement": official["mAP"]}
    # that of the excluded moment is still missed
    other = done.found.measure(iou=0.5, protocol="mmaction2")
    assert other["per_class"] == pytest.approx({1: 1 / rank / 2, 3: 0})
    # the box and its annotation are the same but for rounding
    assert done.found.measure(iou=0.999, protocol="official") == official
