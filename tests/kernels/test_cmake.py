"""The CMake build: cubins, manifest, C library, its own tests, and a program that uses it installed."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from kernels.aot import build, embed
from kernels.aot.specialise import Built, Specialisation

ROOT = Path(__file__).resolve().parents[2]

CONSUMER_CMAKE = """
cmake_minimum_required(VERSION 3.20)
project(consumer C)
find_package(videomae_kernels 0.1 REQUIRED)
add_executable(consumer main.c)
target_link_libraries(consumer PRIVATE videomae_kernels::videomae_kernels)
"""
CONSUMER_C = """
#include <stdio.h>
#include <videomae_kernels.h>
int main(void) {
  vmk_context *gpu;
  vmk_status status = vmk_open(0, &gpu);
  for (size_t i = 0; i < vmk_num_kernels(); i++) puts(vmk_kernel_at(i)->name);
  printf("opening: %s\\n", vmk_status_string(status));
  if (status == VMK_OK) vmk_close(gpu);
  return 0;
}
"""


def kernel(role, **changes):
    """A manifest's entry that fits a role of the C library."""
    module, function, absent = embed.ROLES[role]
    constants = {"ROWS": 128, "NORMALIZE": True, "EPS": 1e-6, "PRECISION": "ieee"} | dict.fromkeys(absent)
    entry = {"name": role, "cubin": f"{role}.cubin", "module": module, "function": function, "symbol": function}
    entry |= {"gpu": "", "shared_bytes": 0, "threads": 32, "trailing_pointers": 2, "constants": constants}
    return entry | {"arguments": [{"name": "D", "type": "i32", "aligned": True}]} | changes


def manifest(**changes):
    return {"architecture": 90, "target": "sm_90a", "kernels": [kernel(role) for role in embed.ROLES]} | changes


def built(name="f_bf16", constants=(("ROWS", 8), ("EPS", 1e-6), ("index", None))):
    found = Specialisation(name, "m", "f", (("x", "*bf16"), ("D", "i32"), ("R", "i32")), constants, ("x", "D"), 4, 3)
    return Built(found, 90, b"cubin", "f", 1024, 2, 32, 0, 100, (), (16,))


def test_an_entry_says_how_to_launch():
    entry = build.entry(built())
    assert json.loads(json.dumps(entry)) == entry
    assert (entry["threads"], entry["shared_bytes"], entry["trailing_pointers"]) == (128, 1024, 2)
    assert [(a["name"], a["type"], a["aligned"]) for a in entry["arguments"]] == [
        ("x", "*bf16", True),
        ("D", "i32", True),
        ("R", "i32", False),
    ]
    assert entry["constants"] == {"ROWS": 8, "EPS": 1e-6, "index": None}


@pytest.mark.parametrize("value", [float("nan"), (1, 2), object()], ids=["nan", "tuple", "object"])
def test_refuses_a_constant_that_json_cannot_hold(value):
    with pytest.raises(ValueError, match="constant ROWS must be"):
        build.entry(built(constants=(("ROWS", value),)))


def test_writing_removes_only_what_an_earlier_manifest_named(tmp_path):
    for name in ("old", "new"):
        build.write(tmp_path, build.manifest(90, [built(name)]), [built(name)])
        (tmp_path / "other.cubin").write_bytes(b"")
    assert {path.name for path in tmp_path.iterdir()} == {"new.cubin", "other.cubin", "manifest.json"}


def test_each_role_needs_exactly_one_kernel():
    assert {role: k["name"] for role, k in embed.choose(manifest()).items()} == {role: role for role in embed.ROLES}
    for kernels in ([kernel(role) for role in embed.ROLES][1:], [*manifest()["kernels"], kernel("VMK_FOLD")]):
        with pytest.raises(ValueError, match="sm_90 must have one kernel for VMK_FOLD"):
            embed.choose(manifest(kernels=kernels))


def test_kernels_with_one_gpus_tiles_are_left_out():
    tuned = kernel("VMK_FOLD", name="tuned", gpu="Some GPU sm_90")
    assert embed.choose(manifest(kernels=[tuned, *manifest()["kernels"]])) == embed.choose(manifest())


def test_the_c_source_holds_the_manifest(tmp_path):
    for role in embed.ROLES:
        (tmp_path / f"{role}.cubin").write_bytes(bytes(range(40)))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest()))
    source = embed.source([tmp_path])
    assert '{"D", "i32", 1},' in source
    assert '{"ROWS", 128},' in source
    assert '{"NORMALIZE", 1},' in source
    assert "EPS" not in source
    assert '{VMK_FOLD, 90, 1, "VMK_FOLD", "_fold_kernel", 0, 32, 2, sm90_fold_arguments, 1,' in source
    assert "32,33,34,35,36,37,38,39,\n" in source
    assert "const double vmk_imagenet_mean[3] = {0.485, 0.456, 0.406};" in source


def run(*command, **options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A build folder for sm_90."""
    if shutil.which("cmake") is None or shutil.which("cc") is None:
        pytest.skip("needs cmake and a C compiler")
    folder = tmp_path_factory.mktemp("cmake") / "build"
    options = ("-DVIDEOMAE_CUDA_ARCHS=90", f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_C_FLAGS=-Werror")
    run("cmake", "-S", ROOT, "-B", folder, *options)
    run("cmake", "--build", folder)
    return folder


@pytest.mark.long
def test_the_c_tests_pass(made):
    out = run("ctest", "--test-dir", made, "--output-on-failure")
    assert "100% tests passed, 0 tests failed out of 3" in out
    assert "tables" in out
    assert "emulated" in out


@pytest.mark.long
def test_the_manifest_names_every_cubin_and_its_arguments(made):
    folder = made / "kernels" / "sm_90"
    found = json.loads((folder / "manifest.json").read_text())
    assert (found["architecture"], found["target"]) == (90, "sm_90a")
    assert {k["cubin"] for k in found["kernels"]} == {path.name for path in folder.glob("*.cubin")}
    assert all((folder / k["cubin"]).read_bytes().startswith(b"\x7fELF") for k in found["kernels"])
    modules = {*("attention", "bias_gelu", "cube_embed", "decoder_input"), "layer_norm", "pixel_loss", "split_heads"}
    assert {k["module"] for k in found["kernels"]} == {f"kernels.{name}" for name in modules}
    chosen = embed.choose(found)
    for role, (module, function, _) in embed.ROLES.items():
        constants = chosen[role]["constants"]
        signature = inspect.signature(vars(import_module(module))[function].fn)
        wanted = [name for name in signature.parameters if name not in constants]
        assert [a["name"] for a in chosen[role]["arguments"]] == wanted


@pytest.mark.long
def test_nothing_is_made_twice_and_no_path_of_this_machine_is_shipped(made):
    out = run("cmake", "--build", made)
    assert "Compiling" not in out
    assert "Building" not in out
    shipped = [*(made / "kernels").rglob("*.*"), made / "libvideomae_kernels.a"]
    for path in shipped:
        assert str(ROOT).encode() not in path.read_bytes(), path
        assert str(made.parent).encode() not in path.read_bytes(), path


@pytest.mark.long
def test_an_installed_copy_serves_another_project(made, tmp_path):
    prefix, project = tmp_path / "prefix", tmp_path / "project"
    run("cmake", "--install", made, "--prefix", prefix)
    assert (prefix / "share" / "videomae_kernels" / "sm_90" / "manifest.json").is_file()
    project.mkdir()
    (project / "CMakeLists.txt").write_text(CONSUMER_CMAKE)
    (project / "main.c").write_text(CONSUMER_C)
    run("cmake", "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", project / "build")
    out = run(project / "build" / "consumer")
    assert "cube_embed_fold_bf16\n" in out
    assert "\nopening: " in out
