"""One clip of a video: which frames, and which part of them."""

import numpy as np
import pytest

from tests.videos import moving_frames, write_video
from train.one_clip import Start, read_clip
from videomae.data.decode import UnreadableVideo
from videomae.data.sampling import Sampling
from videomae.model import Input

INPUT = Input(4, 16, (2, 8, 8))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("video") / "v.mp4", moving_frames(30, 32, 48)))


@pytest.mark.parametrize(
    ("start", "frames"),
    [(None, [11, 13, 15, 17]), ("3", [3, 5, 7, 9]), ("0.4s", [10, 12, 14, 16]), ("0s", [0, 2, 4, 6]), ("22", None)],
)
def test_the_clip_is_in_the_middle_or_where_it_is_wanted(video, start, frames):
    clip = read_clip(video, INPUT, Sampling("dense", 2), None if start is None else Start.parse(start))
    frames = frames or [22, 24, 26, 28]
    assert list(clip.moments.frames) == frames
    assert clip.moments.seconds == pytest.approx([frame / 25 for frame in frames])
    assert (clip.frames.shape, clip.num_frames, clip.rate) == ((1, 4, 16, 16, 3), 30, 25)


def test_uniform_sampling_covers_the_video(video):
    assert list(read_clip(video, INPUT, Sampling("uniform")).moments.frames) == [3, 10, 17, 24]


def test_the_largest_middle_part_of_the_aspect_is_taken(tmp_path):
    frames = np.zeros((8, 40, 80, 3), dtype=np.uint8)
    frames[:, :, 20:60] = 200  # the middle square
    path = str(write_video(tmp_path / "v.mp4", frames, crf="4"))
    square = read_clip(path, INPUT, Sampling("dense", 1)).frames.float()
    assert (square[:, :, :, 1:-1] - 200).abs().max() < 8
    wide = read_clip(path, Input(4, (16, 32), (2, 8, 8)), Sampling("dense", 1)).frames.float()
    assert (wide[:, :, :, 9:23] - 200).abs().max() < 8
    assert wide[:, :, :, :7].max() < 8
    assert wide[:, :, :, 25:].max() < 8


def test_a_short_video_repeats_its_last_frame(video):
    clip = read_clip(video, Input(16, 16, (2, 8, 8)), Sampling("dense", 4))
    assert list(clip.moments.frames) == [*range(0, 29, 4), *[28] * 8]
    assert (clip.frames[0, 8:] == clip.frames[0, 7]).all()


@pytest.mark.parametrize(
    ("start", "says"),
    [("23", "at frame 22 .0.88 s. at the latest"), ("30", "there is no frame 30"), ("1.2s", "there is no 1.2 s")],
)
def test_a_start_that_the_video_does_not_have_is_refused(video, start, says):
    with pytest.raises(ValueError, match=says):
        read_clip(video, INPUT, Sampling("dense", 2), Start.parse(start))


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "1,5s", "s", "nan", "1e3s"])
def test_what_is_no_start_is_refused(text):
    with pytest.raises(ValueError, match="start must be a frame's number, or seconds"):
        Start.parse(text)


def test_a_still_is_no_video(tmp_path):
    path = str(write_video(tmp_path / "v.mp4", moving_frames(1, 32, 48)))
    with pytest.raises(UnreadableVideo, match="single frame"):
        read_clip(path, INPUT, Sampling())
