"""Sections of a run: what is told first, results, trouble, how to repeat it."""

import json
import re

import pytest

from tests.train.run_folders import lines, record, run_folder, troubled_folder
from train import report_sections as sections
from train.report_run import read_run


def plain(html):
    return " ".join(re.sub("<[^>]*>", " ", html).split())


def test_tells_first_what_a_run_came_to(tmp_path):
    run_folder(tmp_path / "a")
    values = [{"step": 50, "val_top1": 70.0, "val_loss": 2}, {"step": 100, "val_top1": 60.5, "val_loss": 1}]
    lines(tmp_path / "a" / "evaluations.jsonl", values)
    told = {name: (value, note) for name, value, note in sections.tiles(read_run(tmp_path / "a"))}
    assert told["Loss"] == ("0.01", "0.1 at step 10")
    assert told["Validation, top-1"] == ("60.50 %", "best 70.00 % at step 50")
    assert told["Speed"] == ("400.2 clips/s", "median")
    assert told["Time"] == ("1 min 40 s", "")
    assert told["Device"] == ("CPU", "float32")


def test_says_what_is_wrong_with_a_run_before_all_else(tmp_path):
    said = plain(sections.about(read_run(troubled_folder(tmp_path / "a")), 4e9))
    assert "stopped at step 90 of 100 (90%)" in said
    assert "ends in half a line" in said
    assert "2 damaged lines" in said
    assert "waited" not in said
    run_folder(tmp_path / "b")
    values = [{"step": step, "data_wait": 0.4} for step in (1, 2)]
    lines(tmp_path / "b" / "metrics.jsonl", values)
    assert "waited for data 40% of its time" in plain(sections.about(read_run(tmp_path / "b"), 0.0))


def test_lists_skipped_files_and_steps_not_finite(tmp_path):
    made = sections.trouble(read_run(troubled_folder(tmp_path / "a")))
    said = plain(made)
    assert "3 clips of 2 files could not be read" in said
    assert "/clips/&lt;img src=x&gt;.mp4 2 5 &lt;b&gt;moov atom not found&lt;/b&gt;" in said
    assert "1 step was not finite" in said
    assert "38 nan inf 2 clips /clips/a&amp;b.mp4 c.mp4" in said
    assert "no clip was skipped" in sections.trouble(read_run(run_folder(tmp_path / "b")))


def test_gives_the_command_and_what_keeps_it_from_being_the_same(tmp_path):
    said = plain(sections.repeat(read_run(run_folder(tmp_path / "a"))))
    assert said.startswith("python -m train.pretrain demo --data &#x27;my clips&#x27; --out runs/a With the code at")
    assert "f1e297c87d1dc318db5eb13774bcdd0161cb8735 , which had changes that were not committed" in said
    clean = sections.repeat(read_run(run_folder(tmp_path / "b", commit="abc")))
    assert "abc" in clean
    assert "not committed" not in clean


def test_shows_parts_processes_and_versions(tmp_path):
    said = plain(sections.machine(read_run(troubled_folder(tmp_path / "a"))))
    assert "torch 2.13.0+cpu" in said
    assert "40 2026-11-23T07:18:56+0000 vm A GPU" in said
    processes = [{"rank": rank, "host": "n", "device": f"cuda:{rank}", "gpu": "H200"} for rank in (0, 1)]
    plan = {"steps": 1, "device": "cuda"}
    run = read_run(run_folder(tmp_path / "b", processes=processes, gpu="H200", plan=plan))
    said = plain(sections.machine(run))
    assert "device 2 x H200" in said
    assert "1 n cuda:1 H200" in said


def result_folder(path, **result):
    path.mkdir()
    made = {**record(), "config": {"views": "1x1"}, "command": ["/x/train/evaluate.py", "demo"], **result}
    (path / "result.json").write_text(json.dumps(made))
    return read_run(path)


def test_shows_an_evaluation(tmp_path):
    lost = [{"path": "/a.mp4", "reason": "no frames"}]
    card = {"views": "5x3", "mean": [0.48145764705]}
    run = result_folder(tmp_path / "a", top1=91.66667, top5=100.0, unreadable_videos=lost, protocol=card, weights="w")
    (tmp_path / "a" / "per_class.csv").write_text("label,class,top1\n0,<up>,50.00\n")
    assert sections.scores_of(run.result) == [("Top-1", "91.67 %"), ("Top-5", "100.00 %")]
    said = plain(sections.results(read_run(tmp_path / "a")))
    assert "views 5x3 mean 0.48146" in said
    assert "0 &lt;up&gt; 50.00" in said
    assert "1 clip of 1 file could not be read" in plain(sections.trouble(run))
    assert sections.what(run) == "evaluation"
    assert run.repeat() == "python -m train.evaluate demo"


def test_shows_a_probe_and_a_detectors_test(tmp_path):
    split = {"videos": 504, "list": "4bb8"}
    accuracy = {"knn": {"top1": 88.75, "top5": 100.0}}
    weights = {"read": "runs/a", "random": True}
    run = result_folder(
        tmp_path / "a", accuracy=accuracy, commonest_class=8.3, train=split, test=split, weights=weights
    )
    assert sections.scores_of(run.result) == [
        ("knn, top1", "88.75 %"),
        ("knn, top5", "100.00 %"),
        ("Always the commonest class", "8.30 %"),
    ]
    said = plain(sections.results(run))
    assert "an untrained encoder of the size of runs/a" in said
    assert "videos 504 504" in said
    run = result_folder(tmp_path / "b", mAP=0.9026, per_group={"pose": 0.5, "objects": 0.25})
    assert sections.scores_of(run.result) == [("Frame mAP", "90.26 %")]
    assert "pose 50.00 objects 25.00" in plain(sections.results(run))


def test_an_evaluation_that_was_stopped_has_no_result(tmp_path):
    (tmp_path / "protocol.json").write_text(json.dumps({"card": {}, **record(command=["/x/train/evaluate.py"])}))
    run = read_run(tmp_path)
    assert run.state(0.0) == ("stopped", "there is no result yet")
    assert sections.results(run) == ""


@pytest.mark.parametrize("damage", [{"plan": [1]}, {"versions": None}, {"command": None}, {"processes": {"a": 1}}])
def test_does_without_what_an_older_record_lacks(tmp_path, damage):
    run = read_run(run_folder(tmp_path / "a", **damage))
    assert ("Loss", "0.01", "0.1 at step 10") in sections.tiles(run)
    for section in (sections.changed, sections.repeat, sections.machine):
        assert isinstance(section(run), str)
    assert "vit_mini" in sections.settings(run)  # what is not damaged is still told


@pytest.mark.parametrize(
    "damage",
    [
        {"processes": 3},
        {"processes": [1, 2]},
        {"plan": {"steps": 100, "peak_bytes": None}},
        {"resumed": [{"step": None, "started": 5}]},
        {"resumed": [{"step": "x"}]},
    ],
    ids=str,
)
def test_a_record_of_odd_values_is_shown_all_the_same(tmp_path, damage):
    run_folder(tmp_path / "run", **damage)
    found = read_run(tmp_path / "run")
    assert sections.machine(found)
    assert sections.tiles(found)
