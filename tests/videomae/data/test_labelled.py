"""Labelled sources: what is read as which split, how classes are named and numbered, and what is refused."""

import os

import pytest

from tests.videos import moving_frames, write_video
from videomae.data import prepare
from videomae.data.dataset import NoSplit, VideoList
from videomae.data.labelled import LabelledVideos, find_labelled, read_classes


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(folder, **texts):
    """Files by name; `__` stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_bytes(text.encode())


def pairs(found, folder):
    """(path below the folder, class) of each video."""
    return [
        (os.path.relpath(path, folder), found.classes[label])
        for path, label in zip(found.videos.paths, found.labels, strict=True)
    ]


def test_reads_a_list_with_labels_and_names_them_by_number(tmp_path):
    write(tmp_path, list__txt="a b/clip 2.mp4 3\né/ü.mp4 0\n")
    found = find_labelled(tmp_path / "list.txt")
    assert pairs(found, tmp_path) == [("a b/clip 2.mp4", "3"), ("é/ü.mp4", "0")]
    assert found.classes == ("0", "1", "2", "3")
    assert found.labels == (3, 0)
    assert len(found) == 2
    assert found.videos.notes == ("2 of 4 classes have no train video: 1, 2",)
    # a list is one split, whichever is asked for
    val = find_labelled(str(tmp_path / "list.txt"), "val")
    assert (pairs(val, tmp_path), val.classes) == (pairs(found, tmp_path), found.classes)


def test_reads_names_beside_a_list_with_crlf_and_a_byte_order_mark(tmp_path):
    write(tmp_path, list__csv="\ufeffa.mp4 1\r\nb.mp4 0\r\n", classes__txt="\ufeffclap hands\r\nübung\r\n\r\n")
    found = find_labelled(tmp_path / "list.csv")
    assert found.classes == ("clap hands", "übung")
    assert pairs(found, tmp_path) == [("a.mp4", "übung"), ("b.mp4", "clap hands")]


def test_takes_the_list_of_the_split_in_a_folder(tmp_path):
    write(tmp_path, train__csv="a.mp4 0\nb.mp4 1\n", test__csv="c.mp4 1\nd.mp4 0\n", mine__csv="e.mp4 0\nf.mp4 1")
    touch(tmp_path, "train/x/not_this.mp4")
    assert pairs(find_labelled(tmp_path), tmp_path) == [("a.mp4", "0"), ("b.mp4", "1")]
    assert pairs(find_labelled(tmp_path, "mine"), tmp_path) == [("e.mp4", "0"), ("f.mp4", "1")]
    test = find_labelled(tmp_path, "test")
    assert (pairs(test, tmp_path), test.videos.notes) == ([("c.mp4", "1"), ("d.mp4", "0")], ())
    val = find_labelled(tmp_path, "val")
    assert val.videos.paths == test.videos.paths
    assert val.videos.notes == (f"no val videos in {tmp_path}: those of test serve",)
    # where both are there, neither serves as the other
    write(tmp_path, val__csv="g.mp4 1\nh.mp4 0\n")
    for split, names in (("val", "gh"), ("test", "cd")):
        found = find_labelled(tmp_path, split)
        assert [path[-5:] for path in found.videos.paths] == [f"{name}.mp4" for name in names]
        assert found.videos.notes == ()
    (tmp_path / "test.csv").rename(tmp_path / "val.csv")
    assert "those of val serve" in find_labelled(tmp_path, "test").videos.notes[0]


def test_class_folders_are_the_training_set_and_their_names_the_classes(tmp_path):
    touch(
        tmp_path, "jump/a.mp4", "jump/deep/b.AVI", "clap hands/c.webm", "Zebra/d.mkv", "jump/notes.txt", "empty/x.txt"
    )
    (tmp_path / ".cache").mkdir()
    found = find_labelled(tmp_path)
    assert found.classes == ("Zebra", "clap hands", "jump")
    assert pairs(found, tmp_path) == [
        ("Zebra/d.mkv", "Zebra"),
        ("clap hands/c.webm", "clap hands"),
        ("jump/a.mp4", "jump"),
        ("jump/deep/b.AVI", "jump"),
    ]
    assert found.videos.notes == (f"folders in {tmp_path} without a video, so no classes: empty",)
    with pytest.raises(NoSplit, match=r"no val videos in .*: add val.csv \(`path label` a line\) or val/"):
        find_labelled(tmp_path, "val")


def test_classes_are_in_the_order_of_their_names_not_of_their_paths(tmp_path):
    # "a b/" comes before "a/"
    touch(tmp_path, "a/x.mp4", "a b/y.mp4")
    found = find_labelled(tmp_path)
    assert found.classes == ("a", "a b")
    assert pairs(found, tmp_path) == [("a b/y.mp4", "a b"), ("a/x.mp4", "a")]


def test_a_class_may_be_called_like_a_split(tmp_path):
    touch(tmp_path, "train/a.mp4", "bus/b.mp4", "test/c.mp4")
    assert find_labelled(tmp_path).classes == ("bus", "test", "train")


def test_one_class_is_allowed(tmp_path):
    touch(tmp_path, "only/a.mp4")
    assert find_labelled(tmp_path).classes == ("only",)


def test_a_split_without_some_class_keeps_the_training_sets_numbers(tmp_path):
    touch(tmp_path, *(f"train/{name}/{name}.mp4" for name in "abcd"), "val/d/x.mp4", "val/b/y.mp4")
    train = find_labelled(tmp_path)
    assert train.labels == (0, 1, 2, 3)
    alone = find_labelled(tmp_path, "val")
    assert (alone.labels, alone.classes) == ((0, 1), ("b", "d"))  # which is why like is there
    for like in (train, train.classes, list(train.classes)):
        val = find_labelled(tmp_path, "val", like=like)
        assert (val.labels, val.classes) == ((1, 3), train.classes)
        assert val.videos.notes == ("2 of 4 classes have no val video: a, c",)
    # of one such folder itself, too: its name says which split it is
    assert find_labelled(tmp_path / "val", "val", like=train).labels == (1, 3)
    touch(tmp_path, "val/e/z.mp4")
    with pytest.raises(ValueError, match="class folders that are none of the 4 classes: e$"):
        find_labelled(tmp_path, "val", like=train)


@pytest.mark.parametrize("below", ["", "train"])
def test_a_file_of_names_numbers_class_folders(tmp_path, below):
    touch(tmp_path, "train/b/x.mp4", "train/a/y.mp4")
    write(tmp_path / below, classes__txt="b\nc\na\n")
    found = find_labelled(tmp_path)
    assert (found.labels, found.classes) == ((2, 0), ("b", "c", "a"))


def test_a_lists_own_names_must_be_the_training_sets_in_order(tmp_path):
    write(tmp_path / "one", train__csv="a.mp4 0\nb.mp4 1\n", classes__txt="walk\nrun\n")
    write(tmp_path / "two", val__csv="c.mp4 0\n", classes__txt="run\nwalk\n")
    write(tmp_path / "three", val__csv="c.mp4 1\n")
    train = find_labelled(tmp_path / "one")
    with pytest.raises(ValueError, match="two/val.csv has other classes .*: label 0 is run, there walk"):
        find_labelled(tmp_path / "two", "val", like=train)
    write(tmp_path / "two", classes__txt="walk\nrun\nstand\n")
    with pytest.raises(ValueError, match="3 of them, there 2"):
        find_labelled(tmp_path / "two", "val", like=train)
    write(tmp_path / "two", classes__txt="walk\nrun\n")
    assert find_labelled(tmp_path / "two", "val", like=train).classes == ("walk", "run")
    # numbers alone are believed, and this is said
    bare = find_labelled(tmp_path / "three", "val", like=train)
    assert pairs(bare, tmp_path) == [("three/c.mp4", "run")]
    assert "has no classes.txt: its labels are taken for the training set's" in bare.videos.notes[0]


def test_the_training_set_is_no_other_split(tmp_path):
    write(tmp_path, train__csv="a.mp4 0\nb.mp4 1\n", again__csv="b.mp4 1\n", part__csv="b.mp4 1\nc.mp4 1\n")
    train = find_labelled(tmp_path)
    with pytest.raises(NoSplit, match=r"train.csv is the training list; give its folder"):
        find_labelled(tmp_path / "train.csv", "val")
    with pytest.raises(NoSplit, match="all val videos of .*again.csv are training videos"):
        find_labelled(tmp_path / "again.csv", "val", like=train)
    note = find_labelled(tmp_path / "part.csv", "val", like=train).videos.notes[-1]
    assert note == "1 of 2 val videos are training videos as well"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.mp4\nb.mp4\n", "no labels in .*list.csv: each line must be `path label`"),
        ("a.mp4,3\n", "parted by a space, not a comma"),
        ("a.mp4 0 -1\n", "no labels in"),
        ("a.mp4 0\nb.mp4 -1\n", "b.mp4 has the label -1; labels count from 0"),
        ("a.mp4 0\nb.mp4 2\n", "b.mp4 has the label 2; there are 2 classes, 0 to 1"),
    ],
)
def test_refuses_labels_that_are_none(tmp_path, text, says):
    write(tmp_path, list__csv=text, classes__txt="x\ny\n")
    with pytest.raises(ValueError, match=says) as raised:
        find_labelled(tmp_path / "list.csv")
    assert "\n" not in str(raised.value)


def test_refuses_what_is_no_label_without_names(tmp_path):
    write(tmp_path, list__csv="a.mp4 20240131\n")
    with pytest.raises(ValueError, match="a label of 20240131 is no class"):
        find_labelled(tmp_path / "list.csv")
    write(tmp_path, list__csv="a.mp4 -2\n")
    with pytest.raises(ValueError, match="the label -2; labels count from 0"):
        find_labelled(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\n\nb\n", "classes.txt:2: no name"),
        ("a\nb\na\n", "classes.txt:3: a is also the name in line 1"),
        ("\n", "names no class"),
    ],
)
def test_refuses_names_that_are_empty_or_come_twice(tmp_path, text, says):
    write(tmp_path, classes__txt=text)
    with pytest.raises(ValueError, match=says):
        read_classes(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not text"):
        read_classes(tmp_path / "classes.txt")


def test_says_which_splits_there_are(tmp_path):
    write(tmp_path, val__csv="a.mp4 0\n")
    touch(tmp_path, "test/x/b.mp4")
    with pytest.raises(ValueError, match=r"no train.csv in .*there is .*val.csv and .*/test$"):
        find_labelled(tmp_path)
    touch(tmp_path / "loose", "x/a.mp4", "b.mp4", "c.mp4")
    with pytest.raises(ValueError, match=r"no labels in .*: b.mp4 and 1 more lie in no folder of a class"):
        find_labelled(tmp_path / "loose")
    with pytest.raises(ValueError, match="no such file or folder"):
        find_labelled(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no path"):
        find_labelled("")


def test_follows_symbolic_links(tmp_path):
    touch(tmp_path / "disk", "a/x.mp4", "b/y.mp4")
    (tmp_path / "set").mkdir()
    for name, target in (("one", "a"), ("two", "b")):
        (tmp_path / "set" / name).symlink_to(tmp_path / "disk" / target)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    found = find_labelled(tmp_path / "link")
    assert pairs(found, tmp_path) == [("set/one/x.mp4", "one"), ("set/two/y.mp4", "two")]


def test_the_fingerprint_follows_names_labels_and_classes_but_not_the_place(tmp_path):
    def fingerprint(paths, labels, classes, folder="/data"):
        return LabelledVideos(VideoList(tuple(f"{folder}/{path}" for path in paths), labels), classes).fingerprint

    base = (("x/a.mp4", "b.mp4"), (0, 1), ("u", "v"))
    first = fingerprint(*base)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert fingerprint(*base, folder="/elsewhere/on disk") == first
    others = [
        (base[0], (1, 0), base[2]),
        (base[0], base[1], ("v", "u")),
        (("b.mp4", "x/a.mp4"), *base[1:]),
        (("x/a.mp4", "c.mp4"), *base[1:]),
        (("x/a.mp4",), (0,), base[2]),
    ]
    assert len({first, *(fingerprint(*one) for one in others)}) == 6


def test_labels_must_be_there_and_one_for_each_video():
    for labels, says in ((None, "no labels"), ((0,), "1 labels of 2 videos"), ((0, 1), "b has the label 1")):
        with pytest.raises(ValueError, match=says):
            LabelledVideos(VideoList(("a", "b"), labels), ("only",))


def make(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, moving_frames(4, seed=number))


@pytest.mark.long
def test_reads_prepared_sets(tmp_path, capsys):
    make(tmp_path / "videos", "train/b/x.mp4", "train/a/y.mp4", "val/b/z.mp4")
    write(tmp_path / "videos", train__csv="train/b/x.mp4 1\ntrain/a/y.mp4 0\n", val__csv="val/b/z.mp4 1\n")

    def prepared(source, out):
        assert prepare.main([str(source), str(tmp_path / out), "--workers", "1"]) == 0

    for split in ("train", "val"):
        prepared(tmp_path / "videos" / f"{split}.csv", f"set/{split}")
    prepared(tmp_path / "videos", "whole")
    write(tmp_path / "set", classes__txt="a\nb\n")
    for source in (tmp_path / "set", tmp_path / "whole", f"file://{tmp_path}/set"):
        train = find_labelled(source)
        val = find_labelled(source, "val", like=train)
        assert (train.classes, val.classes) == (("a", "b"), ("a", "b"))
        names = [path.partition("::")[2].partition("@")[0].rpartition("/")[2] for path in train.videos.paths]
        assert sorted(zip(names, train.labels, strict=True)) == [("x", 1), ("y", 0)]
        assert val.labels == (1,)
    assert "those of val serve" in find_labelled(tmp_path / "whole", "test").videos.notes[0]
    # of the set alone: its numbers
    assert find_labelled(tmp_path / "set" / "train").classes == ("0", "1")
    with pytest.raises(NoSplit, match="all val videos of .* are training videos"):
        find_labelled(tmp_path / "set" / "train", "val", like=find_labelled(tmp_path / "set" / "train"))
    with pytest.raises(ValueError, match="no prepared set at"):
        find_labelled(f"file://{tmp_path}/videos")


def test_splits_without_classes_are_no_classes(tmp_path):
    for name in ("train/1.mp4", "val/2.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no labels in .*: train and val have no folders of classes"):
        find_labelled(tmp_path)
