"""Short pre-training runs for tests, in this process or one of their own, and what they leave behind."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from train.checkpoint import _sums
from train.pretrain import main

FAST = "--model.size vit_tiny --model.frames 4 --model.image-size 16 --model.cube 2 8 8 --model.decoder-depth 1"
FAST += " --data.views-per-decode 1 --mask.ratio 0.5 --batch-size 6 --optim.base-lr 0.04"
FAST += " --workers 0 --log.every 2 --log.tensorboard false --checkpoint.keep 9"


def run(videos, out, *flags):
    return main(["demo", *FAST.split(), "--data", str(videos), "--out", str(out), *map(str, flags)])


def start(videos, out, *flags):
    command = [sys.executable, "-m", "train.pretrain", "demo", *FAST.split(), "--data", str(videos), "--out", str(out)]
    return subprocess.Popen([*command, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out, step):
    return load_file(Path(out) / "checkpoints" / f"step_{step}" / "model.safetensors")


@contextlib.contextmanager
def changed_state(checkpoint):
    """The training state in a checkpoint, to be changed inside."""
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    yield state
    torch.save(state, checkpoint / "state.pt")
    (checkpoint / "files.json").write_text(json.dumps(_sums(checkpoint)))


def assert_same(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
