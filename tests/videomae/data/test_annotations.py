"""Official annotation files to lists: every trap of each data set, what is counted, and what is refused."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from videomae.data import annotations
from videomae.data.annotation_files import read_kinetics
from videomae.data.labelled import find_labelled

HEADER = "label,youtube_id,time_start,time_end,split"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(folder, **texts):
    """Files by name; `__` stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_bytes(text.encode())


def kinetics(folder, *, header=HEADER, **splits):
    """Annotation files of (label, id, start, end) rows."""
    for split, rows in splits.items():
        lines = [header, *(",".join(map(str, (*row, split))) for row in rows)]
        write(folder, **{f"{split}__csv": "\n".join(lines) + "\n"})


@pytest.fixture
def convert(tmp_path, capsys):
    """The command on tmp_path's folders `official` and `videos`: its exit code, and what it said by row."""

    def run(name, *options, code=0, out="out"):
        arguments = [name, tmp_path / "official", tmp_path / "videos", "--out", tmp_path / out, *options]
        assert annotations.main(list(map(str, arguments))) == code
        said = capsys.readouterr()
        if code == 2:
            assert said.out == ""
            assert said.err.count("\n") == 1
            return said.err
        assert said.err == ""
        return said.out

    return run


def classes_of(folder, split):
    """The class of each video of a split, by its path below the folder."""
    found = find_labelled(folder, split)
    start = len(str(folder.resolve().parent)) + 1
    return {p[start:]: found.classes[label] for p, label in zip(found.videos.paths, found.labels, strict=True)}


def count(text, what):
    """The number in a row of the summary."""
    return int(re.search(rf"^{what} +([\d,]+)", text, re.M)[1].replace(",", ""))


def test_kinetics_numbers_classes_in_alphabetical_order_and_finds_files_by_id_and_time(tmp_path, convert):
    rows = [
        ("zumba", "-starts_dash", 0, 10),
        ("air drumming", "abcDEF_-123", 7, 17),
        ('"""massaging person\'s head"""', "plain_id_00", 100, 110),
        ("air drumming", "ABCdef_-123", 7, 17),
        ("abseiling", "in_folder00", "12.0", "22.0"),
    ]
    kinetics(tmp_path / "official", train=rows, val=[("air_drumming", "val_video_0", 1, 11)])
    touch(
        tmp_path / "videos",
        "train/zumba/-starts_dash_000000_000010.mp4",
        "train/air_drumming/abcDEF_-123_000007_000017.webm",
        "train/air drumming/ABCdef_-123_000007_000017.MKV",
        "train/plain_id_00.mp4",
        "train/abseiling/in_folder00_000012_000022.mp4",
        "val/air drumming/val_video_0_000001_000011.mp4",
        "val/nobody_knows.mp4",
    )
    said = convert("kinetics")
    names = ("abseiling", "air drumming", "massaging person's head", "zumba")
    assert find_labelled(tmp_path / "out").classes == names
    assert (tmp_path / "out" / "classes.txt").read_text() == "".join(f"{name}\n" for name in names)
    found = find_labelled(tmp_path / "out")
    videos = f"{tmp_path}/videos"
    assert dict(zip(found.videos.paths, found.labels, strict=True)) == {
        f"{videos}/train/zumba/-starts_dash_000000_000010.mp4": 3,
        f"{videos}/train/air_drumming/abcDEF_-123_000007_000017.webm": 1,
        f"{videos}/train/plain_id_00.mp4": 2,
        f"{videos}/train/air drumming/ABCdef_-123_000007_000017.MKV": 1,
        f"{videos}/train/abseiling/in_folder00_000012_000022.mp4": 0,
    }
    assert find_labelled(tmp_path / "out", "val", like=found).labels == (1,)
    assert not (tmp_path / "out" / "missing.txt").exists()
    assert re.search(r"^train +5 +5 +0$", said, re.M)
    assert (count(said, "files not named"), count(said, "second copies")) == (1, 0)
    assert "note: 4 classes, where kinetics has 400 or 600 or 700" in said


def test_kinetics_orders_spaces_as_underscores(tmp_path):
    # "_" comes behind upper case and "-", a space before both
    rows = [("a b", "1", 0, 1), ("a-b", "2", 0, 1), ("aB", "3", 0, 1), ("ab", "4", 0, 1)]
    kinetics(tmp_path, train=rows)
    assert read_kinetics(tmp_path).classes == tuple(
        sorted(("a b", "a-b", "aB", "ab"), key=lambda s: s.replace(" ", "_"))
    )
    assert read_kinetics(tmp_path).classes == ("a-b", "aB", "a b", "ab")


def test_kinetics_reads_crawlers_copies_and_other_names_of_its_files(tmp_path, convert):
    write(
        tmp_path / "official",
        **{"kinetics-400_train__csv": f'\ufeff{HEADER},is_cc\r\n"a, b",x,1,2,train,0\r\n\r\nc,y,1,2,train,1\r\n'},
        validate__csv='"label","youtube_id","time_start","time_end","split","is_cc"\n"c","z","1","2","validate","0"\n',
        test__csv="youtube_id,time_start,time_end,split\nq,1,2,test\n",
    )
    touch(tmp_path / "videos", "x.mp4", "y_000001_000002.mp4", "z.mp4", "q.mp4")
    said = convert("kinetics")
    assert classes_of(tmp_path / "out", "train") == {"videos/x.mp4": "a, b", "videos/y_000001_000002.mp4": "c"}
    assert classes_of(tmp_path / "out", "val") == {"videos/z.mp4": "c"}
    assert not (tmp_path / "out" / "test.csv").exists()
    assert "test.csv has no labels: no list of test can be made of it" in said


def test_counts_and_names_what_is_missing_or_wrong(tmp_path, convert):
    rows = [("a", f"video{k}", 0, 10) for k in range(6)]
    kinetics(
        tmp_path / "official", train=[*rows, rows[0], ("b", "other", 0, 10)], val=[("new", "n", 0, 1), ("b", "m", 0, 1)]
    )
    files = ("a/video0_000000_000010.mp4", "a/video1_000000_000010.mp4", "b/other.mp4", "b/n.mp4", "b/m.mp4")
    touch(tmp_path / "videos", *files, "copy/video1_000000_000010.avi", "stray.mp4")
    said = convert("kinetics")
    assert re.search(r"^split +named +written +missing\ntrain +8 +3 +4\nval +2 +1 +0$", said, re.M)
    rows = ("missing", "named twice", "of unknown class", "second copies", "files not named")
    assert [count(said, row) for row in rows] == [4, 1, 1, 2, 1]
    missing = [f"train video{k}_000000_000010" for k in range(2, 6)]
    assert (tmp_path / "out" / "missing.txt").read_text().splitlines() == missing
    assert "n_000000_000001 (new)" in said
    assert "video2_000000_000010, video3_000000_000010, video4_000000_000010, ...\n" in said
    assert convert("kinetics", "--strict", code=1) == said
    # all there: the names of an earlier run go
    touch(tmp_path / "videos", *(f"video{k}.mp4" for k in range(2, 6)))
    convert("kinetics")
    assert not (tmp_path / "out" / "missing.txt").exists()
    convert("kinetics", "--strict", code=1)  # for the unknown class


def test_takes_the_copy_in_the_classs_folder_and_none_in_anothers(tmp_path, convert):
    # two parts of one video, stored by its id alone
    kinetics(tmp_path / "official", train=[("b", "x", 0, 10), ("a", "x", 20, 30), ("c", "x", 40, 50), ("c", "y", 0, 1)])
    touch(tmp_path / "videos", "a/x.mp4", "b/x.mp4", "y.mp4")
    convert("kinetics")
    assert classes_of(tmp_path / "out", "train") == {"videos/b/x.mp4": "b", "videos/a/x.mp4": "a", "videos/y.mp4": "c"}
    assert (tmp_path / "out" / "missing.txt").read_text() == "train x_000040_000050\n"


def ssv2(folder, name="something-something-v2-{}.json", **files):
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in files.items():
        (folder / name.format(key)).write_text(json.dumps(value))


SSV2 = {
    "labels": {"Holding something": "1", "Moving something up": "0", "Doing other things": "2"},
    "train": [
        {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
        {"id": "42326", "label": "moving a cup up", "template": "Moving [something] up", "placeholders": ["a cup"]},
        {"id": "1", "label": "a riddle", "template": "Unheard of [something]", "placeholders": []},
    ],
    "validation": [{"id": "74225", "label": "holding", "template": "Holding [something]", "placeholders": []}],
    "test": [{"id": "1420"}],
}


@pytest.mark.parametrize("name", ["something-something-v2-{}.json", "{}.json"])
def test_ssv2_takes_its_own_numbers_and_leaves_out_the_unlabelled_test(tmp_path, convert, name):
    ssv2(tmp_path / "official", name, **SSV2)
    touch(tmp_path / "videos", "78687.webm", "42326.mp4", "74225.webm", "1420.webm", "1.webm")
    said = convert("ssv2")
    found = find_labelled(tmp_path / "out")
    assert found.classes == ("Moving something up", "Holding something", "Doing other things")
    assert found.labels == (1, 0)
    assert classes_of(tmp_path / "out", "val") == {"videos/74225.webm": "Holding something"}
    assert not (tmp_path / "out" / "test.csv").exists()
    assert f"{name.format('test')} has no labels: no list of test" in said
    assert count(said, "of unknown class") == 1
    # test of SSv2 is validation
    assert find_labelled(tmp_path / "out", "test").videos.paths == find_labelled(tmp_path / "out", "val").videos.paths


@pytest.fixture
def ucf101(tmp_path):
    write(
        tmp_path / "official" / "ucfTrainTestlist",
        classInd__txt="1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n\r\n",
        trainlist01__txt="ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\n"
        "HandstandPushups/v_HandStandPushups_g08_c01.avi 2\r\nYoYo/v_YoYo_g08_c01.avi 3\r\n",
        testlist01__txt="HandstandPushups/v_HandStandPushups_g01_c01.avi\nYoYo/v_YoYo_g01_c01.avi\n",
        trainlist02__txt="YoYo/v_YoYo_g01_c01.avi 3\n",
        testlist02__txt="YoYo/v_YoYo_g08_c01.avi\n",
    )
    return tmp_path / "official" / "ucfTrainTestlist"


@pytest.mark.parametrize("folder", ["HandstandPushups", "HandStandPushups", ""])
@pytest.mark.parametrize("stem", ["v_HandStandPushups", "v_HandstandPushups"])
def test_ucf101_takes_the_test_class_from_the_folder_however_handstands_are_written(
    tmp_path, convert, ucf101, folder, stem
):
    touch(tmp_path / "videos" / folder, f"{stem}_g08_c01.avi", f"{stem}_g01_c01.mp4")
    touch(tmp_path / "videos", "YoYo/v_YoYo_g08_c01.avi", "YoYo/v_YoYo_g01_c01.avi", "A/v_ApplyEyeMakeup_g08_c01.avi")
    said = convert("ucf101")
    assert count(said, "missing") == count(said, "files not named") == 0
    train = find_labelled(tmp_path / "out")
    assert train.classes == ("ApplyEyeMakeup", "HandstandPushups", "YoYo")
    assert train.labels == (0, 1, 2)
    assert find_labelled(tmp_path / "out", "test", like=train).labels == (1, 2)
    assert "those of test serve" in find_labelled(tmp_path / "out", "val").videos.notes[0]


def test_ucf101_has_three_splits(tmp_path, convert, ucf101):
    touch(tmp_path / "videos", "v_YoYo_g08_c01.avi", "v_YoYo_g01_c01.avi")
    convert("ucf101", "--split", "2")
    assert list(classes_of(tmp_path / "out", "train")) == ["videos/v_YoYo_g01_c01.avi"]
    assert list(classes_of(tmp_path / "out", "test")) == ["videos/v_YoYo_g08_c01.avi"]
    assert "no trainlist03.txt" in convert("ucf101", "--split", "3", code=2)


def test_hmdb51_orders_classes_not_files(tmp_path, convert):
    # sword_exercise_test_split1.txt comes before sword_test_split1.txt
    for name in ("sword_exercise", "sword"):
        write(tmp_path / "official", **{f"{name}_test_split1__txt": f"{name}.avi 1 \n"})
    touch(tmp_path / "videos", "sword.avi", "sword_exercise.avi")
    convert("hmdb51")
    assert find_labelled(tmp_path / "out").classes == ("sword", "sword_exercise")


@pytest.mark.parametrize("is_flat", [True, False])
def test_hmdb51_reads_flags_in_every_classs_file(tmp_path, convert, is_flat):
    for split in (1, 2):
        write(
            tmp_path / "official" / "testTrainMulti_7030_splits",
            **{
                f"wave_test_split{split}__txt": f"w_[x]&#;(1).avi {split} \nw2.avi {3 - split} \n",
                f"brush_hair_test_split{split}__txt": f"b 1.avi 0 \r\nb2.avi {split} \r\n",
            },
        )
    names = ("wave/w_[x]&#;(1).avi", "wave/w2.avi", "brush_hair/b 1.avi", "brush_hair/b2.avi", "brush_hair/b3.avi")
    touch(tmp_path / "videos", *(name.partition("/")[2] if is_flat else name for name in names))
    said = convert("hmdb51")
    train, test = (classes_of(tmp_path / "out", split) for split in ("train", "test"))
    assert {path.rpartition("/")[2]: name for path, name in train.items()} == {
        "w_[x]&#;(1).avi": "wave",
        "b2.avi": "brush_hair",
    }
    assert {path.rpartition("/")[2]: name for path, name in test.items()} == {"w2.avi": "wave"}
    assert find_labelled(tmp_path / "out").classes == ("brush_hair", "wave")
    assert count(said, "files not named") == 1  # an unused one is named
    convert("hmdb51", "--split", "2")
    assert {path.rpartition("/")[2] for path in classes_of(tmp_path / "out", "train")} == {"w2.avi"}


def test_paths_are_relative_where_the_videos_lie_below_the_lists(tmp_path, convert):
    kinetics(tmp_path / "official", train=[("a b", "x", 0, 1)])
    touch(tmp_path / "disk", "a b/x.mp4")
    (tmp_path / "videos").symlink_to(tmp_path / "disk")
    convert("kinetics", out=".")
    # through the link
    assert (tmp_path / "train.csv").read_text() == "videos/a b/x.mp4 0\n"
    convert("kinetics")
    assert (tmp_path / "out" / "train.csv").read_text() == f"{tmp_path}/disk/a b/x.mp4 0\n"


def test_refuses_wrong_use_in_one_line(tmp_path, convert):
    assert "ANNOTATIONS must be the folder" in convert("kinetics", code=2)
    kinetics(tmp_path / "official", train=[("a", "x", 0, 1)])
    assert "VIDEOS must be a folder" in convert("kinetics", code=2)
    touch(tmp_path / "videos", "y.mp4")
    assert "none of the 1 videos that" in convert("kinetics", code=2)
    assert not (tmp_path / "out").exists()
    touch(tmp_path / "videos", "x.mp4")
    assert "--split is for ucf101 and hmdb51" in convert("kinetics", "--split", "1", code=2)
    assert "another folder than ANNOTATIONS" in convert("kinetics", code=2, out="official")
    write(tmp_path / "full", val__csv="x.mp4 0\n")
    assert "val.csv would stay beside the new lists" in convert("kinetics", code=2, out="full")
    kinetics(tmp_path / "copy", train=[("a", "x", 0, 1)])
    assert "train.csv is there already and no list" in convert("kinetics", code=2, out="copy")
    assert "a,x,0,1" in (tmp_path / "copy" / "train.csv").read_text()
    needed = {
        "ssv2": "no something-something-v2-labels.json or train.json in",
        "ucf101": "no classInd.txt in",
        "hmdb51": "no CLASS_test_split1.txt in",
    }
    for name, says in needed.items():
        assert says in convert(name, code=2)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({"val__csv": HEADER}, "no train.csv in .*: it says which classes"),
        ({"train__csv": ""}, "train.csv is empty"),
        (
            {"train__csv": "a b/x.mp4 0\nc.mp4 1\n"},
            "no column youtube_id or time_start or time_end; it is `a b/x.mp4 0`",
        ),
        (
            {"train__csv": f"{HEADER}\na,x,0,1,train\na,y,zero,1,train\n"},
            "train.csv:3 is no line of Kinetics: `a,y,zero",
        ),
        ({"train__csv": f"{HEADER}\na,x,0,inf,train\n"}, "train.csv:2 is no line"),
        ({"train__csv": f"{HEADER}\na,x\n"}, "train.csv:2 is no line"),
        ({"train__csv": f"{HEADER}\n,x,0,1,train\n"}, "train.csv has no labels"),
        ({"train__csv": f"{HEADER}\n,x,0,1,train\na,y,0,1,train\n"}, "1 of 2 lines have no label"),
        ({"train__csv": HEADER, "k700_train__csv": HEADER}, "k700_train.csv and train.csv in .* are both of train"),
    ],
)
def test_refuses_files_that_are_none_of_kinetics(tmp_path, convert, texts, says):
    write(tmp_path / "official", **texts)
    touch(tmp_path / "videos", "x.mp4")
    assert re.search(says, convert("kinetics", code=2))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("labels", ["a"], "holds no map of templates"),
        ("labels", {"a": "0", "b": "2"}, "does not number its 2 templates from 0 on"),
        ("labels", {"a": "zero"}, "no map of templates to numbers"),
        ("labels", {"a": [0]}, "no map of templates to numbers"),
        ("labels", {"a": float("inf")}, "no map of templates to numbers"),
        ("train", {"id": "1"}, "holds no list of videos"),
        ("train", [{"id": "1"}], "has a video without a `template`"),
        ("train", [{"template": "x"}], "its entry 1 is no video"),
        ("validation", [{"id": "1", "template": 3}], "its entry 1 is no video"),
        ("validation", [7], "its entry 1 is no video"),
        ("validation", [], "is empty"),
    ],
)
def test_refuses_files_that_are_none_of_ssv2(tmp_path, convert, name, value, says):
    ssv2(tmp_path / "official", **(SSV2 | {name: value}))
    touch(tmp_path / "videos", "78687.webm")
    assert re.search(says, convert("ssv2", code=2))


def test_refuses_broken_json_and_bytes_that_are_no_text(tmp_path, convert):
    ssv2(tmp_path / "official", **SSV2)
    touch(tmp_path / "videos", "78687.webm")
    file = tmp_path / "official" / "something-something-v2-train.json"
    file.write_text('[{"id": "1",')
    assert "is no JSON" in convert("ssv2", code=2)
    file.write_text("[" * 100_000)
    assert "is no JSON" in convert("ssv2", code=2)
    file.write_bytes(b"\xff\xfe")
    assert "not text" in convert("ssv2", code=2)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("classInd.txt", "0 A\n1 B\n", "classInd.txt:1 should be `1 NAME`; it is `0 A`"),
        ("classInd.txt", "", "classInd.txt is empty"),
        ("trainlist01.txt", "v_YoYo_g08_c01.avi 3\n", "trainlist01.txt:1 should be `CLASS/VIDEO.avi LABEL`"),
        ("trainlist01.txt", "YoYo/v_YoYo_g08_c01.avi 2\n", "gives YoYo the number 2, which classInd.txt does not"),
    ],
)
def test_refuses_files_that_are_none_of_ucf101(tmp_path, convert, ucf101, name, text, says):
    (ucf101 / name).write_text(text)
    touch(tmp_path / "videos", "v_YoYo_g08_c01.avi")
    assert says in convert("ucf101", code=2)


def test_refuses_flags_that_hmdb51_does_not_have(tmp_path, convert):
    write(tmp_path / "official", wave_test_split1__txt="a.avi 1 \nb.avi 3 \n")
    touch(tmp_path / "videos", "a.avi")
    assert "wave_test_split1.txt:2 should be `VIDEO.avi FLAG`, 0 to 2" in convert("hmdb51", code=2)


@pytest.mark.long
def test_the_module_is_a_command(tmp_path):
    kinetics(tmp_path / "official", train=[("a", "x", 0, 1)])
    touch(tmp_path / "videos", "x.mp4")
    command = [sys.executable, "-m", "videomae.data.annotations", "kinetics", "official", "videos", "--out", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("written to out: train.csv, classes.txt\n")


@pytest.mark.long
def test_a_large_set_takes_seconds(tmp_path, convert):
    rows = [(f"class {k % 400:03d}", f"id{k:09d}", 10, 20) for k in range(25_000)]
    kinetics(tmp_path / "official", train=rows)
    for k in range(400):
        (tmp_path / "videos" / f"class_{k:03d}").mkdir(parents=True)
    for name, stem, *_ in rows:
        (tmp_path / "videos" / name.replace(" ", "_") / f"{stem}_000010_000020.mp4").touch()
    begin = time.process_time()
    convert("kinetics")
    assert time.process_time() - begin < 5
    assert find_labelled(tmp_path / "out").labels == tuple(k % 400 for k in range(25_000))
