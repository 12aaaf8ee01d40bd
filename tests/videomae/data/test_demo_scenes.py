import csv
import json
import zlib
from collections import Counter
from itertools import combinations
from pathlib import Path

import decord
import numpy as np
import pytest

from videomae.data import demo
from videomae.data.dataset import find_videos
from videomae.data.demo import MOTIONS
from videomae.data.demo_scenes import draw_motions, key_boxes, make_scenes, render_scene
from videomae.data.sampling import KeyFrameClip
from videomae.keys import key

SEEDS = range(40)
SMALL = {"train": 3, "test": 2, "frames": 9}


def _seen(video: np.ndarray) -> np.ndarray:
    """Where something is, bool [..., H, W]: every pixel that is not of the commonest colour."""
    numbers = video.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    colours, counts = np.unique(numbers, return_counts=True)
    return numbers != colours[counts.argmax()]


def _pixels(box: np.ndarray, size: int) -> tuple[slice, slice]:
    """The rows and columns that a box of fractions reaches over; its sides must lie between pixels."""
    sides = box * size
    assert np.allclose(sides, sides.round(), atol=1e-3)
    x1, y1, x2, y2 = sides.round().astype(int)
    return slice(y1, y2), slice(x1, x2)


@pytest.mark.parametrize(("objects", "size"), [(1, 40), (2, 56), (3, 56), (3, 97)])
def test_its_boxes_hold_all_that_is_not_background_and_touch_it_on_every_side(objects, size):
    for seed in SEEDS:
        frame = render_scene(seed, [0] * objects, frames=1, size=size)[0]
        seen = _seen(frame)
        boxes = key_boxes(seed, objects, size=size)
        assert boxes.shape == (objects, 4)
        assert ((boxes >= 0) & (boxes <= 1)).all()
        covered = np.zeros_like(seen)
        for box in boxes:
            rows, columns = _pixels(box, size)
            covered[rows, columns] = True
            inside = seen[rows, columns]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        assert not (seen & ~covered).any(), seed


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_its_objects_are_of_a_like_size_and_hardly_share_a_box():
    for seed in SEEDS:
        boxes = key_boxes(seed, 3, size=56)
        sides = (boxes[:, 2:] - boxes[:, :2]) * 56
        assert ((sides >= 20) & (sides <= 28)).all(), sides
        assert (np.abs(sides[:, 0] - sides[:, 1]) <= 2).all()
        assert max(_overlap(a, b) for a, b in combinations(boxes, 2)) < 0.1, seed


def test_its_key_frame_does_not_tell_the_motions():
    for seed in range(6):
        middle = render_scene(seed, [0, 0], frames=9, size=56)[4]
        for motion in range(len(MOTIONS)):
            for motions in ([motion, 5], [7, motion]):
                assert np.array_equal(render_scene(seed, motions, frames=9, size=56)[4], middle)


def test_its_objects_move_as_the_demos_do_each_for_itself():
    # the difference of two scenes that differ in one motion lies where that object can be
    for seed in SEEDS:
        still = render_scene(seed, [8, 8], frames=3, size=56)
        moved = render_scene(seed, [8, 0], frames=3, size=56)
        rows, columns = _pixels(key_boxes(seed, 2, size=56)[1], 56)
        changed = (still != moved).any(axis=-1)
        assert not changed[1].any()
        assert changed[0].any()
        away = changed.copy()
        away[:, max(rows.start - 3, 0) : rows.stop + 3, max(columns.start - 3, 0) : columns.stop + 3] = False
        assert not away.any(), seed


@pytest.mark.parametrize(("motion", "x", "y"), [(0, 1, 0), (1, -1, 0), (2, 0, 1), (3, 0, -1), (5, -1, 1)])
def test_its_objects_go_where_their_motion_says(motion, x, y):
    for seed in range(8):
        video = render_scene(seed, [motion], frames=3, size=56)
        seen = _seen(video)
        rows, columns = np.indices(seen.shape[1:])
        centres = [(columns[frame].mean(), rows[frame].mean()) for frame in seen]
        # a pixel at least, from the frame before the key frame to the one after it; less where the edge hides some
        step = np.subtract(centres[2], centres[0])
        for moved, sign in zip(step, (x, y), strict=True):
            assert moved * sign > 0.5 if sign else abs(moved) < 0.7, (seed, step)


def test_its_centres_stay_inside_in_a_clip_of_eight_frames():
    offsets = KeyFrameClip(stride=1, rate=None).offsets(8, 8, 8)
    assert offsets == [-4, -3, -2, -1, 0, 1, 2, 3]
    for seed in range(16):
        for motion in range(8):  # those that go anywhere
            clip = render_scene(seed, [motion], frames=16, size=56)[4:12]
            seen = _seen(clip).sum(axis=(1, 2))
            # of a disc whose centre is inside at least a quarter is
            assert seen.min() > 0.25 * seen[4], (seed, motion)


def test_its_motions_are_even_and_independent_of_one_another():
    pairs = [tuple(draw_motions(key(0, 0, index), 2)) for index in range(6000)]
    counts = Counter(pairs)
    expected = len(pairs) / len(MOTIONS) ** 2
    chi = sum((counts[a, b] - expected) ** 2 / expected for a in range(12) for b in range(12))
    # 143 degrees of freedom: mean 143, deviation 17
    assert chi < 143 + 4 * 17


def test_it_draws_the_pixels_it_has_always_drawn():
    # guards the hash, the order of the draws and the arithmetic: if this changes on purpose, raise the format number
    video = render_scene(2026, [5, 8], frames=16, size=56)
    assert video.dtype == np.uint8
    assert video.shape == (16, 56, 56, 3)
    assert zlib.crc32(video.tobytes()) == 1120113189
    assert np.array_equal(video, render_scene(2026, [5, 8], frames=16, size=56))
    assert not np.array_equal(video, render_scene(2027, [5, 8], frames=16, size=56))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"motions": [0, 12]}, "motions must be in"),
        ({"motions": [-1]}, "motions must be in"),
        ({"motions": []}, "objects must be 1 to 3"),
        ({"motions": [0] * 4}, "objects must be 1 to 3; got 4"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"size": 39}, "size must be at least 40"),
    ],
)
def test_it_refuses_what_it_cannot_draw(change, message):
    arguments = {"motions": [0, 1], "frames": 8, "size": 56, **change}
    with pytest.raises(ValueError, match=message):
        render_scene(0, arguments.pop("motions"), **arguments)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_its_files_decode_to_the_pixels_drawn_and_its_lists_name_every_object(tmp_path):
    train = make_scenes(tmp_path / "scenes", **SMALL, seed=3)
    assert train == tmp_path / "scenes" / "train.csv"
    assert (train.parent / "classes.txt").read_text().splitlines() == list(MOTIONS)
    drawn = set()
    for which, split in enumerate(("train", "test")):
        assert (train.parent / f"{split}.csv").read_text().startswith("path,second,x1,y1,x2,y2,label\n")
        rows = _rows(train.with_name(f"{split}.csv"))
        assert len(rows) == 2 * SMALL[split]
        for index in range(SMALL[split]):
            first, second = rows[2 * index : 2 * index + 2]
            assert first["path"] == second["path"]
            scene, motions = key(3, which, index), [MOTIONS.index(row["label"]) for row in (first, second)]
            video = decord.VideoReader(str(train.parent / first["path"]), num_threads=1)
            assert float(first["second"]) * video.get_avg_fps() == 4
            pixels = video.get_batch(range(len(video))).asnumpy()
            assert np.array_equal(pixels, render_scene(scene, motions, frames=9, size=56))
            boxes = [[float(row[side]) for side in ("x1", "y1", "x2", "y2")] for row in (first, second)]
            assert np.allclose(boxes, key_boxes(scene, 2, size=56), atol=1e-6)
            # unseen: no picture of a test is one of training's
            drawn.add(pixels[4].tobytes())
    assert len(drawn) == SMALL["train"] + SMALL["test"]


def test_its_training_folder_is_what_pretraining_is_given(tmp_path):
    train = make_scenes(tmp_path / "scenes", **SMALL)
    names = [Path(path).name for path in find_videos(train.parent / "train").paths]
    assert names == ["train_00000.mp4", "train_00001.mp4", "train_00002.mp4"]


def test_it_reuses_a_complete_folder_and_remakes_a_damaged_or_different_one(tmp_path):
    folder, calls = tmp_path / "scenes", []
    small = {**SMALL, "train": 2, "test": 1}

    def count(done: int, total: int) -> None:
        calls.append((done, total))

    make_scenes(folder, **small, progress=count)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    make_scenes(folder, **small, progress=count)
    assert len(calls) == 3
    (folder / "train" / "train_00001.mp4").unlink()
    make_scenes(folder, **small, progress=count)
    assert len(calls) == 6
    make_scenes(folder, **small, objects=3, progress=count)
    assert len(calls) == 9
    assert json.loads((folder / "scenes.json").read_text())["objects"] == 3


def test_a_stopped_call_leaves_no_folder(tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "scenes", **SMALL, progress=stop)
    assert not (tmp_path / "scenes").exists()


def test_neither_it_nor_the_demo_replaces_what_the_other_made(tmp_path):
    make_scenes(tmp_path / "scenes", train=1, test=0, frames=1)
    with pytest.raises(ValueError, match=r"scenes\.json"):
        demo.make_demo(tmp_path / "scenes", train=1, test=0)
    demo.make_demo(tmp_path / "demo", train=1, test=0, frames=1)
    with pytest.raises(ValueError, match=r"demo\.json"):
        make_scenes(tmp_path / "demo", train=1, test=0)
