"""Checkpoints: whole or absent, newest kept, damaged ones passed over aloud."""

import contextlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import videomae
from train import checkpoint
from train.checkpoint import CannotSave, Checkpointing, Damaged, Saver
from train.moments import read_tensors

STATE = dict.fromkeys(("config", "videos", "micro_batch", "precision", "rng", "scaler"), 0)


def save(folder, step, model, state, keep):
    optimizer = {f"a.{key}": torch.arange(6.0).view(2, 3) + step for key in ("exp_avg", "exp_avg_sq")}
    taken = checkpoint.take(step, {"model.safetensors": model}, optimizer.items(), state)
    return checkpoint.write(folder, taken, Checkpointing(keep=keep))


def test_writing_never_waits_for_what_a_gpu_computes(tmp_path, model, monkeypatch):
    def waits(*_, **__):
        raise AssertionError("what copies ahead waits for the current stream")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._OverlappingCpuLoader", waits)
    save(tmp_path, 7, model, STATE | {"rng": torch.get_rng_state()}, keep=2)
    assert checkpoint.latest(tmp_path)[1]["step"] == 7


@contextlib.contextmanager
def no_file_past(size):
    """As on a full disk: no file can grow past so many bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return videomae.pretrain_model("vit_tiny", frames=2, image_size=16, decoder_depth=1)


def test_gives_back_what_was_saved(tmp_path, model):
    path = save(tmp_path, 7, model, STATE | {"rng": torch.get_rng_state(), "config": {"a": [1, None]}}, keep=2)
    assert path == tmp_path / "step_7"
    found, state = checkpoint.latest(tmp_path)
    assert found == path
    assert state["step"] == 7
    assert state["config"] == {"a": [1, None]}
    assert torch.equal(state["optimizer"]["a.exp_avg"], torch.arange(6.0).view(2, 3) + 7)
    twin = videomae.pretrain_model("vit_tiny", frames=2, image_size=16, decoder_depth=1)
    checkpoint.restore(path, twin)
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)


def test_keeps_the_newest(tmp_path, model):
    for step in (1, 2, 9, 10):
        save(tmp_path, step, model, STATE, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_10", "step_9"]
    # saving the same step again replaces it
    save(tmp_path, 10, model, STATE | {"again": True}, keep=2)
    assert checkpoint.latest(tmp_path)[1]["again"]
    assert sorted(os.listdir(tmp_path)) == ["step_10", "step_9"]
    # the one just written stays, whatever the numbers of the others
    save(tmp_path, 3, model, STATE, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step_10", "step_3", "step_9"]


def test_sets_checkpoints_of_another_future_aside(tmp_path, model, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step, model, STATE, keep=5)
    checkpoint.set_aside_after(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["set_aside_step_2", "set_aside_step_3", "step_1"]
    assert "goes on from step 1" in capsys.readouterr().err


def test_leaves_nothing_behind_when_it_cannot_write(tmp_path, model, monkeypatch):
    save(tmp_path, 1, model, STATE, keep=5)
    with no_file_past(4096), pytest.raises(CannotSave, match="step 2 could not be written"):
        save(tmp_path, 2, model, STATE, keep=5)
    assert os.listdir(tmp_path) == ["step_1"]


def test_a_full_disk_is_said_every_time_and_the_run_goes_on_with_the_last_good_one(tmp_path, model):
    said = []
    saver = Saver(tmp_path, Checkpointing(keep=5), said.append)
    take = partial(checkpoint.take, models={"model.safetensors": model}, optimizer=(), state=STATE)
    saver.save(take(1))
    saver.finish()
    with no_file_past(4096):
        for step in (2, 3, 4):
            saver.save(take(step))
        with pytest.raises(CannotSave, match="step 4 could not be written"):
            saver.finish()
    assert [line.split(":")[1].split(" could")[0] for line in said] == [f" checkpoint of step {n}" for n in (2, 3)]
    assert os.listdir(tmp_path) == ["step_1"]
    saver.save(take(5))
    saver.finish()
    assert checkpoint.latest(tmp_path)[1]["step"] == 5


def test_what_is_saved_is_what_was_there_then(tmp_path, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {"a.exp_avg": torch.ones(3)}
    taken = checkpoint.take(1, {"model.safetensors": model}, moments.items(), STATE)
    moments["a.exp_avg"].zero_()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    checkpoint.write(tmp_path, taken, Checkpointing())
    assert torch.equal(checkpoint.latest(tmp_path)[1]["optimizer"]["a.exp_avg"], torch.ones(3))
    checkpoint.restore(tmp_path / "step_1", model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_young_stay(tmp_path, model):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, model, STATE, keep=9)
    for step, hours in ((1, 5), (2, 3), (3, 1)):
        then = time.time() - 3600 * hours
        os.utime(tmp_path / f"step_{step}", (then, then))
    taken = checkpoint.take(5, {"model.safetensors": model}, (), STATE)
    checkpoint.write(tmp_path, taken, Checkpointing(keep=2, keep_hours=2))
    assert sorted(os.listdir(tmp_path)) == ["step_3", "step_4", "step_5"]


class Harmful:
    def __reduce__(self):
        return os.system, ("touch /tmp/harm",)


def test_an_index_that_would_run_something_is_refused(tmp_path, model):
    path = save(tmp_path, 1, model, STATE, keep=1)
    (path / "optimizer" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"(posix|os)\.system has no place in a checkpoint"):
        read_tensors(path / "optimizer")
    with pytest.raises(Damaged):
        checkpoint.read_state(path)


# an empty list where a dict should be, a terabyte of bytes, a frame of exabytes, a memo of as many places, half a frame
ILL_FORMED = {
    "list": b"\x80\x02].",
    "bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"a.",
    "array": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"a.",
    "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
    "memo": b"\x80\x02Nr" + b"\xff\xff\xff\x7f" + b".",
    "half": b"\x80\x04\x95\xff",
    "nothing": b"\x80\x02.",
}


@pytest.mark.parametrize("name", ["optimizer/.metadata", "state.pt"])
@pytest.mark.parametrize("content", ILL_FORMED.values(), ids=ILL_FORMED)
def test_a_damaged_file_whose_sum_is_right_is_damaged(tmp_path, model, name, content):
    path = save(tmp_path, 1, model, STATE, keep=1)
    (path / name).write_bytes(content)
    (path / "files.json").write_text(json.dumps(checkpoint._sums(path)))
    with pytest.raises(Damaged):
        checkpoint.read_state(path)


def test_an_index_that_claims_more_than_there_is_makes_no_room_for_it(tmp_path, model):
    path = save(tmp_path, 1, model, STATE, keep=1)
    index = path / "optimizer" / ".metadata"
    stated = pickle.loads(index.read_bytes())
    stated.state_dict_metadata["a.exp_avg"].size = torch.Size([1 << 40])
    index.write_bytes(pickle.dumps(stated))
    with pytest.raises(ValueError, match="tells of 4,398,046,511,128 bytes, its files have"):
        read_tensors(path / "optimizer")


def test_tensors_that_do_not_fit_the_index_are_damaged(tmp_path, model):
    path = save(tmp_path, 1, model, STATE, keep=1)
    file = path / "optimizer" / "__0_0.distcp"
    file.write_bytes(bytes(len(file.read_bytes())))
    (path / "files.json").write_text(json.dumps(checkpoint._sums(path)))
    with pytest.raises(Damaged, match="the optimizer cannot be read"):
        checkpoint.read_state(path)


def test_an_index_cannot_point_out_of_its_folder(tmp_path, model):
    path = save(tmp_path, 1, model, STATE, keep=1)
    index = path / "optimizer" / ".metadata"
    index.write_bytes(index.read_bytes().replace(b"__0_0.distcp", b"/etc/hosts.a"))
    with pytest.raises(ValueError, match="points out of the checkpoint"):
        read_tensors(path / "optimizer")


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "optimizer/.metadata", "optimizer/__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut", "scrambled", "flipped", "missing"])
def test_passes_over_a_damaged_checkpoint_aloud(tmp_path, model, capsys, name, damage):
    for step in (1, 2):
        save(tmp_path, step, model, STATE, keep=2)
    file = tmp_path / "step_2" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.write_bytes(b"\x93" * 64 + content[64:])
    found, state = checkpoint.latest(tmp_path)
    assert found == tmp_path / "step_1"
    assert state["step"] == 1
    assert "damaged checkpoint passed over" in capsys.readouterr().err


def test_does_not_start_afresh_when_all_are_damaged(tmp_path, model):
    save(tmp_path, 1, model, STATE, keep=2)
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
state = dict.fromkeys(("config", "videos", "micro_batch", "precision", "rng", "scaler"), 0)
for step in itertools.count(1):
    moments = {"a": torch.ones(9)}.items()
    taken = checkpoint.take(step % 3 + 1, {"model.safetensors": model}, moments, state | {"n": step})
    checkpoint.write(pathlib.Path(sys.argv[1]), taken, checkpoint.Checkpointing(keep=3))
    if step == 1:  # what writing imports is there
        print("ready", flush=True)
"""
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in checkpoint.checkpoints(tmp_path):
            checkpoint.read_state(path)
        assert checkpoint.latest(tmp_path) is not None
