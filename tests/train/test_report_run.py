"""What is read of a run folder: whole lines, state, time, what differs, the command."""

import json
import math
import os
import shlex

import pytest

from tests.train.run_folders import STARTED, line, lines, record, run_folder, troubled_folder
from train.cli import flat, parse
from train.finetune_recipes import FINETUNE
from train.recipes import PRETRAIN
from train.report_run import newest_run, read_run, read_series, seconds_text


def test_reads_numbers_by_step_with_nan_where_a_line_has_none(tmp_path):
    path = tmp_path / "m.jsonl"
    lines(path, [{"step": 2, "a": 1, "b": None}, {"step": 4, "a": math.inf, "c": "x"}, {"step": 3, "a": 2.5, "c": 7.0}])
    series = read_series(path)
    # in the order of their steps
    assert series.steps.tolist() == [2, 3, 4]
    assert series.values["a"].tolist() == [1, 2.5, math.inf]
    assert [steps.tolist() for steps in series.finite("a")] == [[2, 3], [1, 2.5]]
    assert series.finite("c")[1].tolist() == [7.0]
    assert series.last("a") == 2.5
    assert series.last("b") is None
    assert series.last("absent") is None


def test_leaves_out_what_is_damaged_and_says_so(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1}\n{"st\xff\n[2]\n{"a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    series = read_series(path)
    assert series.steps.tolist() == [1, 3]
    assert series.damaged == 3
    assert series.is_torn
    whole = read_series(tmp_path / "absent.jsonl")
    assert (len(whole.steps), whole.damaged, whole.is_torn) == (0, 0, False)


def test_reads_more_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("train.report_run._CHUNK", 200)
    lines(tmp_path / "m.jsonl", ({"step": step, "even" if step % 2 == 0 else "odd": step} for step in range(1, 101)))
    series = read_series(tmp_path / "m.jsonl")
    assert series.steps.tolist() == list(range(1, 101))
    assert series.finite("even")[1].tolist() == list(range(2, 101, 2))


def test_tells_how_far_a_run_is(tmp_path):
    def state(now, **changes):
        (tmp_path / "a" / "config.json").write_text(json.dumps(record(**changes)))
        return read_run(tmp_path / "a").state(STARTED + now)

    run_folder(tmp_path / "a", range(10, 61, 10))
    assert state(70) == ("going", "still going when this page was made: step 60 of 100 (60%)")
    assert state(7260) == (
        "stopped",
        "stopped at step 60 of 100 (60%); the last line is 2 h 0 min older than this page",
    )
    assert state(70, plan={"steps": 60}) == ("finished", "finished, 60 steps")
    # a resumed run has the plan of its last part
    assert state(70, resumed=[record(plan={"steps": 60})]).name == "finished"
    (tmp_path / "a" / "metrics.jsonl").unlink()
    assert state(70) == ("empty", "no step of 100 is reported yet")


def test_a_slow_run_is_not_taken_for_stopped(tmp_path):
    run_folder(tmp_path / "a")
    lines(tmp_path / "a" / "metrics.jsonl", [line(step, time=STARTED + 600 * step) for step in (1, 2, 3)])
    run = read_run(tmp_path / "a")
    assert run.state(STARTED + 1800 + 5900).name == "going"
    assert run.state(STARTED + 1800 + 6100).name == "stopped"


def test_counts_the_time_of_each_part(tmp_path):
    # 40 s up to step 40; the second part began an hour after the first
    assert read_run(troubled_folder(tmp_path / "a")).seconds == pytest.approx(40 + 90)
    assert read_run(run_folder(tmp_path / "b")).seconds == pytest.approx(100)


def test_tells_what_differs_from_the_recipe(tmp_path):
    run = read_run(run_folder(tmp_path / "a", config={"mask.ratio": 0.9, "augment.scales": [1, 0.5], "gone": 1}))
    recipe = flat(PRETRAIN["demo"]())
    assert run.changed == {
        "mask.ratio": (0.9, recipe["mask.ratio"]),
        "augment.scales": ([1, 0.5], recipe["augment.scales"]),
        "gone": (1, None),
    }
    assert read_run(run_folder(tmp_path / "b", config={"recipe": "a-new-one"})).changed is None


def test_gives_the_command_as_it_was_typed(tmp_path):
    run = read_run(run_folder(tmp_path / "a"))
    assert run.repeat() == "python -m train.pretrain demo --data 'my clips' --out runs/a"
    processes = [{"rank": rank, "host": f"node{rank // 4}"} for rank in range(8)]
    run = read_run(run_folder(tmp_path / "b", processes=processes))
    assert run.repeat().startswith("torchrun --nnodes 2 --nproc-per-node 4 -m train.pretrain demo")


@pytest.mark.long
def test_gives_flags_where_something_else_started_it(tmp_path):
    config = flat(FINETUNE["demo"]()) | {"seed": 3, "augment.flip": True, "data.path": "a b"}
    made = {**record(command=["/bin/pytest", "-q"]), "config": config}
    run_folder(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(made))
    run = read_run(tmp_path / "a")
    assert run.verb == "finetune"
    words = shlex.split(run.repeat())
    assert words[:3] == ["python", "-m", "train.finetune"]
    parsed = parse(words[3:], FINETUNE, "demo", prog="p", about="a")
    assert json.loads(json.dumps(flat(parsed))) == json.loads(json.dumps(config))


def test_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        read_run(tmp_path / "absent")
    run_folder(tmp_path / "runs" / "a")
    with pytest.raises(ValueError, match=r"runs is no run: .*; runs in it: a$"):
        read_run(tmp_path / "runs")
    (tmp_path / "runs" / "a" / "config.json").write_text('{"model_type": "videomae"}')
    with pytest.raises(ValueError, match="not that of a run"):
        read_run(tmp_path / "runs" / "a")
    for damaged in ('{"config"', "[]"):
        (tmp_path / "runs" / "a" / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            read_run(tmp_path / "runs" / "a")


def test_finds_the_run_that_was_written_to_last(tmp_path):
    with pytest.raises(ValueError, match="no run in"):
        newest_run(tmp_path / "absent")
    for number, name in enumerate(("new", "old", "middle")):
        run_folder(tmp_path / name)
        for file in ("config.json", "metrics.jsonl"):
            os.utime(tmp_path / name / file, (number, {"new": 30, "old": 10, "middle": 20}[name]))
    (tmp_path / "no-run").mkdir()
    assert newest_run(tmp_path) == tmp_path / "new"


def test_writes_times_as_people_say_them():
    told = {41.6: "42 s", 310: "5 min 10 s", 11530: "3 h 12 min", 90000: "1 day 1 h", 190000: "2 days 4 h"}
    assert {seconds: seconds_text(seconds) for seconds in told} == told


def test_a_damaged_value_takes_no_other_line_with_it(tmp_path):
    path = tmp_path / "m.jsonl"
    damaged = [{"step": "two", "a": 2}, {"step": 3, "a": [3]}, {"step": 4, "a": 10**400}, {"step": 10**400}]
    lines(path, [{"step": 1, "a": 1}, *damaged, {"step": 5, "a": 5}])
    series = read_series(path)
    assert series.steps.tolist() == [1, 3, 4, 5]
    assert [column.tolist() for column in series.finite("a")] == [[1, 5], [1, 5]]
    assert series.damaged == 2
