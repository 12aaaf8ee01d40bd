"""weight_files: every container that holds tensors is read, nothing in it runs, and what is broken is said so."""

import argparse
import json
import os
import sys
import types

import numpy
import pytest
import torch
from safetensors.torch import save_file

from videomae import weight_files
from videomae.weight_files import read, write_atomically

TENSORS = {"blocks.0.norm1.weight": torch.arange(3.0), "mask_token": torch.ones(1, 1, 2)}


def assert_same(found, wanted=TENSORS):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("wrapper", [None, "model", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "backbone."])
def test_it_takes_wrappers_and_prefixes_off(wrapper, prefix, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in TENSORS.items()}
    held = {wrapper: tensors, "epoch": 3} if wrapper else tensors
    torch.save(held, tmp_path / "a.pth")
    assert_same(read(held).tensors)
    assert_same(read(tmp_path / "a.pth").tensors)


def test_it_takes_the_prefix_of_a_compiled_part_off():
    assert_same(read({"encoder._orig_mod.norm.weight": torch.ones(2)}).tensors, {"encoder.norm.weight": torch.ones(2)})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_it_reads_an_official_file_with_its_command_line_and_numpy_learning_rates(zipped, tmp_path):
    official = {
        "model": TENSORS,
        "optimizer": {"param_groups": [{"lr": numpy.float64(0.1) * 2}]},
        "epoch": 799,
        "args": argparse.Namespace(model="pretrain_videomae_base_patch16_224", window_size=(8, 14, 14)),
    }
    torch.save(official, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read(tmp_path / "a.pth").tensors)


def test_it_reads_what_numpy_1_pickled(tmp_path):
    # the module was renamed in numpy 2; the older name, of the same length plus one, is what published files hold
    torch.save({"model": TENSORS, "lr": numpy.float64(0.1)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    held = (tmp_path / "a.pth").read_bytes()
    assert b"numpy._core.multiarray\n" in held
    (tmp_path / "a.pth").write_bytes(held.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    assert_same(read(tmp_path / "a.pth").tensors)


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_it_refuses_a_pickle_that_would_run_code(zipped, tmp_path):
    torch.save(
        {"model": TENSORS, "x": Hostile(tmp_path / "ran")}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match="posix.mkdir, which is not plain data"):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_it_leaves_torch_with_the_safe_list_it_had(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pth")
    before = torch.serialization.get_safe_globals()
    read(tmp_path / "a.pth")
    # torch keeps a set: the order of this list changes from call to call
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_it_reads_safetensors_with_their_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"kind": "pretrain"})
    found = read(tmp_path / "a.safetensors")
    assert_same(found.tensors)
    assert found.metadata == {"kind": "pretrain"}
    assert found.config == {}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "mp_rank_00_model_states.pt"])
def test_it_reads_a_folder(name, tmp_path):
    save = save_file if name.endswith("safetensors") else torch.save
    save(TENSORS, tmp_path / name)
    # a run folder's own, no Hugging Face one
    (tmp_path / "config.json").write_text('{"steps": 3}')
    found = read(str(tmp_path))
    assert_same(found.tensors)
    assert found.config == {}


def write_shards(folder, name, save):
    names = [name.replace(".", f"-0000{i}-of-00002.") for i in (1, 2)]
    for shard, tensor in zip(names, TENSORS, strict=True):
        save({tensor: TENSORS[tensor]}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": dict(zip(TENSORS, names, strict=True))}))
    return names


@pytest.mark.parametrize(("name", "save"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_it_reads_shards(name, save, tmp_path):
    write_shards(tmp_path, name, save)
    assert_same(read(tmp_path).tensors)


def test_it_names_a_shard_that_is_missing_or_elsewhere(tmp_path):
    names = write_shards(tmp_path, "model.safetensors", save_file)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=f"missing: {names[1]}"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    with pytest.raises(ValueError, match=r"outside its folder: \.\./b"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(ValueError, match="missing: xxx"):
        read(tmp_path)


@pytest.mark.parametrize("via", ["folder", "file"])
def test_it_reads_hugging_face_configs(via, tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "videomae"}')
    (tmp_path / "video_preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    found = read(tmp_path if via == "folder" else tmp_path / "model.safetensors")
    assert found.config == {"model_type": "videomae"}
    assert found.preprocessor == {"image_mean": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut in the middle", "cut at the end", "garbage"])
def test_it_says_that_a_file_is_damaged(name, damage, tmp_path):
    (save_file if name.endswith("safetensors") else torch.save)({"a": torch.randn(5000)}, tmp_path / name)
    held = (tmp_path / name).read_bytes()
    damaged = {"empty": b"", "cut in the middle": held[: len(held) // 2], "cut at the end": held[:-30]}
    (tmp_path / name).write_bytes(damaged.get(damage, bytes(range(256)) * 20))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ([torch.ones(2)], "must hold a dict of tensors; got list"),
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        ({"epoch": 3}, "got int for epoch"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "got torch.int64 tensor for a"),
        ({1: torch.ones(2)}, "name its tensors with strings; got 1"),
        ({"a": torch.ones(2), "module.a": torch.ones(2)}, "holds a twice"),
    ],
    ids=["list", "empty", "empty model", "number", "integers", "no name", "twice"],
)
def test_it_refuses_what_is_no_weights(held, says, tmp_path):
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=says):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [torch.zeros(1).expand(1 << 40), torch.zeros(1 << 40, 0)], ids=["repeated", "empty"])
def test_it_refuses_shapes_of_which_the_file_has_no_numbers(value, tmp_path):
    torch.save({"a": value}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"has a of the shape \(1099511627776.*, but not so many numbers"):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"width": 0}, "whole numbers from 1"),
        ({"frames": 16.0}, "whole numbers from 1"),
        ({"heads": True}, "whole numbers from 1"),
        ({"image_size": (224, 1 << 40)}, "whole numbers from 1"),
        ({"image_size": (1 << 19, 1 << 19)}, "at most 4,194,304 cubes"),
        ({"positions_of": (1 << 10, 1 << 10, 1 << 10)}, "at most 4,194,304 cubes"),
        ({"mean": ("a",)}, "mean must be finite"),
        ({"std": (float("nan"),) * 3}, "std must be finite"),
    ],
)
def test_it_believes_no_size_that_no_model_has(claims, says):
    with pytest.raises(ValueError, match=says):
        weight_files.Stated(**claims)
    assert weight_files.Stated(width=1408, frames=64, image_size=(1024, 1024), mean=(0, 0.5, 1)).frames == 64


def test_it_refuses_folders_without_weights_or_with_a_choice(tmp_path):
    with pytest.raises(ValueError, match="no weights in"):
        read(tmp_path)
    for rank in (0, 1):
        torch.save(TENSORS, tmp_path / f"mp_rank_0{rank}_model_states.pt")
    with pytest.raises(ValueError, match="holds 2 .*model_states.pt"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json is no JSON"):
        read(tmp_path)


@pytest.mark.parametrize("path", ["nowhere/model.pth", "nowhere", "/nowhere/at/all"])
def test_it_does_not_take_a_wrong_path_for_a_hub_id(path, monkeypatch):
    monkeypatch.setattr(weight_files, "_download", lambda hub_id: pytest.fail(f"asked the hub for {hub_id}"))
    with pytest.raises(ValueError, match="no such file or folder"):
        read(path)


def fake_hub(monkeypatch, snapshot_download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))


@pytest.mark.parametrize(("name", "calls"), [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_it_downloads_a_hub_id_and_no_more_than_it_needs(name, calls, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        if any(pattern.startswith(name[:5]) for pattern in allow_patterns):
            (save_file if name.endswith("safetensors") else torch.save)(TENSORS, tmp_path / name)
        return str(tmp_path)

    fake_hub(monkeypatch, snapshot_download)
    found = read("MCG-NJU/videomae-base")
    assert_same(found.tensors)
    assert found.source == "MCG-NJU/videomae-base"
    assert [hub_id for hub_id, _ in asked] == ["MCG-NJU/videomae-base"] * calls
    assert all("*" not in patterns for _, patterns in asked)


def test_it_says_in_one_line_that_the_hub_is_out_of_reach(monkeypatch):
    def snapshot_download(hub_id, allow_patterns):
        raise ConnectionError("no route to host\nsecond line")

    fake_hub(monkeypatch, snapshot_download)
    with pytest.raises(ValueError, match="MCG-NJU/videomae-base .* hub: no route to host$"):
        read("MCG-NJU/videomae-base")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="huggingface_hub is not installed"):
        read("MCG-NJU/videomae-base")


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "new folder" / "a"
    write_atomically(path, lambda file: file.write_text("old"))

    def fail(file):
        file.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a"]
    with path.open() as reader:
        write_atomically(path, lambda file: file.write_text("new"))
        # one who opened it before reads the old file to its end
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"norm.weight": torch.ones(2)}, tmp_path / "a.pth")
    assert_same(read("~/a.pth").tensors, {"norm.weight": torch.ones(2)})
