"""What an import costs, and what it must not touch."""

import json
import subprocess
import sys

import pytest

LIGHT = ("kernels", "videomae", "videomae.model", "videomae.masking", "videomae.classifier")
# data and command-line packages: a machine that only computes need not have them
HEAVY = ("decord", "av", "tyro", "PIL", "matplotlib", "tensorboard", "transformers")


@pytest.mark.parametrize("module", LIGHT)
def test_imports_no_data_or_command_line_package(module):
    code = f"import sys, json, {module}, torch; print(json.dumps([torch.cuda.is_initialized(), *sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    initialised, *modules = json.loads(out.stdout)
    assert not initialised
    assert set(HEAVY).isdisjoint(modules)
    assert out.stderr == ""


def test_imports_in_under_three_seconds():
    code = "import time; begin = time.perf_counter(); import videomae; print(time.perf_counter() - begin)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 3
