"""GIF and MP4: their frames are those that were given, as many, at their rate."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from tests.videos import moving_frames
from train.film import write_gif, write_mp4, write_png
from videomae.data.decode import Video


def film(count=5, height=41, width=63):
    """Natural colours beside paper, hidden grey and a flat corner that never changes."""
    frames = moving_frames(count, height, width)
    frames[:, :, 40:] = 255
    frames[:, :10, 40:50] = 128
    frames[:, 10:20, 40:50] = (46, 10, 40)
    return frames


def decoded(path):
    with Image.open(path) as image:
        shown = []
        for number in range(image.n_frames):
            image.seek(number)
            shown.append((np.asarray(image.convert("RGB")), image.info["duration"]))
    return np.stack([frame for frame, _ in shown]), [duration for _, duration in shown]


def test_a_gif_has_the_frames_in_nearly_their_colours_and_repeats(tmp_path):
    frames = film()
    write_gif(frames, tmp_path / "film.gif", rate=8)
    shown, durations = decoded(tmp_path / "film.gif")
    assert shown.shape == frames.shape
    assert np.abs(shown.astype(int) - frames).mean() < 6
    # eighths of a second in hundredths, none of them lost
    assert set(durations) == {120, 130}
    assert abs(sum(durations) - 5 * 125) <= 5
    with Image.open(tmp_path / "film.gif") as image:
        assert image.info["loop"] == 0


def test_what_stands_still_in_a_gif_does_not_flicker_and_flat_colours_stay_flat(tmp_path):
    frames = film()
    write_gif(frames, tmp_path / "film.gif", rate=8)
    shown, _ = decoded(tmp_path / "film.gif")
    still = (frames == frames[:1]).all(axis=(0, 3))
    assert (shown[:, still] == shown[:1, still]).all()
    flat = shown[:, :, 40:].astype(int)
    assert np.abs(flat - frames[:, :, 40:]).max() <= 4
    assert (flat[:, :10, :10] == 128).all()


def test_an_mp4_has_the_frames_and_even_sides(tmp_path):
    frames = film()
    write_mp4(frames, tmp_path / "film.mp4", rate=7.5)
    video = Video(tmp_path / "film.mp4")
    assert len(video) == len(frames)
    assert video.rate == pytest.approx(7.5, rel=1e-3)
    shown = video.read(range(len(video))).astype(int)
    assert shown.shape == (5, 42, 64, 3)
    assert np.abs(shown[:, :41, :63] - frames).mean() < 6
    # a wrong matrix or range would shift whole areas
    assert np.abs(shown[:, 12:18, 42:48].mean(axis=(0, 1, 2)) - (46, 10, 40)).max() < 4


def test_a_png_is_exact(tmp_path):
    image = film(1)[0]
    write_png(image, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as shown:
        assert (np.asarray(shown) == image).all()


def test_equal_frames_stay_as_long_as_all_of_them(tmp_path):
    frames = film(3)[[0, 1, 1, 1, 2]]
    write_gif(frames, tmp_path / "film.gif", rate=10)
    shown, durations = decoded(tmp_path / "film.gif")
    assert len(shown) == 3
    assert [b - a for a, b in pairwise([0, *np.cumsum(durations)])] == [100, 300, 100]
    write_mp4(frames, tmp_path / "film.mp4", rate=10)
    assert len(Video(tmp_path / "film.mp4")) == 5


@pytest.mark.parametrize("write", [write_gif, write_mp4])
def test_no_film_of_nothing_is_written(write, tmp_path):
    for frames, rate in ((film()[:0], 8), (film().astype(float), 8), (film(), 0)):
        with pytest.raises(ValueError, match="film"):
            write(frames, tmp_path / "film", rate=rate)
    assert not list(tmp_path.iterdir())
