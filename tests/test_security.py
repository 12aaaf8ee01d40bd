"""What the program never does: evaluate text, start a shell, unpickle what is not its own."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

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
