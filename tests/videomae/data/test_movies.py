"""Where movies are found: which of several places, files and folders is taken. Reading them: test_key_frames.py."""

import pytest

from tests.videos import moving_frames, write_video
from videomae.data.decode import UnreadableVideo
from videomae.data.facts import first_frame
from videomae.data.movies import find_movies


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_file_comes_before_a_folder_and_before_files_after_it(tmp_path):
    names = [f"m{n}" for n in range(4)]
    for name in names:
        touch(tmp_path / f"{name}.webm", tmp_path / name / "1.jpg", tmp_path / f"{name}.MKV", tmp_path / f"{name}.txt")
    touch(tmp_path / "alone" / "1.jpg", tmp_path / "other.mp4", tmp_path / "m.2.mp4")
    found, places = find_movies(tmp_path, tmp_path, [*names, "alone", "gone", "m.2"])
    assert places == [tmp_path]
    assert found == {name: str(tmp_path / f"{name}.MKV") for name in names} | {
        "alone": str(tmp_path / "alone"),
        "m.2": str(tmp_path / "m.2.mp4"),
    }


def test_an_earlier_place_comes_before_a_later_one(tmp_path):
    touch(tmp_path / "clips" / "a" / "902.mp4", tmp_path / "videos" / "a.mp4", tmp_path / "videos" / "b.mp4")
    found, places = find_movies(tmp_path, None, ["a", "b"])
    assert places == [tmp_path / "clips", tmp_path / "videos"]
    assert found == {"a": str(tmp_path / "clips" / "a"), "b": str(tmp_path / "videos" / "b.mp4")}
    # given, it is the only one, but for the folder of AVA's movies in it
    touch(tmp_path / "own" / "trainval" / "b.mp4")
    found, _ = find_movies(tmp_path, tmp_path / "own", ["a", "b"])
    assert found == {"b": str(tmp_path / "own" / "trainval" / "b.mp4")}


def test_annotations_may_have_a_folder_beside_the_movies(tmp_path):
    touch(tmp_path / "movies" / "a.mp4", tmp_path / "annotations" / "ava_val_v2.2.csv")
    assert find_movies(tmp_path / "annotations", None, ["a"])[0] == {"a": str(tmp_path / "movies" / "a.mp4")}
    assert find_movies(tmp_path / "movies", None, ["a"]) == ({}, [])


def test_a_codec_that_nobody_knows_is_said(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(5))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(UnreadableVideo, match="its codec is not known here"):
        first_frame(path)
