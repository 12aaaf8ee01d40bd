"""Every specialisation compiles without a GPU, without a spill, with the instructions it was written for."""

import functools
import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest

from kernels.aot.catalogue import ARCHITECTURES, arch_option, target_for
from kernels.aot.report import RESULTS

# what reads pixels; what multiplies matrices
PIXELS = ("cube_embed_forward", "cube_embed_backward", "pixel_loss_loss")
PRODUCTS = ("attention", "cube_embed_forward", "cube_embed_backward")
CORES = {80: "HMMA", 90: "HGMMA", 100: "tcgen05", 120: "HMMA"}


@functools.cache
def report(*options):
    """The command's, in a process without the interpreter, which kernels imported here are for."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.aot.report", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


def assert_as_designed(built):
    for kernel in built:
        name, core = kernel["name"], CORES[kernel["architecture"]]
        assert kernel["stack_bytes"] == 0, f"{name} spills"
        room = target_for(kernel["architecture"]).shared_bytes
        assert kernel["shared_bytes"] <= room, f"{name} would not start: {kernel['shared_bytes']} shared bytes"
        assert kernel["trailing_pointers"] == 2
        loads = kernel["load_bytes"]
        if name.startswith(PRODUCTS):
            assert core in kernel["tensor_cores"], f"{name} does not use {core}"
        elif not name.startswith("cube_embed"):
            assert loads[0] == 16, f"{name} loads activations by {loads} bytes"
            assert loads[-1] >= 4, f"{name} loads by {loads} bytes"
        if name.startswith(PIXELS):
            assert loads[-1] >= 4, f"{name} loads pixels by {loads} bytes"


def test_one_of_each_kernel_compiles_as_designed_for_sm_90():
    built = report("--arch", "90", "--size", "vit_base")
    assert_as_designed(built)
    kernels = {kernel["name"].split("_bf16")[0] for kernel in built if "fp32" not in kernel["name"]}
    assert kernels == {
        *("attention_forward", "attention_whole_backward", "attention_blocked_backward"),
        *("bias_gelu_forward", "bias_gelu_backward", "cube_embed_fold", "cube_embed_forward", "cube_embed_backward"),
        *("decoder_input_forward", "decoder_input_backward", "layer_norm_forward", "layer_norm_backward"),
        *("pixel_loss_loss", "pixel_loss_rescale", "split_heads_join"),
    }


@pytest.mark.long
def test_everything_compiles_as_designed_for_every_architecture():
    built = report()
    assert {k["architecture"] for k in built} == set(ARCHITECTURES)
    assert_as_designed(built)


@pytest.mark.long
def test_half_precision_compiles_as_designed():
    assert_as_designed(report("--dtype", "fp16"))


@pytest.mark.long
def test_single_precision_compiles_without_a_spill():
    built = report("--arch", "90", "--size", "vit_base", "--dtype", "fp32")
    assert "attention_forward_fp32_d64_ROWS64" in {kernel["name"] for kernel in built}
    room = target_for(90).shared_bytes
    spilled = [k["name"] for k in built if k["stack_bytes"] > 0 or k["shared_bytes"] > room]
    assert not spilled


def kept():
    """Names in the table that is kept; stale otherwise: `python -m kernels.aot.report --write`."""
    lines = RESULTS.read_text().splitlines()
    return {line.split("|")[1].strip() for line in lines if line.startswith("| ")} - {"kernel", "---"}


def test_the_kept_table_knows_them():
    assert {kernel["name"] for kernel in report("--arch", "90", "--size", "vit_base")} <= kept()


@pytest.mark.long
def test_the_kept_table_is_of_these():
    assert {kernel["name"] for kernel in report()} == kept()


def test_it_refuses_an_architecture_without_bfloat16():
    for given in ("70", "sm_90"):
        with pytest.raises(ArgumentTypeError, match=f"8.0 or later, written 80; got '{given}'"):
            arch_option(given)
    assert arch_option("86") == 86


MIXED = """
import torch
from kernels.aot.specialise import build, specialise
from kernels.decoder_input import _forward
from kernels.launch import recording
def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")
with recording() as found:
    _forward(empty(2, 5, 64), empty(64), empty(12, 64), empty(2, 5, dtype=torch.int64), empty(2, 7, dtype=torch.int32))
print(build(specialise(found[0]), 90).stack_bytes)
"""


@pytest.mark.long
def test_indices_of_two_integer_types_compile_together():
    """The interpreter takes branches that give values of different types; the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", MIXED], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "0", done.stderr[-2000:]


TUNED = """
import json
from kernels import tiles
tiles.table = lambda: {"Some GPU sm_90": {
    "bias_gelu.forward": {"bfloat16 D=3072": {"ROWS": 8, "COLS": 256, "num_warps": 8}},
    "layer_norm.forward": {"bfloat16 D=768": {"ROWS": 4, "num_warps": 4}},
}}
from kernels.aot.catalogue import specialisations
print(json.dumps([[s.name, s.gpu] for s in specialisations(90, ("vit_base",)) if s.gpu]))
assert not any(s.gpu for s in specialisations(80, ("vit_base",)))
"""


def test_measured_tiles_are_compiled_beside_the_defaults_where_they_differ():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", TUNED], capture_output=True, text=True, env=environment)
    name = "bias_gelu_forward_bf16_some_gpu_ROWS8_COLS256_warps8_stages3"
    assert json.loads(done.stdout) == [[name, "Some GPU sm_90"]], done.stderr[-2000:]
