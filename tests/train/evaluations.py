"""Short evaluations for tests, in this process or one of their own, and what they leave behind."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.evaluate import main

QUICK = ("--workers", "0", "--device", "cpu")


def evaluate(data, weights, out, *flags):
    return main(["--data", str(data), "--weights", str(weights), "--out", str(out), *QUICK, *map(str, flags)])


def start(data, weights, out, *flags):
    command = [sys.executable, "-m", "train.evaluate", "--data", str(data), "--weights", str(weights)]
    command += ["--out", str(out), *QUICK, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(out):
    return [json.loads(line) for line in (Path(out) / "predictions.jsonl").read_text().splitlines()]


def vectors(out):
    """Every video's probabilities, by index."""
    return {row["index"]: np.frombuffer(base64.b64decode(row["probabilities"]), "<f4") for row in lines(out)}


def result(out):
    return json.loads((Path(out) / "result.json").read_text())


def numbers(out):
    """What must not depend on how the work was done."""
    kept = ("top1", "top5", "mean_class_top1", "videos", "unreadable", "protocol", "unreadable_videos")
    return {key: result(out)[key] for key in kept}


def assert_same_predictions(first, second):
    ours, theirs = vectors(first), vectors(second)
    assert list(ours) == list(theirs)
    for index, vector in ours.items():
        # the model takes other numbers of videos at once
        assert vector == pytest.approx(theirs[index], abs=1e-5)
