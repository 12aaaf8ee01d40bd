"""Two trainings in one run folder: the second is refused, whatever became of the first it can go on afterwards."""

import os
import signal
from dataclasses import replace

import pytest

from tests.runs import run, start, wait_for
from tests.videos import write_videos
from train import claim, cli
from train.claim import NAME, Claim
from train.recipes import PRETRAIN
from train.run import Run, _begin_folder


@pytest.fixture
def videos(tmp_path):
    return write_videos(tmp_path / "videos", 3)


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_gone(videos, tmp_path, capsys):
    out = tmp_path / "run"
    first = start(videos, out, "--steps", 100_000)
    try:
        wait_for(lambda: (out / "metrics.jsonl").exists() or first.poll() is not None)
        for flags in ((), ("--resume", "never")):
            with pytest.raises(SystemExit) as end:
                run(videos, out, "--steps", 100_000, *flags)
            assert end.value.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"another training writes to {out} (process {first.pid} on " in line
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    # what a killed process held is free
    assert run(videos, out, "--steps", 2) == 0
    assert (out / "checkpoints" / "step_2").is_dir()


@pytest.mark.long
def test_a_run_lets_go_at_its_end(videos, tmp_path):
    out = tmp_path / "run"
    assert run(videos, out, "--steps", 2) == 0
    second = start(videos, out, "--steps", 4)
    _, errors = second.communicate()
    assert second.returncode == 0, errors
    assert str(second.pid) in (out / NAME).read_text()


def test_where_nothing_can_be_locked_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claim.fcntl, "lockf", refuse)
    Claim(tmp_path).close()
    Claim(tmp_path / "not there").close()
    monkeypatch.setattr(claim, "fcntl", None)
    Claim(tmp_path).close()
    assert os.listdir(tmp_path) == [NAME]
    # of what cannot be locked, as of a folder that is not there, the user is told
    assert capsys.readouterr().err.count("nothing keeps a second training out of the folder") == 2


@pytest.mark.long
def test_moving_the_old_run_aside_claims_the_new_folder(videos, tmp_path):
    out = tmp_path / "run"
    assert run(videos, out, "--steps", 2) == 0
    first = start(videos, out, "--steps", 100_000, "--resume", "never")
    try:
        wait_for(lambda: (tmp_path / "run.1").exists() and (out / "metrics.jsonl").exists() or first.poll() is not None)
        with pytest.raises(SystemExit):
            run(videos, out, "--steps", 2)
        # a run that found no folder, but has one when it begins, does not move it away
        late = Run(*[None] * 14)
        late.out, late.config = out, replace(cli.parse(["demo"], PRETRAIN, "demo", prog="", about=""), resume="never")
        with pytest.raises(ValueError, match="another training writes to"):
            _begin_folder(late, (), is_new=True)
        assert first.poll() is None
        assert not (tmp_path / "run.2").exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
