"""Fuzzing's targets of the commands themselves, up to where their work would begin, and of URLs."""

import contextlib
import importlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import strategies as st

from tests.fuzz import Target
from tests.fuzz_inputs import values, words
from tests.train.classifiers import DENSE, tiny_classifier
from tests.videomae.data.test_shards import make_set
from tests.videos import moving_frames, write_video
from videomae.data import shards, storage
from videomae.data.dataset import find_videos
from videomae.data.labelled import find_labelled

# of each command: the functions at which its work begins, and right ways to call it
_VERBS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "videomae.data.check": (
        ("check_videos",),
        ("list.csv --workers 1", "videos --json found.json", "list.csv --root ."),
    ),
    "videomae.data.prepare": (
        ("estimate", "_work"),
        ("videos out", "list.csv out --stride 2 --codec jpeg --shard 0/2"),
    ),
    "videomae.data.annotations": ((), ("hmdb51 official videos --out lists --split 1 --strict",)),
    "videomae.weights": ((), ("w.safetensors", "w.safetensors official.pth --to official", "w.safetensors hf --to hf")),
    "train.predict": (
        ("_predictions",),
        ("videos/a.mp4 --weights w.safetensors", "videos --detector w.safetensors --boxes list.csv --device cpu"),
    ),
    "train.features": (("extract",), ("list.csv --weights w.safetensors --out features --workers 0",)),
    "train.plan": ((), ("demo --gpus 8 64 --gpu h200 --network 50", "demo --gpu-memory 80 --batch-size 64")),
}


class Began(BaseException):
    """The command line was accepted."""


def _begin(*_: object, **__: object) -> None:
    raise Began


class Verbs(Target):
    """The whole command, in a folder of its own, until the work begins: done, or exit code 2 and one line of why."""

    name, share, refusals = "verbs", 4, (SystemExit,)

    def __init__(self, root: Path, outside: Path) -> None:
        super().__init__(root, outside)
        tiny_classifier(outside / "w.safetensors", sampling=DENSE)
        write_video(outside / "a.mp4", moving_frames(3))
        files = {name: (outside / name).read_bytes() for name in ("w.safetensors", "a.mp4")}
        self._files = {
            "w.safetensors": files["w.safetensors"],
            "videos/a.mp4": files["a.mp4"],
            "videos/b.mp4": files["a.mp4"],
            "list.csv": b"videos/a.mp4 0\nvideos/b.mp4 1\n",
            "official/jump_test_split1.txt": b"a.avi 1\nb.avi 2\n",
        }
        self._mains = {name: importlib.import_module(name).main for name in _VERBS}
        self._flags = {name: self._flags_of(main) for name, main in self._mains.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # what torch imports when it is first used makes a folder
            self._mains["train.plan"](["demo", "--gpus", "8", "--gpu", "h200"])

    def _flags_of(self, main: Callable[[list[str]], int]) -> tuple[str, ...]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main(["--help"])
        flags = tuple(sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", said.getvalue()))))
        assert len(flags) >= 2
        return flags

    def inputs(self) -> st.SearchStrategy[tuple[str, list[str]]]:
        return st.sampled_from(tuple(_VERBS)).flatmap(
            lambda verb: st.tuples(st.just(verb), _changed(_VERBS[verb][1], self._flags[verb]))
        )

    def put(self, value: tuple[str, list[str]]) -> None:
        self.write(self._files, {})

    def parse(self, value: tuple[str, list[str]]) -> None:
        verb, arguments = value
        said, blamed, before = io.StringIO(), io.StringIO(), os.getcwd()
        module = importlib.import_module(verb)
        with contextlib.ExitStack() as stack:
            for name in _VERBS[verb][0]:
                stack.enter_context(mock.patch.object(module, name, _begin))
            stack.callback(os.chdir, before)
            os.chdir(self.root)
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(blamed))
            try:
                code = self._mains[verb](arguments)
            except Began:
                code = 0
            except SystemExit as end:
                code = end.code or 0
        assert code in (0, 1, 2), code
        if code:
            *_, last = blamed.getvalue().splitlines()
            assert verb in last or code == 1, last
            assert "Traceback" not in blamed.getvalue()
            raise SystemExit(code)


@st.composite
def _changed(draw: Callable[..., Any], right: tuple[str, ...], flags: tuple[str, ...]) -> list[str]:
    """A right command line with up to three words replaced, dropped or added."""
    arguments = draw(st.sampled_from(right)).split()
    word = st.one_of(
        words, values.map(str), st.sampled_from(flags), st.sampled_from(("videos", "list.csv", "out", "2", "0", "cpu"))
    )
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(arguments)))
        kind = draw(st.sampled_from(("replace", "replace", "drop", "flag", "join", "word")))
        if kind == "flag":
            arguments[at:at] = [draw(st.sampled_from(flags)), draw(word)]
        elif kind == "join":
            arguments.insert(at, f"{draw(st.sampled_from(flags))}={draw(word)}")
        elif kind == "word":
            arguments.insert(at, draw(word))
        else:
            arguments[at : at + 1] = [draw(word)] if kind == "replace" else []
    return [_kept(one) for one in arguments]


def _kept(word: str) -> str:
    """The word, if it stays in the folder: users may name any file, but the guard could not tell."""
    leads = any(part.startswith(("/", "~")) or ".." in part.split("/") for part in word.split("="))
    return "a" if leads else word


_SCHEMES = ("s3", "s3a", "gs", "gcs", "http", "https", "S3", "memory", "local", "", "s3::memory", "nosuch", "\0", "s3 ")
_HOSTS = (
    "",
    "set",
    "bucket",
    "h:80",
    "h:port",
    "u:p@h",
    "[::1]",
    "[::1",
    "h:99999999",
    "ä.example",
    "h?x",
    "h#x",
    "%00",
)


class Urls(Target):
    """URLs of data: parsed by us and by fsspec, and refused where there is nothing, without a connection."""

    name, share = "urls", 4

    def __init__(self, root: Path, outside: Path) -> None:
        super().__init__(root, outside)
        sources = {f"c{k}/v.mp4": write_video(outside / f"{k}.mp4", moving_frames(3, seed=k)) for k in range(2)}
        made = make_set(outside / "made", sources, [1, 0], layout="shards", codec="jpeg")
        self._made = {str(path.relative_to(made)): path.read_bytes() for path in made.rglob("*") if path.is_file()}

    def inputs(self) -> st.SearchStrategy[tuple[str, str, str]]:
        host = st.one_of(st.sampled_from(_HOSTS), words, st.just("set"))
        path = st.lists(st.one_of(words, st.sampled_from(("set", "train", "*", "?", "[a]", "{a,b}"))), max_size=3)
        scheme = st.one_of(st.sampled_from(_SCHEMES), st.sampled_from(("memory", "s3", "https")))
        url = st.builds(lambda a, b, c: f"{a}://{'/'.join((b, *c))}", scheme, host, path)
        return st.tuples(url, words, st.sampled_from(("train", "val")))

    def put(self, value: tuple[str, str, str]) -> None:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        for name, data in self._made.items():
            MemoryFileSystem().pipe_file(f"/set/{name}", data)
        storage._objects.clear()
        shards._stored.cache_clear()

    def parse(self, value: tuple[str, str, str]) -> None:
        url, name, split = value
        assert storage.is_url(storage.join(url, name))
        calls: tuple[Callable[[], Any], ...] = (
            lambda: find_videos(url),
            lambda: find_labelled(url, split),
            lambda: storage.read_range(storage.join(url, name), 0, 9),
        )
        faults = []
        with mock.patch.object(storage, "_PAUSES", ()):
            for call in calls:
                try:
                    call()
                except (ValueError, OSError) as error:
                    faults.append(error)
        if len(faults) == len(calls):
            raise ValueError(str(faults[0])) from faults[0]


VERBS: tuple[Callable[..., Target], ...] = (Verbs, Urls)
