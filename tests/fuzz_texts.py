"""Fuzzing's targets that are text: lists, classes, annotations and boxes."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz import Target
from tests.fuzz_inputs import as_bytes, changed_json, changed_text, one_changed, words
from videomae.data import annotated_boxes, annotations, ava
from videomae.data.box_rows import read_rows
from videomae.data.dataset import find_videos
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.labelled import find_labelled

_LABELLED = "a.mp4 0\nb/c d.mp4 1\ne 2\n"


class Lists(Target):
    """A list, and the opening of what it names, as far as that is in its folder."""

    name, share = "lists", 17

    def inputs(self) -> st.SearchStrategy[bytes]:
        return st.sampled_from((_LABELLED, "a.mp4\nb c.avi\n", "x/a 0 -1\nb 0 -1\n", "a 1 300 4\n")).flatmap(
            changed_text
        )

    def put(self, value: bytes) -> None:
        self.write({}, {"train.csv": value})

    def parse(self, value: bytes) -> None:
        found = find_videos(self.root / "train.csv")
        with contextlib.suppress(ValueError):
            # and here the guard looks whether one left the folder
            for path in find_videos(self.root / "train.csv", self.root).paths[:3]:
                with contextlib.suppress(UnreadableVideo):
                    Video(path)
        assert len(found.fingerprint) == 16
        for path in found.paths[:3]:
            # a list may name any place in full, and links may lead anywhere: only what is read of it is looked at
            if path.startswith(f"{self.root}/") and ".." not in path:
                with contextlib.suppress(UnreadableVideo):
                    Video(path)


class Labelled(Target):
    """Lists, classes' names and class folders of a data set."""

    name, share = "labelled", 5

    def inputs(self) -> st.SearchStrategy[tuple[dict, list[str]]]:
        files = {name: changed_text(text) for name, text in self._texts.items()}
        plain = words.map(lambda name: name.replace("/", "").replace("\0", "")[:200]).filter(
            lambda name: name not in ("", ".", "..") and name.isprintable()
        )
        return st.tuples(one_changed(files), st.lists(plain, max_size=3))

    _texts = {"train.csv": _LABELLED, "val.csv": "f.mp4 1\ng.mp4 2\n", "classes.txt": "jump\nrun\nwalk fast\n"}

    def put(self, value: tuple[dict, list[str]]) -> None:
        self.write({name: as_bytes(text) for name, text in self._texts.items()}, value[0])
        for split in ("classes/train", "classes/val"):
            for name in ("jump", *value[1]):
                folder = self.root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{name[:50]}.mp4").touch()

    def parse(self, value: tuple[dict, list[str]]) -> None:
        faults = []
        for source in (self.root, self.root / "classes"):
            try:
                training = find_labelled(source)
                find_labelled(source, "val", like=training)
            except ValueError as error:
                faults.append(error)
        if faults:
            raise faults[0]


class Annotations(Target):
    """The whole command over the official files of the four data sets."""

    name, share = "annotations", 6
    _kinetics = "label,youtube_id,time_start,time_end,split\njump,abc,1,11,train\nrun fast,d-e,20.0,30,train\n"
    _sets = {
        "kinetics": {"train.csv": _kinetics, "val.csv": _kinetics.replace("abc", "xyz")},
        "ssv2": {
            "labels.json": {"Doing [x]": "0", "Doing y": "1"},
            "train.json": [{"id": "1", "template": "Doing [x]"}, {"id": "2", "template": "Doing y"}],
            "validation.json": [{"id": "3", "template": "Doing y"}],
        },
        "ucf101": {
            "classInd.txt": "1 Jump\n2 Run\n",
            "trainlist01.txt": "Jump/v_a.avi 1\nRun/v_b.avi 2\n",
            "testlist01.txt": "Jump/v_c.avi\n",
        },
        "hmdb51": {"jump_test_split1.txt": "a.avi 1\nb.avi 2\n", "run_test_split1.txt": "c.avi 1\nd.avi 0\n"},
    }

    def inputs(self) -> st.SearchStrategy[tuple[str, dict]]:
        def changed(name: str) -> st.SearchStrategy[tuple[str, dict]]:
            each = {
                file: changed_text(text) if isinstance(text, str) else changed_json(text)
                for file, text in self._sets[name].items()
            }
            return st.tuples(st.just(name), one_changed(each))

        return st.sampled_from(sorted(self._sets)).flatmap(changed)

    def put(self, value: tuple[str, dict]) -> None:
        texts = self._sets[value[0]]
        originals = {
            file: as_bytes(text if isinstance(text, str) else json.dumps(text)) for file, text in texts.items()
        }
        self.write(
            {f"in/{file}": data for file, data in originals.items()}, {f"in/{k}": v for k, v in value[1].items()}
        )
        for file in ("abc_000001_000011", "xyz", "1", "2", "Jump/v_a", "Run/v_b", "jump/a", "c"):
            path = self.root / "videos" / f"{file}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def parse(self, value: tuple[str, dict]) -> None:
        folders = [str(self.root / name) for name in ("in", "videos", "out")]
        said, blamed = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(blamed):
            code = annotations.main([value[0], *folders[:2], "--out", folders[2]])
        if code:
            assert code == 2
            assert blamed.getvalue().count("\n") == 1
            assert not Path(folders[2]).exists()
            raise ValueError(blamed.getvalue())
        for split in ("train", "val", "test"):
            if (self.root / "out" / f"{split}.csv").exists():
                assert find_videos(self.root / "out" / f"{split}.csv").labels is not None


_BOX = "0902,0.077,0.151,0.283,0.811"
_NAMED = "path,second,x1,y1,x2,y2,label,score\na.mp4,1.5,0,0,0.5,0.5,run,0.25\nb.mp4,2,0.1,0.1,1,1,jump,1\n"


class Rows(Target):
    """The csv of boxes, with and without names of columns."""

    name, share = "box rows", 14
    _originals = (_NAMED, f"vid,{_BOX},80,1\nvid,{_BOX},9,1\n", f"vid,{_BOX},12\n", _NAMED.replace("run", "3").lower())

    def inputs(self) -> st.SearchStrategy[tuple]:
        classes = st.sampled_from((None, ("jump", "run"), {"jump": 4, "run": 9}))
        text = st.sampled_from(self._originals).flatmap(changed_text)
        return st.tuples(text, st.sampled_from((None, True, False)), classes)

    def put(self, value: tuple) -> None:
        self.write({}, {"boxes.csv": value[0]})

    def parse(self, value: tuple) -> None:
        rows = read_rows(self.root / "boxes.csv", score=value[1], classes=value[2])
        assert len(rows) > 0
        assert rows.label.min() >= 0


class Boxes(Target):
    """Annotated and detected boxes, of AVA's files and of one's own."""

    name, share = "ava", 9
    _images = [{"id": 1, "movie": "vid", "timestamp": 902, "height": 480, "width": 640}]
    _texts = {
        "ava_val_v2.2.csv": f"vid,{_BOX},80,1\nvid,{_BOX},9,1\n",
        "ava_val_excluded_timestamps_v2.2.csv": "vid,0903\n",
        "ava_action_list_v2.2.pbtxt": 'label {\n name: "run"\n label_id: 80\n}\nlabel {\n name: "jump"\n id: 9\n}\n',
        "ava_file_names_trainval_v2.1.txt": "other.mkv\nvid.mkv\n",
        "own/val.csv": _NAMED.replace(",score", "").replace(",0.25", "").replace(",1\n", "\n"),
        "own/classes.txt": "jump\nrun\n",
        "found.csv": f"vid,{_BOX},12,0.9\n",
        "named.csv": _NAMED,
    }
    _jsons = {
        "ava_val_v2.2_min.json": {"images": _images},
        "found.json": [{"image_id": 1, "bbox": [10.0, 20, 30.5, 40], "score": 0.9}],
    }

    def inputs(self) -> st.SearchStrategy[dict]:
        texts = {name: changed_text(text) for name, text in self._texts.items()}
        return one_changed(texts | {name: changed_json(document) for name, document in self._jsons.items()})

    def put(self, value: dict) -> None:
        originals = {name: as_bytes(text) for name, text in self._texts.items()}
        self.write(originals | {name: as_bytes(json.dumps(one)) for name, one in self._jsons.items()}, value)

    def parse(self, value: dict) -> None:
        found = annotated_boxes.read_annotated(self.root, "val")
        own = annotated_boxes.read_annotated(self.root / "own", "val")
        for name, annotated in (("found.json", found), ("found.csv", found), ("named.csv", own)):
            boxes = annotated_boxes.read_boxes(self.root / name, annotated, 0.1)
            assert len(boxes.videos) == len(boxes.seconds) == len(boxes.pixels) == len(boxes.rows)
        if found.ava is not None:
            ava.read_images(dataclasses.replace(found.ava, images=None))


TEXTS: tuple[Callable[..., Target], ...] = (Lists, Labelled, Annotations, Rows, Boxes)
