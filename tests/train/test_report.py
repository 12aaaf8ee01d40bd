"""The command: which runs, where the page goes, one-line errors, and a run of a million lines."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.train.run_folders import STARTED, line, run_folder, troubled_folder
from train.report import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_writes_the_page_of_the_newest_run_into_its_folder(here, capsys):
    run_folder(here / "runs" / "old")
    os.utime(here / "runs" / "old" / "metrics.jsonl", (1, 1))
    os.utime(here / "runs" / "old" / "config.json", (1, 1))
    run_folder(here / "runs" / "new")
    assert main([]) == 0
    html = (here / "runs" / "new" / "report.html").read_text()
    assert "<title>new</title>" in html
    assert "python -m train.report<" in html
    told = capsys.readouterr().out
    assert re.fullmatch(r"runs      new  finished, 100 steps\npage      runs/new/report\.html, \d+ kB\n", told)


def test_writes_the_page_of_several_beside_them_or_where_it_is_told(here):
    for name in ("a", "b"):
        run_folder(here / "elsewhere" / name)
    assert main(["elsewhere/a", "elsewhere/b"]) == 0
    assert "<title>2 runs</title>" in (here / "runs" / "report.html").read_text()
    # the same one twice is one
    assert main(["elsewhere/a", "elsewhere/../elsewhere/a", "--out", "new/page.html"]) == 0
    assert "<title>a</title>" in (here / "new" / "page.html").read_text()
    assert main(["elsewhere/b", "--out", "new"]) == 0
    assert "<title>b</title>" in (here / "new" / "report.html").read_text()


def test_writes_names_that_are_no_utf8_by_their_codes(here):
    assert main([str(troubled_folder(here / "caf\udce9"))]) == 0
    html = (here / "caf\udce9" / "report.html").read_text()
    assert "<title>caf\\udce9</title>" in html
    assert "/clips/\\udcff.mp4" in html


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no run in runs/"),
        (["absent"], "absent: there is no such folder"),
        (["empty"], "empty is no run"),
        (["a", "--out", ""], "out must not be empty"),
    ],
)
def test_refuses_in_one_line(here, capsys, arguments, said):
    (here / "empty").mkdir()
    run_folder(here / "a")
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m train.report: error: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.long
def test_a_million_lines_take_ten_seconds_at_most(here):
    run_folder(here / "a", [], plan={"steps": 1_000_000, "device": "cpu"})
    told = json.dumps(line(1, loss=-7)).replace('"step": 1,', '"step": %d,').replace("-7", "%g")
    told = told.replace(str(STARTED + 1), f"{STARTED}") + "\n"
    losses = (9.5 if step == 654_321 else 0.3 + step * 7919 % 99991 / 1e6 for step in range(1, 1_000_001))
    with (here / "a" / "metrics.jsonl").open("w") as file:
        file.writelines(told % (step, loss) for step, loss in enumerate(losses, 1))
    before = os.times()
    subprocess.run([sys.executable, "-m", "train.report", "a"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = os.times()
    # of a core, its imports too: others may have the machine
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 10
    html = (here / "a" / "report.html").read_text()
    assert "finished, 1,000,000 steps" in html
    assert 'to 9.5" ' in html
    assert len(html) < 400_000
