"""What the README claims and a machine can check: files, targets, and its Python; see test_docs.py for the rest."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_file_map_is_complete_and_true():
    table = README.split("## Files")[1].split("## ")[0]
    listed = set(re.findall(r"^\| `([^`]+)`", table, re.M))
    folders = ("kernels", "videomae", "train", "bench")
    there = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    there = {path for path in there if not path.endswith("__init__.py")} | {"bench/NOTES.md"}
    assert listed == there


def test_the_road_leads_through_files_that_exist():
    road = README.split("## The road of one clip")[1].split("## ")[0]
    for path in re.findall(r"`([a-z_/]+\.py)`", road):
        assert (ROOT / path).is_file(), path


def test_every_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "test-all", "bench", "lint"} <= targets
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M):
        assert target in targets, target


@pytest.mark.long
def test_its_python_runs():
    code = README.split("## From Python")[1].split("```python")[1].split("```")[0]
    # all but the weights, which a reader brings along
    code, count = re.subn(r"^report = .*?^\)|^report = [^\n]*$", "", code, flags=re.S | re.M)
    assert count == 1
    scope: dict = {}
    exec(code, scope)
    assert scope["pred"].shape == (2, 1408, 1536)
    assert scope["features"].shape == (2, 1568, 768)
    assert scope["loss"].ndim == 0


def test_the_measure_of_boxes_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "detection.md").read_text()
    code = next(part for part in page.split("```python")[1:] if "frame_map" in part).split("```")[0]
    box = "video,0902,0.1,0.1,0.5,0.9,12"
    (tmp_path / "ava_val_v2.2.csv").write_text(f"{box},0\n")
    (tmp_path / "detections.csv").write_text(f"{box},0.5\n")
    *lines, last = code.strip().splitlines()
    scope: dict = {}
    exec("\n".join(lines), scope)
    assert eval(last, scope) == 1


def test_it_shows_a_picture_and_real_output():
    assert (ROOT / "docs" / "demo.png").stat().st_size > 10_000
    assert not re.search(r"\b[A-Z]+_(OUTPUT|RESULT)\b", README)
