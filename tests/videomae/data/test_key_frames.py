"""Sets of key frames: AVA's in each layout of its movies, lists of one's own, and everything that is refused."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest

from tests.videos import moving_frames, write_video
from videomae.data.key_frames import find_key_frames

FIRST, SECOND = "0f39OWEqJ24", "_-Z6wFjXtGQ"
HEADER = "path,second,x1,y1,x2,y2,label"
BOX = "0.1,0.2,0.5,0.6"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Two seconds, 64 wide and 48 high."""
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", moving_frames(50), preset="ultrafast")


@pytest.fixture
def ava(tmp_path, clips, video):
    """The sample of AVA's annotations as a training set, with movies that begin at second 902."""
    sample = clips.parent / "ava"
    if not sample.is_dir():
        pytest.skip(f"needs the sample of AVA in {sample}")
    shutil.copy(sample / "ava_sample.csv", tmp_path / "ava_train_v2.2.csv")
    shutil.copy(sample / "ava_excluded_timestamps_sample.csv", tmp_path / "ava_train_excluded_timestamps_v2.2.csv")
    for name in (FIRST, SECOND):
        put(video, tmp_path / "videos" / f"{name}.mp4")
    return tmp_path


def put(video, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(video, path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def own(folder, video, *rows, name="train.csv", videos=("a.mp4",)):
    """A list of one's own, and its videos."""
    for one in videos:
        put(video, folder / one)
    return write(folder / name, HEADER, *rows)


def ids(found, index):
    return [{found.class_ids[c] for c in np.flatnonzero(row)} for row in found.labels_of(index)]


def test_one_key_frame_of_the_sample_remains_after_exclusion(ava):
    found = find_key_frames(ava, starts_at=902)
    assert (found.names, found.seconds.tolist(), len(found)) == ((FIRST,), [902.0], 1)
    assert ids(found, 0) == [{12, 17, 79}]
    np.testing.assert_allclose(found.boxes_of(0), [[0.031, 0.162, 0.670, 0.995]], rtol=1e-6)
    assert found.scores_of(0).tolist() == [1.0]
    assert found.videos.paths == (str(ava / "videos" / f"{FIRST}.mp4"),)
    assert found.sizes.tolist() == [[48, 64]]
    assert (len(found.classes), found.class_ids[0], found.class_ids[-1], len(found.evaluated)) == (80, 1, 80, 60)
    assert found.notes == ("2 key frames are among those that AVA excludes: left out",)
    assert found.excluded == ((FIRST, 903.0), (SECOND, 902.0))
    assert len(found.ground_truth) == 8
    assert found.annotated(0) == [("action 12", "action 17", "action 79")]


def test_all_three_key_frames_of_the_sample_are_there_without_exclusion(ava):
    found = find_key_frames(ava, starts_at=902, exclude=False)
    assert list(zip(found.names, found.seconds.tolist(), strict=True)) == [(FIRST, 902), (FIRST, 903), (SECOND, 902)]
    assert [ids(found, i) for i in range(3)] == [[{12, 17, 79}], [{12, 17}], [{12, 74, 80}]]
    assert (found.num_boxes, found.most_boxes, found.notes) == (3, 1, ())


@pytest.mark.parametrize("layout", ["clips", "padded", "frames", "given", "beside"])
def test_movies_are_found_in_every_layout(ava, video, layout):
    shutil.rmtree(ava / "videos")
    options = {"starts_at": 902}
    home = ava
    if layout in ("clips", "padded"):
        for second in (901, 902):
            put(video, ava / "clips" / "trainval" / FIRST / f"{second:0{4 if layout == 'padded' else 0}d}.mp4")
        wanted, options = ava / "clips" / "trainval" / FIRST, {}
    elif layout == "frames":
        wanted = ava / "frames" / FIRST
        wanted.mkdir(parents=True)
        write_jpeg(wanted / "f_000001.jpg", 48, 64)
    elif layout == "given":
        wanted = ava / "elsewhere" / f"{FIRST}.mkv"
        put(video, wanted)
        options["videos"] = ava / "elsewhere"
    else:
        home = ava / "annotations"
        home.mkdir()
        for file in ava.glob("*.csv"):
            file.rename(home / file.name)
        wanted = ava / "movies" / f"{FIRST}.webm"
        put(video, wanted)
    found = find_key_frames(home, **options)
    assert found.videos.paths == (str(wanted),)
    assert found.sizes.tolist() == [[48, 64]]


def write_jpeg(path, height, width):
    import simplejpeg

    path.write_bytes(simplejpeg.encode_jpeg(np.zeros((height, width, 3), np.uint8)))


def test_rows_of_one_person_and_box_are_one_box_with_several_labels(tmp_path, video):
    header = f"{HEADER},person"
    put(video, tmp_path / "a.mp4")
    rows = [f"a.mp4,1,{BOX},run,1", f"a.mp4,0.5,{BOX},run,1", f"a.mp4,1,{BOX},sit,1", f"a.mp4,1,{BOX},sit,2"]
    rows += ["a.mp4,1.0,0.3,0.2,0.5,0.6,sit,1", f"a.mp4,1,{BOX},sit,1"]
    found = find_key_frames(write(tmp_path / "train.csv", header, *rows))
    assert found.seconds.tolist() == [0.5, 1.0]
    assert found.classes == ("run", "sit")
    assert ids(found, 0) == [{0}]
    # in the order of the file
    assert ids(found, 1) == [{0, 1}, {1}, {1}]
    np.testing.assert_allclose(found.boxes_of(1)[:, 0], [0.1, 0.1, 0.3], rtol=1e-6)
    assert found.labels_of(1).dtype == bool


def test_classes_of_a_list_are_those_beside_it_or_in_alphabetical_order(tmp_path, video):
    file = own(tmp_path, video, f"a.mp4,1,{BOX},zoom", f"a.mp4,1,{BOX},act")
    assert find_key_frames(file).classes == ("act", "zoom")
    write(tmp_path / "classes.txt", "zoom", "rest", "act")
    found = find_key_frames(tmp_path)
    assert (found.classes, found.class_ids, found.evaluated) == (("zoom", "rest", "act"), (0, 1, 2), (0, 1, 2))
    assert found.annotated(0) == [("zoom", "act")]
    with pytest.raises(
        ValueError, match="names other classes than the training set or the weights: zoom, rest, act; there act"
    ):
        find_key_frames(tmp_path, classes=("act",))
    (tmp_path / "classes.txt").unlink()
    assert find_key_frames(file, classes=("zoom", "act", "more")).annotated(0) == [("zoom", "act")]


def test_labels_that_are_numbers_make_classes_of_all_up_to_them(tmp_path, video):
    found = find_key_frames(own(tmp_path, video, f"a.mp4,1,{BOX},2", f"a.mp4,1,{BOX},1"))
    assert (found.classes, found.notes) == (("0", "1", "2"), ())
    file = own(tmp_path, video, f"a.mp4,1,{BOX},40000", f"a.mp4,1,{BOX},70000")
    found = find_key_frames(file)
    assert ids(found, 0) == [{40000, 70000}]
    what = f"number them from 0 on, or name them in {tmp_path / 'classes.txt'}"
    assert found.notes == (f"{file}: 70,001 classes, 2 of them with boxes: {what}",)
    refused("a label is 2000000000, which would make 2,000,000,001", own(tmp_path, video, f"a.mp4,1,{BOX},2000000000"))


def test_a_test_list_serves_as_validation_and_a_training_list_does_not(tmp_path, video):
    own(tmp_path, video, f"a.mp4,1,{BOX},run")
    with pytest.raises(ValueError, match=r"no boxes of val in .*: neither val\.csv nor ava_val_v2\.2\.csv"):
        find_key_frames(tmp_path, "val")
    with pytest.raises(ValueError, match="is the training list"):
        find_key_frames(tmp_path / "train.csv", "val")
    own(tmp_path, video, f"a.mp4,0,{BOX},run", name="test.csv")
    found = find_key_frames(tmp_path, "val")
    assert found.seconds.tolist() == [0.0]
    assert found.notes[0] == f"no val boxes in {tmp_path}: those of test serve"
    assert "annotated ones" in found.notes[1]
    assert (found.boxes_from, found.is_annotated) == ("as annotated", True)


def detections(ava):
    """A validation set of three annotated key frames in two movies."""
    for file in ava.glob("ava_train*"):
        file.rename(ava / file.name.replace("train", "val"))
    (ava / "ava_val_excluded_timestamps_v2.2.csv").unlink()
    write(ava / "ava_file_names_trainval_v2.1.txt", f"{SECOND}.mp4", f"{FIRST}.mkv")
    rows = [
        {"image_id": 10_902, "bbox": [16, 12, 32, 24], "score": 0.9},
        {"image_id": 10_902, "bbox": [0, 0, 64, 48], "score": 0.81},
        {"image_id": 10_903, "bbox": [0, 0, 64, 48], "score": 0.5},
        {"image_id": 903, "bbox": [0, 0, 6.4, 4.8], "score": 0.95},
    ]
    (ava / "boxes.json").write_text(json.dumps(rows))
    return ava


def test_a_test_takes_detected_boxes_of_the_least_score(ava):
    found = find_key_frames(detections(ava), "val", boxes=ava / "boxes.json", starts_at=902)
    counts = {(found.names[i], found.seconds[i]): len(found.boxes_of(i)) for i in range(len(found))}
    assert counts == {(FIRST, 902.0): 2, (SECOND, 903.0): 1}
    index = found.names.index(FIRST)
    np.testing.assert_allclose(found.boxes_of(index), [[0.25, 0.25, 0.75, 0.75], [0, 0, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(found.scores_of(index), [0.9, 0.81], rtol=1e-6)
    assert found.labels_of(index).shape == (2, 80)
    assert not found.labels_of(index).any()
    assert found.annotated(index) is None
    assert found.boxes_from == "of boxes.json, with a score of at least 0.8"
    assert len(found.ground_truth) == 8
    sizes, missed = found.notes
    assert sizes.startswith("boxes.json: boxes are taken as pixels of the videos as they are here, as no _min.json")
    what = "2 of 3 annotated key frames have no box with a score of at least 0.8 of the same name and second"
    assert missed == f"{ava / 'boxes.json'}: {what}: they count as missed"
    assert len(find_key_frames(ava, "val", boxes=ava / "boxes.json", score_at_least=0.5, starts_at=902)) == 3


def test_detected_boxes_of_excluded_moments_are_left_out(ava):
    write(detections(ava) / "ava_val_excluded_timestamps_v2.2.csv", f"{SECOND},0903")
    found = find_key_frames(ava, "val", boxes=ava / "boxes.json", starts_at=902)
    assert (found.names, found.seconds.tolist(), found.num_boxes) == ((FIRST,), [902.0], 2)
    assert found.excluded == ((SECOND, 903.0),)


def test_detected_boxes_are_pixels_of_their_own_movie(ava):
    detections(ava)
    write_video(ava / "videos" / f"{SECOND}.mp4", moving_frames(50, height=32, width=40), preset="ultrafast")
    found = find_key_frames(ava, "val", boxes=ava / "boxes.json", starts_at=902)
    np.testing.assert_allclose(found.boxes_of(found.names.index(SECOND))[0], [0, 0, 0.16, 0.15], atol=1e-6)
    np.testing.assert_allclose(found.boxes_of(found.names.index(FIRST))[0], [0.25, 0.25, 0.75, 0.75], atol=1e-6)


def test_classes_without_a_name_may_have_one_elsewhere(ava):
    unnamed = find_key_frames(ava, starts_at=902).classes
    item = 'item {\n  name: "bend"\n  id: 1\n}\n'
    (ava / "ava_action_list.pbtxt").write_text(item)
    assert find_key_frames(ava, starts_at=902, classes=unnamed).classes == unnamed
    whole = ("bend", *(f"name {n}" for n in range(2, 81)))
    assert find_key_frames(ava, starts_at=902, classes=whole).classes == whole
    for other in (("bow", *whole[1:]), whole[:79]):
        refused("has 80 classes, bend, ...", ava, starts_at=902, classes=other)


def test_detected_boxes_are_of_the_frames_that_the_json_of_images_tells(ava):
    detections(ava)
    rows = [
        {"id": number, "movie": name, "timestamp": second, "width": 128, "height": 96}
        for number, name, second in ((10_902, FIRST, 902), (10_903, FIRST, 903), (903, SECOND, 903))
    ]
    (ava / "ava_val_v2.2_min.json").write_text(json.dumps({"images": rows, "annotations": []}))
    found = find_key_frames(ava, "val", boxes=ava / "boxes.json", starts_at=902)
    np.testing.assert_allclose(found.boxes_of(found.names.index(FIRST))[0], [0.125, 0.125, 0.375, 0.375], atol=1e-6)


@pytest.mark.parametrize("header", [None, "video,second,x1,y1,x2,y2,score", f"{HEADER},score"])
def test_detected_boxes_may_come_in_a_csv(tmp_path, video, header):
    own(tmp_path, video, f"a.mp4,1,{BOX},run", name="val.csv")
    beside = "" if header and "label" not in header else "3,"
    rows = [f"a.mp4,1,{BOX},{beside}0.9", f"a.mp4,0,0,0,1,1,{beside}0.7", f"a.mp4,1,0,0,1,1,{beside}0.85"]
    boxes = write(tmp_path / "boxes.csv", *([header] if header else []), *rows)
    found = find_key_frames(tmp_path, "val", boxes=boxes)
    assert found.seconds.tolist() == [1.0]
    np.testing.assert_allclose(found.boxes_of(0), [[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(found.scores_of(0), [0.9, 0.85], rtol=1e-6)


@pytest.mark.parametrize("header", ["PATH, second,y1, X1,y2,x2,Score", "score,y1,x1,y2,x2,note,second,video"])
def test_columns_of_detected_boxes_go_by_their_names(tmp_path, video, header):
    own(tmp_path, video, f"a.mp4,1,{BOX},run", name="val.csv")
    named = {"path": "a.mp4", "video": "a.mp4", "second": 1, "x1": 0.1, "y1": 0.2, "x2": 0.5, "y2": 0.6, "score": 0.9}
    row = ",".join(str(named.get(name.strip().lower(), "")) for name in header.split(","))
    found = find_key_frames(tmp_path, "val", boxes=write(tmp_path / "boxes.csv", "", header, "", row))
    np.testing.assert_allclose(found.boxes_of(0), [[0.1, 0.2, 0.5, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(found.scores_of(0), [0.9], rtol=1e-6)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((f"a.mp4,1,{BOX},1", "a,1,2"), ":2 should be `video,second,x1,y1,x2,y2,...,score`, or in the order"),
        ((f"a.mp4;1;{BOX};1",), ":1 should be `video,second,"),
        ((f"a.mp4,1,{BOX},run",), ":1 should be `video,second,"),
        (("", f"a.mp4,1,{BOX},3"), ":2: the score, 3, must be in [0, 1]"),
        ((f"a.mp4,1,{BOX},-0.1",), ":1: the score, -0.1, must be in [0, 1]"),
        ((f"a.mp4,1,{BOX},nan",), ":1: the score, nan, must be in [0, 1]"),
        ((f"a.mp4,nan,{BOX},1",), ":1: second must be a finite number of 0 or above; it is `a.mp4,nan,"),
        ((f"a.mp4,-1,{BOX},1",), ":1: second must be a finite number of 0 or above"),
        (("a.mp4,1,0.1,nan,1,1,1",), ":1: corners must be in [0, 1], fractions of the frame"),
        ((f" ,1,{BOX},1",), ":1 has no video"),
        (("path,second,x1,y1,x2,y2,label",), ":1 must name the columns path,second,x1,y1,x2,y2,score, each once"),
        (("path,video,second,x1,y1,x2,y2,score",), ":1 must name the columns"),
        (("path,second,x1,y1,x2,y2,score", "a.mp4,1,0,0,1,1"), ":2 should be"),
    ],
)
def test_refuses_lines_that_are_no_detected_boxes(tmp_path, video, lines, message):
    own(tmp_path, video, f"a.mp4,1,{BOX},run", name="val.csv")
    boxes = write(tmp_path / "boxes.csv", *lines)
    refused(f"{boxes}{message}", tmp_path, "val", boxes=boxes)


def test_videos_of_detected_boxes_are_the_annotated_ones(tmp_path, video):
    file = own(tmp_path, video, f"a.mp4,1,{BOX},run", name="val.csv")
    boxes = write(tmp_path / "boxes.csv", f"{tmp_path / 'a.mp4'},1,{BOX},0.9")
    what = (
        f"{boxes}: 1 of 1 videos are not in {file}: {tmp_path / 'a.mp4'}; videos go by the same names in both, there a"
    )
    refused(what, tmp_path, "val", boxes=boxes)
    put(video, tmp_path / "b.mp4")
    write(boxes, f"a.mp4,1,{BOX},0.9", f"b.mp4,1,{BOX},0.9")
    assert f"{boxes}: 1 of 2 videos are not in {file}: b.mp4" in find_key_frames(file, "val", boxes=boxes).notes


def test_faults_of_detected_boxes_are_of_their_own_file(ava, tmp_path, video):
    own(tmp_path / "own", video, f"a.mp4,1,{BOX},run", name="val.csv")
    boxes = write(tmp_path / "boxes.csv", f"a.mp4,1,{BOX},0.9", "", f"b.mp4,1,{BOX},0.9")
    refused(f"{boxes}:3: 1 of 2 videos are not in {tmp_path / 'own'}: b.mp4", tmp_path / "own", "val", boxes=boxes)
    write(boxes, f"a.mp4,1,{BOX},0.1", f"a.mp4,9,{BOX},0.9")
    refused(f"{boxes}:2: 1 of 1 key frames are at seconds", tmp_path / "own", "val", boxes=boxes)
    detections(ava)
    options = {"boxes": ava / "boxes.json", "score_at_least": 0.93}
    refused(f"{ava / 'boxes.json'}, entry 4: 1 of 1 key frames are at", ava, "val", **options)


def test_training_takes_annotated_boxes_whatever_was_detected(tmp_path, video):
    own(tmp_path, video, f"a.mp4,1,{BOX},run")
    found = find_key_frames(tmp_path, "train", boxes=tmp_path / "none.csv")
    assert (found.num_boxes, found.boxes_from, found.notes) == (1, "as annotated", ())


def refused(message, *arguments, **options):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        find_key_frames(*arguments, **options)
    return str(error.value)


def test_refuses_detected_boxes_that_are_not_in_the_frame_with_their_number(tmp_path, video):
    own(tmp_path, video, f"a.mp4,1,{BOX},run", name="val.csv")
    for corners, what in (("0.1,0.2,1.01,0.6", "reach out of the frame, 0 to 1"), ("0.5,0.2,0.5,0.6", "are empty")):
        boxes = write(tmp_path / "boxes.csv", *[f"a.mp4,1,{corners},0.9"] * 7, f"a.mp4,1,{BOX},0.9")
        said = refused(f"boxes.csv: 7 of 8 boxes {what}: a.mp4 second 1 (", tmp_path, "val", boxes=boxes)
        assert said.endswith("and 2 more")
    # a box may be empty in the frame alone
    refused("boxes.csv: 1 of 1 boxes are empty", tmp_path, "val", boxes=write(boxes, "a.mp4,1,1,0,1.0005,1,0.9"))
    # what rounding does is clipped
    boxes = write(tmp_path / "boxes.csv", "a.mp4,1,-0.0009,0.2,1.0009,0.6,0.9")
    found = find_key_frames(tmp_path, "val", boxes=boxes)
    np.testing.assert_allclose(found.boxes_of(0), [[0, 0.2, 1, 0.6]], rtol=1e-6)
    refused("has no box with a score of at least 0.95", tmp_path, "val", boxes=boxes, score_at_least=0.95)
    refused("no such file of boxes", tmp_path, "val", boxes=tmp_path / "other.csv")
    (tmp_path / "boxes.json").write_text("[]")
    refused("goes with AVA's files", tmp_path, "val", boxes=tmp_path / "boxes.json")


def test_refuses_annotated_boxes_that_are_not_in_the_frame(tmp_path, video):
    refused("train.csv:2", own(tmp_path, video, "a.mp4,1,0.1,0.2,1.01,0.6,run"))
    refused("train.csv:3", own(tmp_path, video, f"a.mp4,1,{BOX},run", "a.mp4,1,0.5,0.2,0.5,0.6,run"))
    # what rounding does is clipped
    found = find_key_frames(own(tmp_path, video, "a.mp4,1,-0.0009,0.2,1.0009,0.6,run"))
    np.testing.assert_allclose(found.boxes_of(0), [[0, 0.2, 1, 0.6]], rtol=1e-6)
    # with scores too, which detections have
    file = write(tmp_path / "train.csv", f"{HEADER},score", f"a.mp4,1,{BOX},run,1", "a.mp4,1,0.5,0.2,0.1,0.6,run,1")
    refused("train.csv: 1 of 2 boxes are empty: a.mp4 second 1 (0.5, 0.2, 0.1, 0.6)", file)
    refused("train.csv: 1 of 1 boxes are empty: a.mp4 second 1 (1", own(tmp_path, video, "a.mp4,1,1,0,1.0005,1,run"))


def test_refuses_unknown_classes_with_their_number(ava, tmp_path, video):
    with (ava / "ava_train_v2.2.csv").open("a") as file:
        file.write(f"{FIRST},0902,{BOX},81,0\n{FIRST},0902,{BOX},0,0\n{FIRST},0902,{BOX},81,1\n")
    refused("3 rows have a class that is none: 0 (1), 81 (2); there are 80, 1 to 80", ava)
    write(tmp_path / "own" / "classes.txt", "run", "sit")
    refused("fly", own(tmp_path / "own", video, f"a.mp4,1,{BOX},fly"))


def test_refuses_videos_that_are_not_there_or_leaves_them_out(tmp_path, video):
    names = [f"v{n}.mp4" for n in range(8)]
    file = own(tmp_path, video, *(f"{name},1,{BOX},run" for name in names), videos=names[:1])
    said = refused(f"{file}:3: 7 of 8 videos are not in {tmp_path}: v1.mp4, v2.mp4, v3.mp4", file)
    assert "v5.mp4 and 2 more (--data.allow-missing leaves them out)" in said
    found = find_key_frames(file, allow_missing=True)
    assert found.names == ("v0.mp4",)
    assert found.notes[0].startswith(f"{file}:3: 7 of 8 videos are not in ")
    assert found.notes[0].endswith("and 2 more: left out")
    refused("no such folder of videos (--data.videos): none", file, videos="none")
    found = find_key_frames(file.rename(tmp_path / "test.csv"), "test", allow_missing=True)
    assert found.notes[-1].endswith("and 2 more: left out, their boxes count as missed")
    assert len(found.ground_truth) == 8
    refused("no key frame of", own(tmp_path, video, f"w.mp4,1,{BOX},run", videos=()), allow_missing=True)


def test_refuses_movies_that_are_not_there(ava):
    (ava / "videos" / f"{FIRST}.mp4").unlink()
    refused(f"{ava / 'ava_train_v2.2.csv'}:1: 1 of 2 videos are not in {ava / 'videos'}: {FIRST}", ava, exclude=False)
    shutil.rmtree(ava / "videos")
    refused("are not in folders of movies beside", ava)


def test_refuses_videos_that_cannot_be_read_or_leaves_them_out(tmp_path, video):
    file = own(tmp_path, video, f"a.mp4,1,{BOX},run", f"b.mp4,1,{BOX},run")
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    refused(f"{file}:3: 1 of 2 videos cannot be read: {tmp_path / 'b.mp4'}: Invalid data", file)
    assert find_key_frames(file, allow_missing=True).names == ("a.mp4",)


def test_refuses_seconds_that_a_video_does_not_have(ava, tmp_path, video):
    said = refused("ava_train_v2.2.csv:1: 1 of 1 key frames are at seconds that their videos do not have", ava)
    assert f"{FIRST} at 902 (it has 0 to 2, see --data.starts-at)" in said
    rows = [f"a.mp4,{second},{BOX},run" for second in (0, 1.99, 2, *range(30, 40))]
    file = own(tmp_path / "own", video, *rows)
    said = refused(f"{file}:4: 11 of 13 key frames are at", file)
    assert said.count("a.mp4 at") == 5
    assert "and 6 more" in said
    assert find_key_frames(file, allow_missing=True).seconds.tolist() == [0, 1.99]
    for second in (901, 903):
        put(video, ava / "clips" / FIRST / f"{second}.mp4")
    refused(f"{FIRST} has no clip of 902", ava, videos=ava / "clips")


def test_refuses_what_is_no_set_of_key_frames(tmp_path):
    refused("no path to look for boxes in", "")
    refused("no such file or folder", tmp_path / "none")
    refused("no boxes of train in", tmp_path)
    refused("not from s3://bucket/set", "s3://bucket/set")
    for options, message in (
        ({"score_at_least": 1.5}, "score_at_least must be in [0, 1]; got 1.5"),
        ({"frames_rate": 0}, "frames must come at a rate in (0, 1000]; got 0"),
        ({"starts_at": float("nan")}, "a movie must start at some second; got nan"),
    ):
        refused(message, tmp_path, **options)


def test_the_fingerprint_is_of_the_boxes_and_not_of_where_they_lie(tmp_path, video):
    def print_of(folder, *rows, **options):
        return find_key_frames(own(tmp_path / folder, video, *rows, videos=("a.mp4", "b.mp4")), **options).fingerprint

    row = f"a.mp4,1,{BOX},run"
    one = print_of("one", row)
    assert re.fullmatch("[0-9a-f]{16}", one)
    assert print_of("two", row) == one
    others = [f"b.mp4,1,{BOX},run", f"a.mp4,0,{BOX},run", "a.mp4,1,0.1,0.2,0.5,0.61,run", f"a.mp4,1,{BOX},sit"]
    prints = {print_of(f"other{n}", other) for n, other in enumerate(others)}
    assert len(prints | {one}) == 5


def test_many_key_frames_are_a_few_arrays(tmp_path, video):
    rows = [f"a.mp4,{n / 10_000},{BOX},{label}" for n in range(5000) for label in ("run", "sit")]
    found = find_key_frames(own(tmp_path, video, *rows))
    assert (len(found), found.num_boxes, len(found.table.column)) == (5000, 5000, 10_000)
    # a path and a name are one object each
    boxes = found.num_boxes * (16 + 4 + 8 + 2 * 4)
    rows = sum(column.nbytes for column in (found.ground_truth.box, found.ground_truth.second)) + 20_000 * 8
    assert len(pickle.dumps(found)) < boxes + rows + 5000 * 32
    again = pickle.loads(pickle.dumps(found))
    assert again.fingerprint == found.fingerprint
    assert np.array_equal(again.labels_of(4999), found.labels_of(4999))


def test_frames_have_their_upright_size(hard, tmp_path):
    shutil.copy(hard / "nasa_13013_rotated.mp4", tmp_path / "a.mp4")
    found = find_key_frames(write(tmp_path / "train.csv", HEADER, f"a.mp4,0.2,{BOX},run"))
    assert found.sizes.tolist() == [[480, 270]]
