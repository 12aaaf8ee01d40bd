"""What the program never does: evaluate text, start a shell, unpickle what is not its own, leave a list's root."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from videomae.data import check as check_command
from videomae.data.dataset import find_videos
from videomae.data.decode import UnreadableVideo
from videomae.data.key_frames import find_key_frames
from videomae.data.labelled import find_labelled
from videomae.data.shards import StoredVideo, is_locator

FILES = [path for folder in ("kernels", "videomae", "train", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
_EVALUATES = {"eval", "exec", "compile", "__import__"}
_SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
_UNPICKLES = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"}
_UNPICKLES |= {"dill.load", "dill.loads", "joblib.load", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load"}
# words without which a file has none of these
_WORDS = re.compile(
    r"eval|exec|compile|__import__|system|popen|getoutput|spawn|shell|ickle|marshal|shelve|dill|joblib|yaml|\.load"
    r"|recv|_object"
)
# what is sent between processes is pickled
_RECEIVES = ("recv", "gather_object", "all_gather_object", "broadcast_object_list", "scatter_object_list")
_KNOWN = {
    # the index of a distributed checkpoint, by a list of the few classes that it may name
    ("train/moments.py", "class _Index"),
    # pipes from a process to its own children, and the processes of one run
    ("videomae/data/pool.py", "received"),
    ("videomae/data/worker.py", "received"),
    ("videomae/data/loader.py", "received"),
    ("train/distributed.py", "received"),
    ("train/shares.py", "received"),
}


def faults_of(text: str) -> Iterator[tuple[int, str]]:
    """Line and what is wrong there."""
    if _WORDS.search(text) is None:
        return
    tree = ast.parse(text)
    names = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {_name(base, names).replace("_Unpickler", "Unpickler") for base in node.bases}
            if bases & _UNPICKLES:
                yield node.lineno, f"class {node.name}"
        if not isinstance(node, ast.Call):
            continue
        called = _name(node.func, names)
        given = {word.arg: word.value for word in node.keywords}
        if called in _EVALUATES | _SHELLS | _UNPICKLES:
            yield node.lineno, called
        if called.rpartition(".")[2] in _RECEIVES:
            yield node.lineno, "received"
        if "shell" in given and not _is(given["shell"], False):
            yield node.lineno, f"{called} with a shell"
        if called == "torch.load" and not _is(given.get("weights_only"), True):
            yield node.lineno, "torch.load without weights_only=True"
        if called.endswith(".load") and "allow_pickle" in given and not _is(given["allow_pickle"], False):
            yield node.lineno, f"{called} with pickles"


def _imported(tree: ast.AST) -> dict[str, str]:
    """Full names of what is imported, by the names that it goes by."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                one.asname or one.name.split(".")[0]: one.name if one.asname else one.name.split(".")[0]
                for one in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return names


def _name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_is_evaluated_unpickled_or_given_to_a_shell():
    assert len(FILES) > 100
    found = {(str(path.relative_to(ROOT)), what) for path in FILES for _, what in faults_of(path.read_text())}
    assert found <= _KNOWN
    assert ("train/moments.py", "class _Index") in found


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "import os as o\no.system('x')",
        "from os import popen as p\np('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "from subprocess import run\nrun('x', shell=flag)",
        "import pickle\npickle.loads(b'')",
        "from pickle import load\nload(f)",
        "import pickle\nclass Mine(pickle._Unpickler): ...",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "link.recv()",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_it_would_be_seen(text):
    assert list(faults_of(text))


@pytest.mark.parametrize(
    "text",
    ["model.eval()", "import torch\ntorch.load('x', weights_only=True)", "import subprocess\nsubprocess.run(['x'])"],
)
def test_what_is_harmless_is_not_seen(text):
    assert not list(faults_of(text))


def list_of(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.csv").write_text("".join(f"{line}\n" for line in lines))
    return folder / "train.csv"


def test_a_list_without_a_root_may_name_any_file(tmp_path):
    listed = list_of(tmp_path / "lists", "/elsewhere/a.mp4 0", "../b.mp4 1")
    assert find_videos(listed).paths == ("/elsewhere/a.mp4", f"{tmp_path}/lists/../b.mp4")


def test_with_a_root_paths_start_there_and_stay(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    whole = (f"{root}/d/e.mp4 2", f"{tmp_path}/x/../videos/f.mp4 0")
    listed = list_of(tmp_path / "lists", "a.mp4 0", "c/../b 1", *whole, "s3://h/g.mp4 1", "~/h.mp4 1")
    inside = ("a.mp4", "b.mp4", "d/e.mp4", "f.mp4", "s3:/h/g.mp4", "~/h.mp4")
    for found in (find_videos(listed, root), find_labelled(listed.parent, root=root).videos):
        assert found.paths == tuple(f"{root}/{name}" for name in inside)
        assert found.labels == (0, 1, 2, 0, 1, 1)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.mp4",
        "..",
        "a/../../secret.mp4",
        "/etc/passwd.mp4",
        "{root}/../secret.mp4",
        "{root}x/a.mp4",
        "../videos/../a.mp4",
        "a.tar::/../../secret.tar::k@0",
    ],
)
def test_a_path_that_leaves_the_root_is_refused_with_its_line(tmp_path, path):
    root = tmp_path / "videos"
    root.mkdir()
    path = path.format(root=root)
    listed = list_of(tmp_path / "lists", "a.mp4 0", "", f"{path} 1")
    said = re.escape(f"{listed}:3: {path} lies outside of the root, {root}")
    for find in (find_videos, lambda *of: find_labelled(of[0], root=of[1])):
        with pytest.raises(ValueError, match=said):
            find(listed, root)


def test_boxes_of_videos_in_a_folder_stay_there(tmp_path):
    (tmp_path / "videos").mkdir()
    rows = ("path,second,x1,y1,x2,y2,label", "a.mp4,1,0,0,1,1,run", "../secret.mp4,1,0,0,1,1,run")
    listed = list_of(tmp_path / "lists", *rows)
    said = re.escape(f"{listed}:3: ../secret.mp4 lies outside of the root, {tmp_path}/videos")
    with pytest.raises(ValueError, match=said):
        find_key_frames(listed, videos=tmp_path / "videos")
    with pytest.raises(ValueError, match="are not in"):
        find_key_frames(listed)


def test_symbolic_links_are_the_users_own(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "link").symlink_to(tmp_path / "elsewhere")
    lines = ("a.mp4", f"{tmp_path}/root/b.mp4", f"{tmp_path}/disk/link/c.mp4", "link/../d.mp4")
    found = find_videos(list_of(tmp_path / "lists", *lines), tmp_path / "root")
    # behind a link, `..` would be another folder's
    assert found.paths[-1] == f"{tmp_path}/disk/d.mp4"
    assert found.paths[:2] == (f"{tmp_path}/disk/a.mp4", f"{tmp_path}/root/b.mp4")
    assert found.paths[2] == f"{tmp_path}/disk/link/c.mp4"


def test_a_root_is_a_folder_and_for_lists(tmp_path, capsys):
    listed = list_of(tmp_path, "a.mp4 0")
    (tmp_path / "classes" / "run").mkdir(parents=True)
    (tmp_path / "classes" / "run" / "v.mp4").touch()
    with pytest.raises(ValueError, match="the root of a list must be a folder; nowhere is none"):
        find_videos(listed, "nowhere")
    for find in (find_videos, lambda source, root: find_labelled(source, root=root)):
        for source in (tmp_path / "classes", "s3://bucket/set"):
            with pytest.raises(ValueError, match="a root is for lists"):
                find(source, tmp_path)
    assert check_command.main([str(list_of(tmp_path, "../a.mp4 0")), "--root", str(tmp_path)]) == 2
    assert f"train.csv:1: ../a.mp4 lies outside of the root, {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["../../secret", "a/../b", "/etc/secret", "", "a."])
def test_a_locator_in_a_list_stays_in_its_set(tmp_path, key):
    (tmp_path / "files").mkdir()
    (tmp_path.parent / "secret.json").write_text("{}")
    assert is_locator(locator := f"{tmp_path}/files::{key}")
    with pytest.raises(UnreadableVideo, match="no video of a prepared set has such a name"):
        StoredVideo(locator)
