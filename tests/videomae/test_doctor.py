"""What the machine has: every part is looked at, whatever is missing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from videomae import doctor

ROOT = Path(__file__).resolve().parents[2]

# the command with modules that cannot be found, or that break when they are imported
HIDDEN = """
import runpy, sys
hidden, broken = {hidden!r}, {broken!r}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        if name in broken:
            raise OSError("libcudart.so.13: cannot open shared object file\\nmore")
sys.meta_path.insert(0, Finder())
sys.argv = ["doctor", *{arguments!r}]
runpy.run_module("videomae.doctor", run_name="__main__", alter_sys=True)
"""


def run(*arguments, hidden=(), broken=()):
    code = HIDDEN.format(hidden=hidden, broken=broken, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr
    return done


def test_knows_every_requirement_and_extra():
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)[1]
    names = set(re.findall(r'^ +"([\w-]+)', needed, re.M))
    assert {each.distribution for each in doctor.PACKAGES if not each.extra} == names
    extras = re.search(r"^\[project.optional-dependencies\](.*?)^\[", text, re.S | re.M)[1]
    found = dict(re.findall(r'^([\w-]+) = \["([\w-]+)', extras, re.M))
    found.pop("dev")
    assert {each.extra: each.distribution for each in doctor.PACKAGES if each.extra} == found


def test_lines_are_aligned():
    report = doctor.Report({"one": {"a": "x", "longer name": "y"}}, warnings=["w"], stops=["s"])
    assert str(report).splitlines() == [
        "one",
        "  a            x",
        "  longer name  y",
        "",
        "warning: w",
        "cannot train: s",
        "pre-training cannot run here",
    ]


@pytest.mark.long
def test_pre_training_can_run_here():
    done = run("--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert done.stderr == ""
    assert found["can_train"]
    assert found["stops"] == []
    assert list(found["sections"]) == ["versions", "devices", "attention", "kernels", "videos", "machine"]
    assert "failed" not in {key for section in found["sections"].values() for key in section}
    assert found["sections"]["attention"]["sdpa"] == "usable"


@pytest.mark.long
@pytest.mark.parametrize(
    ("hidden", "broken", "code", "says"),
    [
        (("decord", "tensorboard", "matplotlib", "huggingface_hub"), (), 0, "decord +not installed"),
        (("torch", "numpy", "tyro", "PIL", "triton", "pandas"), (), 1, "cannot train: torch "),
        ((), ("torch",), 1, "cannot train: torch does not import .everything.: pip install"),
    ],
    ids=["spared", "most", "broken"],
)
def test_says_what_is_missing_and_never_breaks(hidden, broken, code, says):
    done = run(hidden=hidden, broken=broken)
    assert done.returncode == code
    assert re.search(says, done.stdout)
    assert done.stdout.splitlines()[-1] == f"pre-training {'can' if code == 0 else 'cannot'} run here"
    assert "pip install" in done.stdout


@pytest.mark.long
def test_without_torch_the_package_says_where_to_ask():
    code = HIDDEN.split("sys.argv")[0].format(hidden=("torch",), broken=()) + "import videomae; videomae.classifier"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: videomae.classifier: No module named 'torch'; python -m"
    )


def test_tells_a_package_that_is_absent_from_one_that_lacks_another(monkeypatch):
    lacks = {"decord": "numpy", "torchcodec": "torchcodec"}
    error = {name: ModuleNotFoundError(f"No module named {other!r}", name=other) for name, other in lacks.items()}
    monkeypatch.setattr(doctor, "_tried", lambda module: error.get(module, ImportError("not here")))
    report = doctor.examine()
    assert report.sections["videos"]["decord"] == "ModuleNotFoundError: No module named 'numpy'"
    assert report.sections["videos"]["torchcodec"] == "not installed"
