import json
import zlib
from pathlib import Path

import decord
import numpy as np
import pytest

from videomae.data.demo import MOTIONS, make_demo, render
from videomae.keys import key

SEEDS = range(12)
SMALL = {"train": 13, "test": 12, "frames": 9, "size": 40}


def _inside(video: np.ndarray) -> np.ndarray:
    """Where the object is, bool [T, H, W]: every pixel that differs from the plain background, seen at the edge."""
    edges = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1).reshape(-1, 3)
    colours, counts = np.unique(edges, axis=0, return_counts=True)
    return (video != colours[counts.argmax()]).any(axis=-1)


def _centre(inside: np.ndarray) -> np.ndarray:
    """Centre of mass of each frame, float64 [T, 2] as (x, y), in pixels."""
    y, x = np.indices(inside.shape[1:])
    area = inside.sum(axis=(1, 2))
    return np.stack([(inside * x).sum(axis=(1, 2)) / area, (inside * y).sum(axis=(1, 2)) / area], axis=1)


def _motion(name: str, seed: int, *, frames: int = 8, size: int = 64) -> np.ndarray:
    return render(seed, MOTIONS.index(name), frames=frames, size=size)


@pytest.mark.parametrize("motion", range(len(MOTIONS)), ids=MOTIONS)
def test_it_draws_the_same_pixels_for_the_same_seed_and_others_for_another(motion):
    video = render(5, motion, frames=9, size=40)
    assert video.dtype == np.uint8
    assert video.shape == (9, 40, 40, 3)
    assert np.array_equal(video, render(5, motion, frames=9, size=40))
    assert not np.array_equal(video, render(6, motion, frames=9, size=40))
    assert not np.array_equal(video, render(5 + 2**32, motion, frames=9, size=40))


def test_it_draws_the_pixels_it_has_always_drawn():
    # guards both the hash and the arithmetic: if this changes on purpose, raise the format number
    video = render(2026, MOTIONS.index("down-left"), frames=12, size=40)
    clockwise = render(7, MOTIONS.index("clockwise"), frames=12, size=40)
    assert (zlib.crc32(video.tobytes()), zlib.crc32(clockwise.tobytes())) == (1474753539, 2287564003)


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("right", 1, 0),
        ("left", -1, 0),
        ("down", 0, 1),
        ("up", 0, -1),
        ("down-right", 1, 1),
        ("down-left", -1, 1),
        ("up-right", 1, -1),
        ("up-left", -1, -1),
    ],
)
def test_it_moves_as_named_in_every_step(name, x, y):
    for seed in SEEDS:
        # three frames, so that the picture's edge cuts off little of the disc
        steps = np.diff(_centre(_inside(_motion(name, seed, frames=3))), axis=0)
        for axis, sign in enumerate((x, y)):
            if sign:
                assert (steps[:, axis] * sign > 0.5).all(), (seed, steps)
            else:
                assert (np.abs(steps[:, axis]) < 0.5).all(), (seed, steps)


def _half_angle(video: np.ndarray) -> np.ndarray:
    """Direction from the centre of the object to the centre of its second half, radians per frame."""
    inside = _inside(video)
    colours, counts = np.unique(video[inside], axis=0, return_counts=True)
    first, second = colours[np.argsort(counts)[-2:]]
    away = _centre((video == second).all(-1)) - _centre((video == first).all(-1))
    return np.unwrap(np.arctan2(away[:, 1], away[:, 0]))


@pytest.mark.parametrize(("name", "sign"), [("clockwise", 1), ("counterclockwise", -1)])
def test_it_turns_as_named_on_the_spot(name, sign):
    # y points down, so a growing angle is clockwise to the eye
    for seed in SEEDS:
        video = _motion(name, seed)
        inside = _inside(video)
        assert (inside == inside[0]).mean() > 0.97
        turn = np.diff(_half_angle(video)) * sign
        assert ((turn > 0.1) & (turn < 0.5)).all(), (seed, turn)


@pytest.mark.parametrize(("name", "sign"), [("approach", 1), ("retreat", -1)])
def test_it_grows_or_shrinks_as_named(name, sign):
    for seed in SEEDS:
        area = _inside(_motion(name, seed)).sum(axis=(1, 2))
        assert (np.diff(area) * sign > 0).all(), (seed, area)


def test_its_middle_frame_does_not_tell_the_motion():
    for seed in SEEDS:
        middle = [render(seed, motion, frames=11, size=40)[5] for motion in range(len(MOTIONS))]
        assert all(np.array_equal(frame, middle[0]) for frame in middle)


def test_any_two_of_its_colours_differ_in_every_channel():
    for seed in SEEDS:
        video = render(seed, 0, frames=1, size=96)
        colours, counts = np.unique(video.reshape(-1, 3), axis=0, return_counts=True)
        main = colours[np.argsort(counts)[-3:]].astype(int)
        gaps = [np.abs(main[a] - main[b]).min() for a, b in ((0, 1), (0, 2), (1, 2))]
        assert min(gaps) >= 35, (seed, main)


def test_the_object_stays_in_the_picture_for_the_whole_default_video():
    for seed in SEEDS:
        for motion in range(len(MOTIONS)):
            share = _inside(render(seed, motion, frames=12, size=40)).mean(axis=(1, 2))
            assert ((share > 0.015) & (share < 0.75)).all(), (seed, MOTIONS[motion], share)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"motion": len(MOTIONS)}, "motion must be in"),
        ({"motion": -1}, "motion"),
        ({"frames": 0}, "frames"),
        ({"size": 4}, "size"),
    ],
)
def test_it_refuses_what_it_cannot_draw(change, message):
    arguments = {"motion": 0, "frames": 8, "size": 40, **change}
    with pytest.raises(ValueError, match=message):
        render(0, arguments.pop("motion"), **arguments)


def _rows(path: Path) -> list[tuple[str, int]]:
    return [(name, int(label)) for name, label in (line.split(" ") for line in path.read_text().splitlines())]


def test_its_files_decode_to_the_pixels_drawn_and_its_lists_parse(tmp_path):
    train = make_demo(tmp_path / "demo", **SMALL, seed=3)
    assert train == tmp_path / "demo" / "train.csv"
    drawn = set()
    for which, split in enumerate(("train", "test")):
        rows = _rows(train.with_name(f"{split}.csv"))
        assert [label for _, label in rows] == [i % len(MOTIONS) for i in range(SMALL[split])]
        for index, (name, label) in enumerate(rows):
            path = train.parent / name
            assert path.stat().st_size > 1024
            video = decord.VideoReader(str(path), num_threads=1)
            pixels = video.get_batch(range(len(video))).asnumpy()
            assert np.array_equal(pixels, render(key(3, which, index), label, frames=9, size=40))
            drawn.add(pixels.tobytes())
    assert len(drawn) == SMALL["train"] + SMALL["test"]


def test_paces_part_each_motion_into_slow_and_fast_and_leave_the_videos_as_they_are(tmp_path):
    both = [make_demo(tmp_path / f"{paces}", train=96, test=1, frames=5, size=40, paces=paces) for paces in (1, 2)]
    plain, paced = (_rows(train) for train in both)
    assert [label // 2 for _, label in paced] == [label for _, label in plain]
    names = (tmp_path / "2" / "classes.txt").read_text().splitlines()
    assert len(names) == 24
    assert names[2 * MOTIONS.index("left") + 1] == "left, pace 2 of 2"
    shifts = {0: [], 1: []}
    for (name, label), (other, _) in zip(paced, plain, strict=True):
        first, second = ((tmp_path / n / name).read_bytes() for n in ("1", "2"))
        assert (name, first) == (other, second)
        if names[label].startswith("right,"):
            video = decord.VideoReader(str(tmp_path / "2" / name), num_threads=1)
            frames = video.get_batch([0, 4]).asnumpy().astype(float)
            light = np.abs(frames - np.median(frames, axis=(1, 2), keepdims=True)).sum(axis=3)
            places = (light * np.arange(40)).sum(axis=(1, 2)) / light.sum(axis=(1, 2))
            shifts[label % 2].append(places[1] - places[0])
    assert len(shifts[0]) + len(shifts[1]) == 8
    assert max(shifts[0]) < min(shifts[1])
    with pytest.raises(ValueError, match="paces must be at least 1"):
        make_demo(tmp_path / "none", train=1, test=1, paces=0)


def _stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_reuses_a_complete_folder_and_remakes_a_damaged_or_different_one(tmp_path):
    folder, calls = tmp_path / "demo", []
    small = {**SMALL, "train": 3, "test": 1}

    def count(done: int, total: int) -> None:
        calls.append((done, total))

    make_demo(folder, **small, progress=count)
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before = _stamps(folder)
    make_demo(folder, **small, progress=count)
    assert len(calls) == 4
    assert _stamps(folder) == before

    (folder / "train" / "train_00001.mp4").unlink()
    make_demo(folder, **small, progress=count)
    assert len(calls) == 8
    assert _stamps(folder).keys() == before.keys()

    (folder / "demo.json").write_text("{")
    make_demo(folder, **small, progress=count)
    assert len(calls) == 12

    make_demo(folder, **{**small, "train": 2}, progress=count)
    assert len(calls) == 15
    assert len(_rows(folder / "train.csv")) == 2
    assert json.loads((folder / "demo.json").read_text())["train"] == 2


def test_a_killed_call_leaves_no_folder_and_the_next_one_starts_afresh(tmp_path):
    folder = tmp_path / "demo"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_demo(folder, **{**SMALL, "train": 3, "test": 1}, progress=stop)
    assert not folder.exists()
    make_demo(folder, **{**SMALL, "train": 3, "test": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", "demo"]


def test_it_never_deletes_what_it_did_not_make(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="mine.txt"):
        make_demo(tmp_path, train=1, test=0)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="train must be"):
        make_demo(tmp_path / "demo", train=0)
