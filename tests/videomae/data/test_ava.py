"""AVA's files, each written as its makers do."""

import json
import re

import numpy as np
import pytest

from videomae.data.ava import (
    EVALUATED,
    ava_classes,
    find_ava,
    read_classes,
    read_detected,
    read_excluded,
    read_images,
)

SIXTY = "1 3-15 17 20 22 24 26-30 34 36-38 41 43 45-49 51 52 54 56-70 72-74 76-80"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def listed(path, names, key="id"):
    return write(path, "".join(f'item {{\n  name: "{name}"\n  {key}: {one}\n}}\n' for one, name in names.items()))


def test_sixty_classes_count():
    wanted = []
    for part in SIXTY.split():
        first, _, last = part.partition("-")
        wanted += range(int(first), int(last or first) + 1)
    assert wanted == list(EVALUATED)
    assert len(EVALUATED) == 60


@pytest.mark.parametrize("key", ["id", "label_id"])
def test_reads_both_spellings_of_a_class_list(tmp_path, key):
    names = {1: "bend/bow (at the waist)", 4: "dance", 12: "walk"}
    assert read_classes(listed(tmp_path / "list.pbtxt", names, key)) == names


def test_reads_the_class_list_of_the_sample(clips):
    sample = clips.parent / "ava" / "action_list.txt"
    if not sample.is_file():
        pytest.skip(f"needs {sample}")
    assert read_classes(sample) == {1: "action1", 2: "action2", 3: "action3"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("item {\n  id: 3\n}\n", "list.pbtxt:2: an id without a name before it"),
        ('item {\n  name: "a"\n  id: 3\n}\nitem {\n  name: "b"\n  id: 3\n}\n', "list.pbtxt:7: 3 is also the id"),
    ],
)
def test_refuses_what_is_no_class_list(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_classes(write(tmp_path / "list.pbtxt", text))


def test_the_short_list_says_which_classes_count_and_all_lists_give_names(tmp_path):
    some = listed(tmp_path / "ava_action_list_v2.2_for_activitynet_2019.pbtxt", {3: "crouch/kneel", 80: "watch"})
    whole = listed(tmp_path / "ava_action_list_v2.2.pbtxt", {n: f"name {n}" for n in range(1, 81)}, "label_id")
    names, counts = ava_classes([some])
    assert (len(names), names[2], names[6], names[79], counts) == (80, "crouch/kneel", "action 7", "watch", (3, 80))
    names, counts = ava_classes([some, whole])
    assert (names[6], counts) == ("name 7", (3, 80))
    assert ava_classes([whole])[1] == ava_classes([])[1] == EVALUATED
    strange = listed(tmp_path / "other.pbtxt", {81: "fly"})
    with pytest.raises(ValueError, match=r"ids that are not AVA's, 1 to 80: \[81\]"):
        ava_classes([strange])


def test_finds_the_files_of_a_split_in_the_folder_or_below(tmp_path):
    assert find_ava(tmp_path, "train") is None
    below = tmp_path / "annotations"
    for name in ("ava_train_v2.2.csv", "ava_train_excluded_timestamps_v2.2.csv", "ava_action_list_v2.2.pbtxt"):
        write(below / name, "")
    found = find_ava(tmp_path, "train")
    assert found.rows == below / "ava_train_v2.2.csv"
    assert found.excluded == below / "ava_train_excluded_timestamps_v2.2.csv"
    assert found.classes == (below / "ava_action_list_v2.2.pbtxt",)
    assert (found.home, found.detections, found.images, found.movies) == (tmp_path, None, None, None)
    with pytest.raises(ValueError, match=r"no ava_val_v2\.2\.csv in "):
        find_ava(tmp_path, "val")


def test_reads_excluded_moments(tmp_path):
    path = write(tmp_path / "excluded.csv", "0f39OWEqJ24,0903\n\n_-Z6wFjXtGQ,0902\n")
    assert read_excluded(path) == (("0f39OWEqJ24", 903.0), ("_-Z6wFjXtGQ", 902.0))
    with pytest.raises(ValueError, match=r"excluded\.csv:2 should be `video,second`; it is `b`"):
        read_excluded(write(tmp_path / "excluded.csv", "a,1\nb\n"))
    with pytest.raises(ValueError, match="excluded.csv is no list of moments: field larger than field limit"):
        read_excluded(write(tmp_path / "excluded.csv", "a" * 140_000 + ",1\n"))


def ava_folder(tmp_path, **files):
    for name, text in {"ava_val_v2.2.csv": "", **files}.items():
        write(tmp_path / name, text)
    return find_ava(tmp_path, "val")


def test_image_ids_are_lines_of_the_list_of_movies_and_seconds(tmp_path):
    files = ava_folder(tmp_path, **{"ava_file_names_trainval_v2.1.txt": "first.mkv\nsecond.mp4\n-5KQ66BBWC4.mkv\n"})
    images = read_images(files)
    assert images.find(902) == ("first", 902.0, None)
    assert images.find(2 * 10_000 + 1798) == ("-5KQ66BBWC4", 1798.0, None)
    assert images.find(30_902) is None
    assert images.find(-1) is None
    # an empty line counts too
    write(files.movies, "first.mkv\n\nthird.mkv\n")
    assert read_images(files).find(2 * 10_000 + 902) == ("third", 902.0, None)
    assert read_images(files).find(10_902) is None


def test_image_ids_are_those_of_the_json_of_images_where_it_is(tmp_path):
    rows = [{"id": 7, "movie": "m", "timestamp": 903, "width": 480, "height": 360, "img_path": "m/903.jpg"}]
    files = ava_folder(
        tmp_path,
        **{"ava_val_v2.2_min.json": json.dumps({"images": rows}), "ava_file_names_trainval_v2.1.txt": "other.mkv\n"},
    )
    assert read_images(files).find(7) == ("m", 903.0, (360, 480))
    assert read_images(files).find(902) is None
    with pytest.raises(ValueError, match="need ava_val_v2.2_min.json or ava_file_names_trainval_v2.1.txt"):
        read_images(ava_folder(tmp_path / "bare"))


def test_detected_boxes_have_corners_in_pixels_and_the_least_score(tmp_path):
    files = ava_folder(tmp_path, **{"ava_file_names_trainval_v2.1.txt": "a.mkv\nb.mkv\n"})
    rows = [
        {"image_id": 10_902, "bbox": [10.5, 20, 30, 40.25], "score": 0.8},
        {"image_id": 903, "bbox": [0, 0, 5, 6], "score": 0.79},
        {"image_id": 903, "bbox": [1, 2, 5, 6], "score": 0.99},
    ]
    path = write(tmp_path / "boxes.json", json.dumps(rows))
    found = read_detected(path, read_images(files), 0.8)
    assert found.videos == ["b", "a"]
    assert found.seconds.tolist() == [902, 903]
    assert found.pixels.tolist() == [[10.5, 20, 40.5, 60.25], [1, 2, 6, 8]]
    assert found.scores.tolist() == [0.8, 0.99]
    assert found.rows.tolist() == [0, 2]
    assert np.array_equal(found.sizes, np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "holds no list"),
        ("[" * 100_000, "is no JSON"),
        (
            '[{"image_id": 1e400, "bbox": [0, 0, 1, 1], "score": 1}]',
            "an entry is no {image_id, bbox, score} of numbers",
        ),
        ('[{"image_id": 902, "bbox": [0, 0, 1, 1, 0, 0, 1, 1], "score": 1}]', "an entry is no {image_id, bbox, score}"),
        ('[{"image_id": 902, "bbox": [0, 0, 1, 1], "score": [1, 1]}]', "an entry is no {image_id, bbox, score}"),
        ('[{"image_id": 902, "bbox": [0, 0, 1, 1]}]', "an entry is no {image_id, bbox, score} of numbers"),
        ('[{"image_id": 902, "bbox": [0, 0, 1], "score": 1}]', "an entry is no {image_id, bbox, score} of numbers"),
        (
            '[{"image_id": 902, "bbox": [0, 0, 1, 1], "score": NaN}]',
            "1 entries with a score that is not in [0, 1], the first is number 1: nan",
        ),
        ('[{"image_id": 902, "bbox": [0, 0, 1, 1], "score": 95}]', "the first is number 1: 95"),
        ('[{"image_id": 90902, "bbox": [0, 0, 1, 1], "score": 1}]', "1 image ids are of no key frame: [90902]"),
    ],
)
def test_refuses_what_is_no_list_of_detected_boxes(tmp_path, text, message):
    files = ava_folder(tmp_path, **{"ava_file_names_trainval_v2.1.txt": "a.mkv\n"})
    with pytest.raises(ValueError, match=re.escape(message)):
        read_detected(write(tmp_path / "boxes.json", text), read_images(files), 0.5)
