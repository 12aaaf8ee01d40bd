"""The views of a test and the clips of fine-tuning, against frames and crops computed one by one."""

import statistics
import time

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from tests.videos import moving_frames, write_video
from videomae.data.augment import Augment, random_resized_crop
from videomae.data.dataset import Sample, find_videos
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.prepare import main as prepare
from videomae.data.rand_augment import RandAugment
from videomae.data.readers import ClipReader, LabelledClipReader, ViewReader
from videomae.data.sampling import Sampling
from videomae.keys import Draws

SIDE, LENGTH = 16, 4


def read(reader, path, views):
    out = [np.empty(reader.shape, dtype=np.uint8) for _ in views]
    spent = reader.read_into(str(path), [Sample(0, 0, view) for view in views], out)
    assert spent.total > 0
    return out


def one_view(path, numbers, crops, place, video=None):
    """Frame by frame: the short side becomes SIDE, then the square at its place along the long one (RECIPES F.4)."""
    video = video or Video(path)
    out = []
    for number in numbers:
        image = video.read([number])[0]
        height, width = image.shape[:2]
        base = min(height, width)
        size = (int(SIDE * height / base), int(SIDE * width / base))
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        planes = interpolate(planes, size=size, mode="bilinear", align_corners=False)
        free = max(size) - SIDE
        offset = int(place * free / (crops - 1)) if crops > 1 else free // 2
        top, left = (offset, 0) if height >= width else (0, offset)
        out.append(planes[0, :, top : top + SIDE, left : left + SIDE].permute(1, 2, 0).numpy())
    return np.stack(out)


def dense_clips(num_frames, stride, clips):
    stored = list(range(0, num_frames, stride))
    while len(stored) < LENGTH:
        stored.append(stored[-1])
    step = max((len(stored) - LENGTH) / (clips - 1), 0)
    return [stored[int(k * step) :][:LENGTH] for k in range(clips)]


def assert_near(ours, exact):
    # uint8 rounding, in each of the two directions
    assert np.abs(ours.astype(np.float64) - exact).max() <= 1.01


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Wide, upright and square; the last is shorter than a clip."""
    folder = tmp_path_factory.mktemp("videos")
    shapes = {"wide": (30, 40, 56), "upright": (21, 52, 36), "square": (26, 32, 32), "short": (5, 40, 50)}
    return {
        name: str(write_video(folder / f"{name}.mp4", moving_frames(*shape, seed=i), crf="10"))
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("name", ["wide", "upright", "square", "short"])
def test_dense_views_are_clips_x_crops_of_the_video_it_was_given(videos, name):
    path = videos[name]
    reader = ViewReader(LENGTH, (SIDE, SIDE), Sampling("dense", 2), clips=5, crops=3)
    views = read(reader, path, range(15))
    wanted = dense_clips(len(Video(path)), 2, 5)
    for view, ours in enumerate(views):
        assert_near(ours, one_view(path, wanted[view // 3], 3, view % 3))
    if name in ("wide", "upright"):
        # another clip, another crop: other pixels
        assert not np.array_equal(views[0], views[3])
        assert not np.array_equal(views[0], views[1])


def test_uniform_views_interleave(videos):
    path = videos["wide"]
    reader = ViewReader(LENGTH, (SIDE, SIDE), Sampling("uniform"), clips=2, crops=3)
    tick = 30 / LENGTH
    wanted = [[int(tick * x) for x in range(LENGTH)], [int(tick / 2 + tick * x) for x in range(LENGTH)]]
    for view, ours in enumerate(read(reader, path, range(6))):
        assert_near(ours, one_view(path, wanted[view // 3], 3, view % 3))


@pytest.mark.parametrize("sampling", [Sampling("dense", 2), Sampling("uniform")])
def test_one_view_is_the_middle_of_the_video_and_of_the_frame(videos, sampling):
    for name in ("wide", "upright"):
        path = videos[name]
        numbers = sampling.middle(len(Video(path)), LENGTH)
        ours = read(ViewReader(LENGTH, (SIDE, SIDE), sampling), path, [0])[0]
        assert_near(ours, one_view(path, numbers, 1, 0))


def test_some_views_are_those_of_all_of_them(videos):
    reader = ViewReader(LENGTH, (SIDE, SIDE), Sampling("dense", 2), clips=5, crops=3)
    whole = read(reader, videos["wide"], range(15))
    for wanted in ([7], [14, 2]):
        for view, ours in zip(wanted, read(reader, videos["wide"], wanted), strict=True):
            assert np.array_equal(ours, whole[view])


def test_each_frame_is_decoded_once(videos, monkeypatch):
    asked = []
    original = Video.read
    monkeypatch.setattr(Video, "read", lambda self, n, **how: asked.append(list(n)) or original(self, n, **how))
    read(ViewReader(LENGTH, (SIDE, SIDE), Sampling("dense", 2), clips=10, crops=3), videos["upright"], range(30))
    assert asked == [list(range(0, 21, 2))]


def test_a_video_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    reader = ViewReader(LENGTH, (SIDE, SIDE), Sampling("dense", 2), clips=2, crops=3)
    for path, reason in (("broken.mp4", "Invalid data"), ("missing.mp4", "no such file")):
        with pytest.raises(UnreadableVideo, match=f"{path}: .*{reason}"):
            read(reader, tmp_path / path, range(6))
    write_video(tmp_path / "still.mp4", moving_frames(1))
    with pytest.raises(UnreadableVideo, match="single frame"):
        read(reader, tmp_path / "still.mp4", range(6))


def test_refuses_views_that_it_cannot_give():
    with pytest.raises(ValueError, match="views must be positive; got 0 x 3"):
        ViewReader(LENGTH, (SIDE, SIDE), Sampling(), 0, 3)
    with pytest.raises(ValueError, match="views are square; got 16 x 24"):
        ViewReader(LENGTH, (16, 24), Sampling())


@pytest.mark.long
def test_a_set_of_some_frames_gives_the_nearest_where_that_is_asked_for(videos, tmp_path):
    (tmp_path / "list.csv").write_text(f"{videos['wide']} 0\n")
    flags = ("--stride", "4", "--phases", "first", "--short-side", "40", "--workers", "1", "--codec", "jpeg")
    assert prepare([str(tmp_path / "list.csv"), str(tmp_path / "set"), *flags]) == 0
    path = find_videos(tmp_path / "set").paths[0]
    stored = Video(path)
    sampling = Sampling("uniform")
    with pytest.raises(ValueError, match="not stored"):
        read(ViewReader(LENGTH, (SIDE, SIDE), sampling, 2, 3), path, range(6))
    views = read(ViewReader(LENGTH, (SIDE, SIDE), sampling, 2, 3, nearest=True), path, range(6))
    for view, ours in enumerate(views):
        numbers = sampling.views(30, LENGTH, 2)[view // 3]
        held = range(0, 30, 4)
        nearest = [min(held, key=lambda number, n=n: abs(number - n)) for n in numbers]
        assert_near(ours, one_view(path, nearest, 3, view % 3, stored))
    # dense views of its stride need no others
    read(ViewReader(LENGTH, (SIDE, SIDE), Sampling("dense", 4), 5, 3), path, range(15))


def test_refuses_pretraining_views_that_windows_do_not_divide():
    with pytest.raises(ValueError, match="views must be a multiple of windows; got 3 views, 2 windows"):
        ClipReader(4, (16, 16), 2, Augment(), 0, views=3, windows=2)


@pytest.mark.long
def test_fifteen_views_cost_less_than_13_tenths_of_a_decode(clips):
    """Of every frame, over seven ordinary videos, processor time, the two in turns."""
    reader = ViewReader(16, (224, 224), Sampling("dense", 4), clips=5, crops=3)
    out = [np.empty(reader.shape, dtype=np.uint8) for _ in range(15)]
    samples = [Sample(0, 0, view) for view in range(15)]
    views, whole = 0.0, 0.0
    for path in sorted(map(str, clips.iterdir())):
        spent = ([], [])
        for _ in range(5):
            begin = time.process_time()
            reader.read_into(path, samples, out)
            between = time.process_time()
            assert sum(1 for _ in Video(path).stream()) == len(Video(path))
            spent[0].append(between - begin)
            spent[1].append(time.process_time() - between)
        views, whole = views + statistics.median(spent[0]), whole + statistics.median(spent[1])
    print(f"15 views cost {views / whole:.2f} decodes")
    assert views <= 1.3 * whole


# -- clips of fine-tuning

NOISE = RandAugment(ops=3, probability=0.7)


def clips_of(path, views, *, epoch=0, index=0, seed=6, **how):
    reader = LabelledClipReader(LENGTH, (SIDE, SIDE), how.pop("sampling", Sampling("dense", 2)), seed, **how)
    out = [np.zeros(reader.shape, dtype=np.uint8) for _ in views]
    assert reader.read_into(path, [Sample(epoch, index, view) for view in views], out).total > 0
    return out


def one_clip(path, view, *, rand_augment, epoch=0, index=0, seed=6, sampling=None, flip=True, area=(0.08, 1.0)):
    """Frame by frame: RandAugment, the crop, the resize, the flip; the last number of a key is its purpose."""
    video = Video(path)
    numbers = (sampling or Sampling("dense", 2)).train(len(video), LENGTH, Draws(seed, epoch, index, 1))
    out = []
    for number in numbers:
        draws = Draws(seed, epoch, index, view, 4)
        frame = video.read([number])
        frame = frame if rand_augment is None else rand_augment(frame, draws)
        crop = random_resized_crop(*frame.shape[1:3], draws, area=area)
        rows, columns = (slice(a, a + b) for a, b in ((crop.top, crop.height), (crop.left, crop.width)))
        planes = torch.from_numpy(frame[:, rows, columns].copy()).permute(0, 3, 1, 2).float()
        planes = interpolate(planes, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        image = planes[0].permute(1, 2, 0).numpy()
        out.append(image[:, ::-1] if flip and draws.below(2) == 1 else image)
    return np.stack(out)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Of odd sides, upright, and of two frames."""
    folder = tmp_path_factory.mktemp("odd")
    shapes = {"odd": (17, 31, 45), "narrow": (12, 61, 19), "two": (2, 40, 50)}
    found = {}
    for i, (name, (count, height, width)) in enumerate(shapes.items()):
        frames = moving_frames(count, height, width, seed=i)
        found[name] = str(write_video(folder / f"{name}.mkv", frames, codec="ffv1", pix_fmt="bgr0"))
    return found


@pytest.mark.parametrize("rand_augment", [None, NOISE], ids=["plain", "augmented"])
@pytest.mark.parametrize("name", ["wide", "upright", "short", "odd", "narrow", "two"])
def test_clips_are_augmented_cropped_resized_and_mirrored_in_this_order(videos, odd, name, rand_augment):
    path = (videos | odd)[name]
    for view, ours in enumerate(clips_of(path, range(4), rand_augment=rand_augment)):
        assert_near(ours, one_clip(path, view, rand_augment=rand_augment))


def test_clips_follow_sampling_area_and_flip(videos):
    path = videos["wide"]
    for how in ({"sampling": Sampling("uniform")}, {"area": (0.9, 1.0)}, {"flip": False}):
        ours = clips_of(path, range(4), rand_augment=None, **how)
        for view, clip in enumerate(ours):
            assert_near(clip, one_clip(path, view, rand_augment=None, **how))


def test_half_of_the_clips_are_mirrored(videos):
    whole = {"rand_augment": None, "area": (1.0, 1.0), "aspect": (1.0, 1.0), "sampling": Sampling("dense", 8)}
    plain, *_ = clips_of(videos["square"], [0], flip=False, **whole)
    mirrored = 0
    for clip in clips_of(videos["square"], range(200), **whole):
        is_mirrored = not np.array_equal(clip, plain)
        assert not is_mirrored or np.array_equal(clip, plain[:, :, ::-1])
        mirrored += is_mirrored
    assert 75 < mirrored < 125


def test_views_share_their_frames_and_one_decode_and_depend_on_nothing_else(videos, monkeypatch):
    path = videos["wide"]
    asked = []
    original = Video.read
    monkeypatch.setattr(Video, "read", lambda self, n, **how: asked.append(list(n)) or original(self, n, **how))
    together = clips_of(path, range(3), rand_augment=NOISE)
    assert len(asked) == 1
    for view in (2, 0):
        assert np.array_equal(clips_of(path, [view], rand_augment=NOISE)[0], together[view])
    assert asked[1] == asked[2] == asked[0]
    assert not np.array_equal(together[0], together[1])
    for other in ({"epoch": 1}, {"index": 1}, {"seed": 7}):
        clips_of(path, [0], rand_augment=NOISE, **other)
    assert len({tuple(numbers) for numbers in asked}) > 1
