"""Studies: their commands run in order, once, and go on; what is made of their results."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from tests.conftest import ROOT
from tests.runs import FAST, metrics, wait_for
from tests.videos import write_videos
from train import study_learns
from train.checkpoint import checkpoints
from train.study import main
from train.study_jobs import Job, JobFailed, Terminated, run_jobs
from train.study_rows import StudyConfig, spread


def writes(path, text="1", needs=()):
    """A job that is over at once: json.tool writes the text it was given."""
    source = path.with_suffix(".source")
    source.write_text(text)
    return Job(path.stem, ("json.tool", str(source), str(path)), needs)


def test_runs_each_command_after_those_that_it_needs(tmp_path):
    first = writes(tmp_path / "first.out")
    # reads what the first one wrote
    second = Job("second", ("json.tool", str(tmp_path / "first.out"), str(tmp_path / "second.out")), ("first",))
    said = []
    seconds = run_jobs([second, first], tmp_path / "study", at_once=2, threads=1, say=said.append)
    assert (tmp_path / "second.out").read_text() == "1\n"
    assert set(seconds) == {"first", "second"}
    assert [line.split()[1] for line in said] == ["first,", "second,"]


def test_runs_nothing_twice_but_what_has_changed(tmp_path):
    jobs = [writes(tmp_path / "a.out"), writes(tmp_path / "b.out")]
    run_jobs(jobs, tmp_path / "study", at_once=1, threads=1)
    for name in "ab":
        (tmp_path / f"{name}.out").unlink()
    changed = Job("b", (*jobs[1].arguments, "--sort-keys"))
    run_jobs([jobs[0], changed], tmp_path / "study", at_once=1, threads=1)
    assert not (tmp_path / "a.out").exists()
    assert (tmp_path / "b.out").exists()


def test_runs_again_what_needs_something_that_changed(tmp_path):
    first = writes(tmp_path / "a.out")
    second = writes(tmp_path / "b.out", needs=("a",))
    run_jobs([first, second], tmp_path / "study", at_once=1, threads=1)
    (tmp_path / "b.out").unlink()
    changed = Job("a", (*first.arguments, "--sort-keys"))
    seconds = run_jobs([changed, second], tmp_path / "study", at_once=1, threads=1)
    assert (tmp_path / "b.out").exists()
    assert set(seconds) == {"a", "b"}


def test_a_torn_record_is_none(tmp_path):
    job = writes(tmp_path / "a.out")
    run_jobs([job], tmp_path / "study", at_once=1, threads=1)
    for torn in ("", '{"seconds": 1}', "[]", '{"history": 3}'):
        (tmp_path / "a.out").unlink()
        (tmp_path / "study" / "a.json").write_text(torn)
        run_jobs([job], tmp_path / "study", at_once=1, threads=1)
        assert (tmp_path / "a.out").exists()


@pytest.mark.long
def test_a_training_whose_command_changed_begins_anew(tmp_path):
    out = tmp_path / "study" / "run"
    flags = (*FAST.split(), "--data", str(tmp_path / "videos"), "--out", str(out))
    write_videos(tmp_path / "videos", 3)
    for steps in ("4", "2"):
        job = Job("run", ("train.pretrain", "demo", *flags, "--steps", steps))
        run_jobs([job], tmp_path / "study", at_once=1, threads=1)
        assert [line["step"] for line in metrics(out)][-1] == int(steps)
        assert "resumed" not in json.loads((out / "config.json").read_text())


def test_stops_at_a_command_that_fails_and_says_why(tmp_path):
    bad = writes(tmp_path / "bad.out", "{")
    later = writes(tmp_path / "later.out", needs=("bad",))
    with pytest.raises(JobFailed, match=r"bad ended with 1: Expecting property name.*bad\.log"):
        run_jobs([bad, later], tmp_path / "study", at_once=2, threads=1)
    assert not (tmp_path / "later.out").exists()
    with pytest.raises(ValueError, match="later needs"):
        run_jobs([later], tmp_path / "study", at_once=1, threads=1)


def test_no_command_outlives_the_study(tmp_path):
    noted = tmp_path / "pid"
    work = f"import os, pathlib, time; pathlib.Path({str(noted)!r}).write_text(str(os.getpid())); time.sleep(60)"
    before = signal.getsignal(signal.SIGTERM)

    def terminate():
        wait_for(lambda: noted.exists() and noted.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=terminate)
    sender.start()
    with pytest.raises(Terminated):
        run_jobs([Job("long", ("timeit", "-n", "1", "-r", "1", work))], tmp_path / "study", at_once=1, threads=1)
    sender.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_time_before_a_stop_counts(tmp_path):
    noted = tmp_path / "noted"
    # waits for the signal the first time, is over at once the second
    work = f"import pathlib, time; p = pathlib.Path({str(noted)!r}); p.exists() or (p.touch(), time.sleep(60))"
    job = Job("long", ("timeit", "-n", "1", "-r", "1", work))

    def terminate():
        wait_for(noted.exists)
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=terminate)
    sender.start()
    with pytest.raises(Terminated):
        run_jobs([job], tmp_path / "study", at_once=1, threads=1)
    sender.join()
    before = json.loads((tmp_path / "study" / "long.stopped.json").read_text())["seconds"]
    begin = time.monotonic()
    seconds = run_jobs([job], tmp_path / "study", at_once=1, threads=1)["long"]
    took = time.monotonic() - begin
    assert before >= 1.5
    assert before < seconds < before + took + 0.1
    assert not (tmp_path / "study" / "long.stopped.json").exists()


def write_result(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values) + "\n")


def test_the_table_has_scratch_at_the_best_of_its_rates(tmp_path):
    config = StudyConfig(seeds=2)
    for seed, (tuned, *scratch) in enumerate([(90, 20, 40, 30), (80, 30, 50, 10)]):
        write_result(tmp_path / f"finetune-{seed}" / "evaluations.jsonl", step=9, val_top1=tuned)
        for i, value in enumerate(scratch):
            write_result(tmp_path / f"scratch-{i}-{seed}" / "evaluations.jsonl", step=9, val_top1=value)
        write_result(tmp_path / f"longer-{seed}" / "evaluations.jsonl", step=9, val_top1=70)
        for name, value in (("probe", 60 + seed), ("untrained", 20)):
            accuracy = {"knn": {"top1": value}, "linear": {"top1": value + 5}}
            write_result(tmp_path / f"{name}-{seed}" / "result.json", accuracy=accuracy)
    rows = study_learns.read_rows(config, tmp_path)
    assert [(row.mean, row.values) for row in rows[:4]] == [
        (85, (90, 80)),
        (45, (40, 50)),
        (25, (20, 30)),
        (20, (30, 10)),
    ]
    assert "best of three" in rows[1].note
    assert spread(rows[0].values).endswith(f" ± {50**0.5:.1f}")
    assert [row.mean for row in rows[4:]] == [70, 65.5, 25, 60.5, 20]


def test_scratch_and_pre_trained_get_the_same_labels_and_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("train.study_learns.demo_list", lambda split="train": tmp_path / f"{split}.csv")
    for split, count in (("train", 30), ("test", 4)):
        (tmp_path / f"{split}.csv").write_text("".join(f"{i}.mp4 {i % 12}\n" for i in range(count)))
    (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(12)))
    jobs = {job.name: job for job in study_learns.jobs(StudyConfig(seeds=1, labels=24), tmp_path / "runs")}
    assert len((tmp_path / "runs/labelled-24/train.csv").read_text().splitlines()) == 24

    def asked(name):
        arguments = jobs[name].arguments
        return {flag: arguments[i + 1] for i, flag in enumerate(arguments) if flag.startswith("--")}

    tuned, *scratch = (asked(name) for name in ("finetune-0", "scratch-0-0", "scratch-1-0", "scratch-2-0"))
    assert tuned.pop("--weights") == str(tmp_path / "runs/pretrain-0")
    rates = [float(flags.pop("--optim.base-lr")) for flags in scratch]
    assert len(set(rates)) == 3
    for flags in (tuned, *scratch):
        flags.pop("--out")
    assert tuned == scratch[0] == scratch[1] == scratch[2]
    assert "--weights" not in scratch[0]


def test_refuses_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, says in ((["--seeds", "0"], "seeds"), (["dances"], "dances"), (["--epochs", "inf"], "epochs")):
        with pytest.raises(SystemExit) as end:
            main(flags)
        assert end.value.code == 2
        error = capsys.readouterr().err.strip()
        assert says in error
        assert len(error.splitlines()) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.long
def test_stopped_it_goes_on_and_ends_in_a_table_and_a_plot(tmp_path):
    flags = ["--steps", "60", "--seeds", "1", "--labels", "24", "--epochs", "1"]
    command = [sys.executable, "-m", "train.study", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # a job in the background would ignore Ctrl-C
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=heed)
    before = tmp_path / "runs/study/learns/pretrain-0/metrics.jsonl"
    wait_for(lambda: before.exists() and before.read_text(), seconds=240)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert checkpoints(tmp_path / "runs/study/learns/pretrain-0/checkpoints")[0].name == "step_60"
    out = tmp_path / "results/learns"
    assert "| pre-trained, fine-tuned |" in (out / "README.md").read_text()
    assert (out / "accuracy.png").stat().st_size > 10_000
    assert len(json.loads((out / "study.json").read_text())["rows"]) == 9
