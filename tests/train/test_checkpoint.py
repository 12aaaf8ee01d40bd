"""Checkpoints: whole or absent, newest kept, damaged ones passed over aloud."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import videomae
from train import checkpoint
from train.checkpoint import CannotSave, Damaged

STATE = dict.fromkeys(("config", "videos", "micro_batch", "precision", "rng", "optimizer", "scaler"), 0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return videomae.pretrain_model("vit_tiny", frames=2, image_size=16, decoder_depth=1)


def test_gives_back_what_was_saved(tmp_path, model):
    path = checkpoint.save(
        tmp_path, 7, model, STATE | {"rng": torch.get_rng_state(), "config": {"a": [1, None]}}, keep=2
    )
    assert path == tmp_path / "step_7"
    found, state = checkpoint.latest(tmp_path)
    assert found == path
    assert state["step"] == 7
    assert state["config"] == {"a": [1, None]}
    twin = videomae.pretrain_model("vit_tiny", frames=2, image_size=16, decoder_depth=1)
    checkpoint.restore(path, twin)
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)


def test_keeps_the_newest(tmp_path, model):
    for step in (1, 2, 9, 10):
        checkpoint.save(tmp_path, step, model, STATE, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_10", "step_9"]
    # saving the same step again replaces it
    checkpoint.save(tmp_path, 10, model, STATE | {"again": True}, keep=2)
    assert checkpoint.latest(tmp_path)[1]["again"]
    assert sorted(os.listdir(tmp_path)) == ["step_10", "step_9"]
    # the one just written stays, whatever the numbers of the others
    checkpoint.save(tmp_path, 3, model, STATE, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step_10", "step_3", "step_9"]


def test_sets_checkpoints_of_another_future_aside(tmp_path, model, capsys):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model, STATE, keep=5)
    checkpoint.set_aside_after(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["set_aside_step_2", "set_aside_step_3", "step_1"]
    assert "goes on from step 1" in capsys.readouterr().err


def test_leaves_nothing_behind_when_it_cannot_write(tmp_path, model, monkeypatch):
    checkpoint.save(tmp_path, 1, model, STATE, keep=5)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # as on a full disk: no file can grow past 4 kB
    try:
        with pytest.raises(CannotSave, match="step 2 could not be written"):
            checkpoint.save(tmp_path, 2, model, STATE, keep=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == ["step_1"]


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "scrambled", "missing"])
def test_passes_over_a_damaged_checkpoint_aloud(tmp_path, model, capsys, name, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, STATE, keep=2)
    file = tmp_path / "step_2" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(b"\x93" * 64 + content[64:])
    found, state = checkpoint.latest(tmp_path)
    assert found == tmp_path / "step_1"
    assert state["step"] == 1
    assert "damaged checkpoint passed over" in capsys.readouterr().err


def test_does_not_start_afresh_when_all_are_damaged(tmp_path, model):
    checkpoint.save(tmp_path, 1, model, STATE, keep=2)
    (tmp_path / "step_1" / "state.pt").write_bytes(b"")
    with pytest.raises(Damaged, match="none of the 1 checkpoints"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.long
def test_a_kill_at_any_moment_leaves_whole_checkpoints_only(tmp_path):
    code = """
import sys, itertools, pathlib, torch, videomae
from train import checkpoint
model = videomae.pretrain_model("vit_tiny", frames=2, image_size=16, decoder_depth=1)
state = dict.fromkeys(("config", "videos", "micro_batch", "precision", "rng", "optimizer", "scaler"), 0)
print("ready", flush=True)
for step in itertools.count(1):
    checkpoint.save(pathlib.Path(sys.argv[1]), step % 3 + 1, model, state | {"n": step}, keep=3)
"""
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in checkpoint.checkpoints(tmp_path):
            checkpoint.read_state(path)
        if attempt:
            assert checkpoint.latest(tmp_path) is not None
