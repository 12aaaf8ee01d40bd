"""How long a fresh process takes to its first step: imports, the model, kernels compiled by Triton, one update.

    python -m bench.first_step --size vit_base --clips 64

prints the moments, in seconds since 1970, as json: imported, built, first_step, second_step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.shapes import shape_of
from bench.step_results import FirstStep
from bench.steps import our_step
from train.engine import EngineName
from videomae.command_line import Parser, run_main
from videomae.model import SIZES

ROOT = Path(__file__).resolve().parent.parent
# that of train.recipes.PretrainConfig, whose command-line packages need not be there
DEFAULT_ENGINE: EngineName = "eager"
STAGES = ("imported", "built", "first_step", "second_step")
MOST_SECONDS = 120.0


def first_step(
    size: str, clips: int, attention: str = "auto", command: Sequence[str] = (sys.executable, "-m", "bench.first_step")
) -> FirstStep:
    """In a process of its own, whose Triton cache is an empty folder. RuntimeError with what it said when it fails."""
    asked = ("--size", size, "--clips", str(clips), "--attention", attention)
    with tempfile.TemporaryDirectory() as cache:
        begin = time.time()
        done = subprocess.run(
            [*command, *asked],
            cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
    if done.returncode != 0:
        raise RuntimeError(f"bench.first_step exited with {done.returncode}:\n{done.stderr[-2000:]}")
    moments = json.loads(done.stdout.splitlines()[-1])
    return FirstStep(size, clips, DEFAULT_ENGINE, *(moments[stage] - begin for stage in STAGES))


def main(arguments: Sequence[str] | None = None) -> int:
    """Without a GPU in float32 on the CPU, which tells whether it runs."""
    moments = {"imported": time.time()}
    parser = Parser("python -m bench.first_step", (__doc__ or "").strip())
    parser.add_argument("--size", choices=tuple(SIZES), default="vit_base", help="of the model (vit_base)")
    parser.add_argument("--clips", type=int, default=64, help="of a step (64)")
    parser.add_argument("--attention", default="auto", help="the back end (auto)")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.bfloat16 if device.type == "cuda" else None
    shape = shape_of(given.size, given.clips)
    step = our_step(shape, device, autocast, engine=DEFAULT_ENGINE, attention=given.attention)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    moments["built"] = time.time()
    for stage in ("first_step", "second_step"):
        step.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments[stage] = time.time()
    print(json.dumps(moments))
    return 0


if __name__ == "__main__":
    run_main(main)
