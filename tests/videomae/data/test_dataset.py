"""Lists of videos, the order of clips, and clips as pure functions of (seed, epoch, index, view)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.videos import moving_frames, write_video
from videomae.data.augment import Augment
from videomae.data.dataset import Order, Sample, find_videos, mask_keys
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.labelled import find_labelled
from videomae.data.readers import ClipReader


def test_a_folder_is_searched_to_the_bottom_in_sorted_order(tmp_path):
    for name in ("b.mp4", "a/z.MKV", "a/deep/er/x.avi", "notes.txt", "a/image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_videos(tmp_path)
    assert found.paths == tuple(str(tmp_path / name) for name in ("a/deep/er/x.avi", "a/z.MKV", "b.mp4"))
    assert found.labels is None


@pytest.mark.parametrize(
    ("text", "paths", "labels"),
    [
        ("x.mp4 3\ny.mp4 0\n", ("x.mp4", "y.mp4"), (3, 0)),
        ("x.mp4\n\n  y.mp4  \n", ("x.mp4", "y.mp4"), None),
        ("x.mp4 0 -1\ny.mp4 0 -1\n", ("x.mp4", "y.mp4"), None),
        (
            "my videos/clip 2.mp4 3\n/abs/two  spaces.mp4   7\n",
            ("my videos/clip 2.mp4", "/abs/two  spaces.mp4"),
            (3, 7),
        ),
        ("my clip 2.mp4\n", ("my clip 2.mp4",), None),
        ("no_dot 5\nfolder.v1/no_dot 6\n", ("no_dot.mp4", "folder.v1/no_dot.mp4"), (5, 6)),
        ("x.mp4\t3\r\n", ("x.mp4",), (3,)),
        ("my videos/a b.mp4 0 -1\n", ("my videos/a b.mp4",), None),
    ],
    ids=["labels", "paths", "V2", "spaces", "number in a name", "no dot", "tab", "V2 with spaces"],
)
def test_reads_list_files(tmp_path, text, paths, labels):
    (tmp_path / "list.csv").write_text(text, newline="")
    found = find_videos(tmp_path / "list.csv")
    assert found.paths == tuple(path if path.startswith("/") else str(tmp_path / path) for path in paths)
    assert found.labels == labels


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", b"\n", "the list is empty"),
        ("mixed.csv", b"a.mp4 1\nb.mp4\n", "1 of 2 lines have a label"),
        ("frames.csv", b"folder 0 300\nother.mp4 0 300\n", "frames.csv:2: only whole videos"),
        ("commas.csv", b"path,label\na.mp4,3\n", "commas.csv:2: path and label are parted by a space, not a comma"),
        ("binary.csv", b"\xff\xfe\x00\x81", "not text"),
        ("video.mp4", b"", "is a video; give its folder"),
    ],
)
def test_refuses_lists_by_name_and_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        find_videos(tmp_path / name)


def test_refuses_missing_and_empty_sources(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        find_videos(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no videos in"):
        find_videos(tmp_path)


def test_the_fingerprint_follows_the_paths(tmp_path):
    prints = set()
    for text in ("a.mp4\nb.mp4\n", "b.mp4\na.mp4\n", "a.mp4\n"):
        (tmp_path / "list").write_text(text)
        prints.add(find_videos(tmp_path / "list").fingerprint)
    assert len(prints) == 3
    # a set that moved is the same
    (tmp_path / "list").write_text("elsewhere/on disk/b.mp4\nelsewhere/on disk/a.mp4\n")
    assert find_videos(tmp_path / "list").fingerprint in prints


def test_what_a_mac_leaves_beside_its_files_is_no_video(tmp_path):
    for name in ("a/1.mp4", "a/._1.mp4", "__MACOSX/a/._1.mp4", ".hidden/2.mp4", "b/2.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = find_videos(tmp_path).paths
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["a/1.mp4", "b/2.mp4"]
    assert find_labelled(tmp_path).classes == ("a", "b")


def test_each_epoch_is_a_permutation_and_batches_cross_epochs():
    samples = Order(7, seed=3).samples(0, 7 * 50)
    for epoch in range(50):
        part = samples[epoch * 7 : epoch * 7 + 7]
        assert {s.epoch for s in part} == {epoch}
        assert sorted(s.index for s in part) == list(range(7))
    assert len({tuple(s.index for s in samples[e * 7 : e * 7 + 7]) for e in range(50)}) > 45
    # any piece, cut anywhere, asked for in any order
    again = Order(7, seed=3)
    assert again.samples(128, 128) == samples[128:256]
    assert again.samples(5, 4) == samples[5:9]
    assert Order(7, seed=4).samples(0, 50) != samples[:50]


def test_views_of_a_clip_are_neighbours():
    samples = Order(3, seed=0, views=4).samples(2, 8)
    assert [s.view for s in samples] == [2, 3, 0, 1, 2, 3, 0, 1]
    assert samples[0][:2] == samples[1][:2] != samples[2][:2]


@pytest.fixture
def video(tmp_path):
    return str(write_video(tmp_path / "video.mp4", moving_frames(60, 60, 80)))


def reader(seed=0, **changes):
    return ClipReader(**({"frames": 8, "size": (32, 32), "stride": 2, "augment": Augment(), "seed": seed} | changes))


def test_a_clip_is_a_pure_function_of_its_sample(video):
    samples = [Sample(0, 5, 0), Sample(0, 5, 1)]
    first, second = reader().read(video, samples)
    assert first.shape == (8, 32, 32, 3)
    assert first.dtype == np.uint8
    # alone or with others, again or elsewhere
    assert np.array_equal(reader().read(video, samples[1:])[0], second)
    assert not np.array_equal(first, second)
    for other in (Sample(1, 5, 0), Sample(0, 6, 0)):
        assert not np.array_equal(reader().read(video, [other])[0], first)
    assert not np.array_equal(reader(seed=1).read(video, samples[:1])[0], first)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A video whose frames' numbers are their brightness."""
    frames = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None] * 6, (40, 32, 32, 3)).copy()
    return str(write_video(tmp_path_factory.mktemp("video") / "counting.mp4", frames, qp="0", pix_fmt="yuv444p"))


def numbers_of(clip):
    return np.rint(clip.mean((1, 2, 3)) / 6).astype(int).tolist()


def test_views_are_spread_over_windows_that_are_decoded_at_once(counting, monkeypatch):
    asked = []
    read = Video.read
    monkeypatch.setattr(Video, "read", lambda self, numbers, **_: asked.append(list(numbers)) or read(self, numbers))
    four = reader(frames=4, stride=3, views=4, windows=2)
    once = reader(frames=4, stride=3, views=4)
    apart = 0
    for epoch in range(20):
        samples = [Sample(epoch, 0, view) for view in range(4)]
        asked.clear()
        views = [numbers_of(clip) for clip in four.read(counting, samples)]
        assert len(asked) == 1  # one decode, of no frame twice
        assert asked[0] == sorted({n for view in views for n in view})
        assert views[0] == views[1]
        assert views[2] == views[3]
        assert all(np.diff(view).tolist() == [3, 3, 3] for view in views)
        apart += views[0] != views[2]
        # the first window is that of a run with one; a view is the same when it is read alone
        assert numbers_of(once.read(counting, samples)[3]) == views[0]
        assert numbers_of(four.read(counting, samples[3:])[0]) == views[3]
    assert apart > 15


def test_damage_costs_all_views_or_none_however_they_are_split(counting, tmp_path):
    data = bytearray(Path(counting).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = os.urandom(16)
    (tmp_path / "damaged.mp4").write_bytes(data)
    four = reader(frames=4, stride=3, views=4, windows=2)

    def outcome(samples):
        try:
            return len(four.read(str(tmp_path / "damaged.mp4"), samples))
        except UnreadableVideo:
            return 0

    for epoch in range(30):
        samples = [Sample(epoch, 0, view) for view in range(4)]
        assert outcome(samples) / 4 == outcome(samples[:2]) / 2 == outcome(samples[2:]) / 2 == outcome(samples[3:])


def test_views_must_suit_their_windows():
    for views, windows in ((4, 3), (2, 4), (4, 0)):
        with pytest.raises(ValueError, match="multiple of windows"):
            reader(views=views, windows=windows)


def test_says_what_reading_took(counting):
    clip = np.empty((4, 32, 32, 3), dtype=np.uint8)
    spent = reader(frames=4).read_into(counting, [Sample(0, 0, 0)], [clip])
    assert min(spent.open, spent.decode, spent.crop) > 0
    assert spent.total == pytest.approx(spent.open + spent.decode + spent.crop)
    assert 0 <= spent.waited <= spent.open + spent.decode
    assert np.array_equal(clip, reader(frames=4).read(counting, [Sample(0, 0, 0)])[0])


def test_starts_vary_over_the_video_but_not_over_its_views(counting):
    seen = set()
    for epoch in range(150):
        views = reader(frames=4, stride=3).read(counting, [Sample(epoch, 0, view) for view in range(2)])
        numbers, same = map(numbers_of, views)
        assert (np.diff(numbers) == 3).all()
        assert numbers == same
        seen.add(int(numbers[0]))
    assert seen == set(range(40 - 12 + 1))


def test_flips_half_of_the_clips_when_asked(tmp_path):
    left_dark = np.zeros((8, 32, 32, 3), dtype=np.uint8)
    left_dark[:, :, 16:] = 200
    path = str(write_video(tmp_path / "sides.mp4", left_dark))
    for flip, expected in ((False, 0), (True, 50)):
        flipped = 0
        for epoch in range(100):
            r = reader(frames=2, stride=1, augment=Augment(scales=(1,), flip=flip))
            clip = r.read(path, [Sample(epoch, 0, 0)])[0]
            flipped += clip[:, :, :8].mean() > 100
        assert abs(flipped - expected) <= (20 if flip else 0)


def test_refuses_a_single_frame(tmp_path):
    path = str(write_video(tmp_path / "still.mp4", moving_frames(1)))
    with pytest.raises(UnreadableVideo, match="a single frame"):
        reader().read(path, [Sample(0, 0, 0)])


def test_mask_keys_differ_by_sample_and_seed():
    samples = [Sample(e, i, v) for e in range(3) for i in range(3) for v in range(3)]
    keys = mask_keys(0, samples)
    assert keys.dtype == torch.int64
    assert len(set(keys.tolist()) | set(mask_keys(1, samples).tolist())) == 54


def test_says_which_folders_it_could_not_search(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    write_video(tmp_path / "open" / "a.mp4", moving_frames(3))
    scandir = os.scandir

    def guarded(folder):
        if str(folder).endswith("closed"):  # tests may run as root, to whom nothing is closed
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    found = find_videos(tmp_path)
    assert [path.rpartition("/")[2] for path in found.paths] == ["a.mp4"]
    assert found.notes == (f"{tmp_path}/closed could not be searched: Permission denied",)
