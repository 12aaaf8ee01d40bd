"""Run folders as training leaves them, without the training."""

import json

import numpy as np
from PIL import Image

from train.cli import flat
from train.recipes import PRETRAIN

STARTED = 1_795_414_736  # 2026-11-23T06:18:56+0000


def record(config=(), **changes):
    """config.json: of the demo's pre-training, with some of its settings changed."""
    made = {
        "config": {**flat(PRETRAIN["demo"]()), **dict(config)},
        "command": ["/somewhere/train/pretrain.py", "demo", "--data", "my clips", "--out", "runs/a"],
        "started": "2026-11-23T06:18:56+0000",
        "plan": {"steps": 100, "device": "cpu", "precision": "float32", "peak_bytes": 38332416, "workers": 1},
        "commit": "f1e297c87d1dc318db5eb13774bcdd0161cb8735-dirty",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "host": "vm",
        "system": "Linux",
        "gpu": None,
    }
    return {**made, **changes}


def line(step, **changes):
    """Of metrics.jsonl."""
    made = {"step": step, "loss": 1 / step, "grad_norm": 0.3, "lr": 1e-3 * step, "clips_per_second": 400.25}
    made |= {"data_wait": 0.01, "batches_ready": 2.0, "decode_ms": 1.449, "skipped_clips": 0, "nonfinite_steps": 0}
    return {**made, "time": STARTED + step, **changes}


def lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def run_folder(path, steps=range(10, 101, 10), *, config=(), **changes):
    """A pre-training of 100 steps, with two pictures."""
    (path / "samples").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(record(config, **changes)))
    lines(path / "metrics.jsonl", map(line, steps))
    for step in (50, 100):
        noise = np.random.default_rng(step).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / "samples" / f"step_{step:07d}.png")
    return path


def troubled_folder(path):
    """The same with all that can go wrong: resumed, a spike, steps that were not finite, files that cannot be read, a
    damaged picture, lines damaged and torn, validations, names that are markup."""
    config = {"data.path": "<script>alert(1)</script>", "mask.ratio": 0.9}
    part = {**record(config), "step": 40, "started": "2026-11-23T07:18:56+0000", "gpu": "A GPU"}
    run_folder(path, config=config, resumed=[part])
    entries = [line(step, time=STARTED + step + 3600 * (step > 40)) for step in range(10, 91, 10)]
    entries[3] |= {"loss": None, "grad_norm": None}
    entries[5]["loss"] = 1e6
    entries[6] |= {"skipped_clips": 3, "nonfinite_steps": 1, "new_measure": 0.5}
    lines(path / "metrics.jsonl", entries)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9\x00\n[1]\n{"step": 100, "lo')
    lines(path / "evaluations.jsonl", [{"step": s, "probe_knn": s / 2.0, "probe_linear": s * 1.0} for s in (40, 80)])
    lost = {"epoch": 0, "index": 3, "view": 0, "reason": "<b>moov atom not found</b>"}
    lines(path / "skipped.jsonl", [{"step": s, **lost, "path": "/clips/<img src=x>.mp4"} for s in (5, 7)])
    lines(path / "skipped.1.jsonl", [{"step": 6, **lost, "path": "/clips/\udcff.mp4"}])
    lines(
        path / "nonfinite.jsonl",
        [{"step": 38, "loss": "nan", "grad_norm": "inf", "clips": ["/clips/a&b.mp4", "c.mp4"]}],
    )
    sample = path / "samples" / "step_0000050.png"
    sample.write_bytes(sample.read_bytes()[:300])
    return path
