"""weights: what each kind of file gives each kind of model, what is refused, our own format, and the command line."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import videomae
from videomae.classifier import Classifier
from videomae.hugging_face import from_official
from videomae.model import SIZES, Encoder, Input, Size, VideoMAE
from videomae.weight_names import grouped
from videomae.weights import main, model_from, save_hugging_face, save_official, save_weights

SMALL = {"frames": 4, "image_size": 32}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def filled(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def pretrain(decoder_depth=2, seed=0):
    return filled(videomae.pretrain_model("vit_tiny", decoder_depth=decoder_depth, **SMALL), seed)


def classifier(num_classes=5, seed=0):
    return filled(videomae.classifier("vit_tiny", num_classes=num_classes, **SMALL), seed)


def encoder(seed=0):
    return filled(videomae.encoder("vit_tiny", **SMALL), seed)


def detector(num_classes=5, seed=0, **others):
    return filled(videomae.detector("vit_tiny", num_classes=num_classes, **SMALL, **others), seed)


def equal(model, other, prefix=""):
    """Whether every tensor of model equals the one of that name, with the prefix before it, in the other."""
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[prefix + name]) for name, tensor in model.state_dict().items())


def write(model, folder, format):
    """model in that format; the path that load_weights is given."""
    held = {"model": model.state_dict(), "epoch": 1, "args": argparse.Namespace(lr=0.1)}
    if format == "official":
        torch.save(held, folder / "checkpoint.pth")
        return folder / "checkpoint.pth"
    if format == "V2":
        held["model"] = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save(held, folder / "v2.pth")
        return folder / "v2.pth"
    if format == "deepspeed":
        torch.save({"module": model.state_dict(), "epoch": 1}, folder / "mp_rank_00_model_states.pt")
        return folder
    if format == "ours":
        save_weights(model, folder / "model.safetensors")
        return folder
    save_hugging_face(model, folder)
    if format == "hugging face 4":
        renamed = {
            name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): tensor.contiguous()
            for name, tensor in from_official(model.state_dict()).items()
        }
        save_file(renamed, folder / "model.safetensors")
    return folder


FORMATS = ["official", "V2", "deepspeed", "hugging face 4", "hugging face 5", "ours"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [pretrain, classifier, encoder])
def test_a_file_gives_its_own_model_every_tensor(make, format, tmp_path):
    source, model = make(), make(seed=1)
    report = videomae.load_weights(model, write(source, tmp_path, format))
    assert equal(model, source)
    assert set(report.used) == set(model.state_dict())
    assert report.ignored == report.fresh == ()
    assert report.format == {"V2": "official", "deepspeed": "official", "ours": "videomae"}.get(
        format, format.rstrip(" 45")
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_pretraining_file_gives_an_encoder_its_norm_too(format, tmp_path):
    source, model = pretrain(), encoder(seed=1)
    report = videomae.load_weights(model, write(source, tmp_path, format))
    assert equal(model, source, "encoder.")
    assert report.fresh == ()
    assert set(report.used) == set(model.state_dict())
    assert set(report.ignored) == {name for name in source.state_dict() if not name.startswith("encoder.")}


@pytest.mark.parametrize("format", FORMATS)
def test_a_pretraining_file_leaves_a_classifier_its_norm_and_head(format, tmp_path):
    source, model, before = pretrain(), classifier(seed=1), classifier(seed=1)
    report = videomae.load_weights(model, write(source, tmp_path, format))
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert torch.equal(model.head.weight, before.head.weight)
    assert torch.equal(model.fc_norm.bias, before.fc_norm.bias)
    assert equal(model.blocks, source.encoder.blocks)
    assert equal(model.patch_embed, source.encoder.patch_embed)
    assert {"encoder.norm.weight", "encoder.norm.bias", "mask_token"} <= set(report.ignored)


@pytest.mark.parametrize("format", FORMATS)
def test_a_finetuning_file_leaves_an_encoder_its_norm(format, tmp_path):
    source, model = classifier(), videomae.encoder("vit_tiny", **SMALL)
    report = videomae.load_weights(model, write(source, tmp_path, format))
    assert set(report.fresh) == {"norm.weight", "norm.bias"}
    assert torch.equal(model.norm.weight, torch.ones(64))
    assert torch.equal(model.norm.bias, torch.zeros(64))
    assert equal(model.blocks, source.blocks)
    assert set(report.ignored) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def test_a_head_of_other_classes_stays_fresh():
    source, model, before = classifier(7), classifier(5, seed=1), classifier(5, seed=1)
    report = videomae.load_weights(model, {"module": source.state_dict()})
    assert set(report.fresh) == set(report.ignored) == {"head.weight", "head.bias"}
    assert "the file's has 7 classes" in str(report)
    assert equal(model.head, before.head)
    assert equal(model.fc_norm, source.fc_norm)


def test_a_model_is_untouched_where_loading_fails(tmp_path):
    model, before = pretrain(seed=1), pretrain(seed=1)
    tensors = pretrain().state_dict()
    tensors["decoder.head.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"decoder.head.bias must be \(1536,\), not \(3,\)"):
        videomae.load_weights(model, tensors)
    assert equal(model, before)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (pretrain, lambda t: without(t, "mask_token"), "no pre-training file.* mask_token is missing"),
        (pretrain, lambda t: without(t, "encoder.norm.bias"), "encoder.norm.bias is missing"),
        (pretrain, lambda t: t | {"fc_norm.bias": torch.ones(64)}, "fc_norm.bias is not in the model"),
        (pretrain, lambda t: t | {"decoder.blocks.0.gamma_1": torch.ones(64)}, "decoder.blocks.0.gamma_1 is not in"),
        (classifier, lambda t: without(t, "blocks.1.attn.v_bias"), "blocks.1.attn.v_bias is missing"),
        (classifier, lambda t: without(t, "fc_norm.weight"), "fc_norm.weight is missing"),
        (classifier, lambda t: without(t, "head.weight", "head.bias"), "head.weight is missing, head.bias is missing"),
        (classifier, lambda t: t | {"head.weight": torch.ones(5, 8)}, r"head.weight must be \(5, 64\), not \(5, 8\)"),
        (classifier, lambda t: t | {"blocks.0.gamma_1": torch.ones(64)}, "blocks.0.gamma_1 is not in the model"),
        (classifier, lambda t: t | {"blocks.2.norm1.bias": torch.ones(64)}, "has 3 encoder blocks, the model 2"),
        (encoder, lambda t: without(t, "norm.weight", "norm.bias"), "norm.weight is missing"),
        (detector, lambda t: without(t, "head.bias"), "head.bias is missing"),
        (detector, lambda t: without(t, "norm.bias"), "norm.bias is missing"),
        (detector, lambda t: t | {"blocks.0.gamma_1": torch.ones(64)}, "blocks.0.gamma_1 is not in the model"),
        (encoder, lambda t: t | {"pos_embed": torch.ones(1, 8, 64)}, "pos_embed is not in the model"),
        (encoder, lambda t: t | {"encoder.norm.bias": torch.ones(64)}, "holds an encoder's weights twice"),
        (encoder, lambda t: {"a": torch.ones(3)}, "patch_embed.proj.weight is missing.* and [0-9]+ more"),
    ],
)
def test_it_names_what_does_not_fit(make, change, says):
    with pytest.raises(ValueError, match=says):
        videomae.load_weights(make(), change(make().state_dict()))


def test_an_unknown_name_that_changes_nothing_is_reported():
    report = videomae.load_weights(encoder(), encoder().state_dict() | {"logit_scale": torch.ones(1)})
    assert report.ignored == ("logit_scale",)
    assert "not known here: logit_scale" in str(report)


@pytest.mark.parametrize(("file_depth", "model_depth"), [(3, 1), (1, 3)])
@pytest.mark.parametrize("format", ["official", "hugging face 5"])
def test_another_decoder_depth_names_the_argument(file_depth, model_depth, format, tmp_path):
    path = write(pretrain(file_depth), tmp_path, format)
    with pytest.raises(ValueError, match=f"decoder blocks, the model {model_depth}: .* decoder_depth={file_depth}"):
        videomae.load_weights(pretrain(model_depth), path)


def test_a_classifier_is_no_place_for_another_size_or_module():
    with pytest.raises(ValueError, match="has 2 encoder blocks, the model 12"):
        videomae.load_weights(videomae.encoder("vit_small", **SMALL), encoder().state_dict())
    with pytest.raises(ValueError, match="VideoMAE, Encoder, Classifier or Detector; got Linear"):
        videomae.load_weights(torch.nn.Linear(2, 2), encoder().state_dict())


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 192}, "width 192, the model 64"),
        ({"num_hidden_layers": 12}, "depth 12, the model 2"),
        ({"num_attention_heads": 6}, "heads 6, the model 4"),
        ({"tubelet_size": 1}, r"cube \(1, 16, 16\), the model \(2, 16, 16\)"),
        ({"decoder_num_attention_heads": 6}, "decoder heads 6, the model 4"),
        ({"model_type": "vit"}, "must be a VideoMAE's"),
    ],
)
def test_a_config_of_another_model_is_refused(change, says, tmp_path):
    save_hugging_face(pretrain(), tmp_path)
    change_json(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=says):
        videomae.load_weights(pretrain(), tmp_path)


def test_a_finetuning_configs_decoder_does_not_matter(tmp_path):
    # published ones name the decoder of another size
    save_hugging_face(classifier(), tmp_path)
    change_json(tmp_path / "config.json", decoder_num_attention_heads=6, decoder_hidden_size=384)
    assert videomae.load_weights(classifier(seed=1), tmp_path).fresh == ()


def test_the_16_heads_of_the_published_small_are_overridden(tmp_path):
    # the width of ViT-S, one block deep
    small, input = Size(384, 1, 6, 192, 3), Input(4, 32)
    source = filled(Classifier(small, input, num_classes=3))
    save_hugging_face(source, tmp_path)
    change_json(tmp_path / "config.json", num_attention_heads=16)
    model = Classifier(small, input, num_classes=3)
    report = videomae.load_weights(model, tmp_path)
    assert "says 16 heads, known to be wrong" in str(report)
    assert equal(model, source)
    assert model_from(tmp_path)[0].size.heads == 6


def test_a_preprocessors_mean_and_std_become_the_models(tmp_path):
    save_hugging_face(pretrain(), tmp_path)
    change_json(tmp_path / "preprocessor_config.json", image_mean=HALF[0], image_std=HALF[1])
    model = pretrain(seed=1)
    report = videomae.load_weights(model, tmp_path)
    assert (model.input.mean, model.input.std) == HALF
    assert model.encoder.input == model.input
    assert "normalised with the file's mean (0.5, 0.4, 0.3)" in str(report)
    change_json(tmp_path / "preprocessor_config.json", image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ValueError, match="must have 3 channels"):
        videomae.load_weights(model, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    report = videomae.load_weights(model, tmp_path)
    assert (model.input.mean, model.input.std) == HALF
    assert "no preprocessor_config.json" in str(report)


def test_our_file_keeps_everything_that_building_takes(tmp_path):
    size = Size(64, 2, 8, 32, 4)
    source = filled(VideoMAE(size, Input(8, (32, 48), (4, 8, 8), *HALF), decoder_depth=3))
    save_weights(source, tmp_path / "a.safetensors")
    model, report = model_from(tmp_path / "a.safetensors")
    assert equal(model, source)
    assert report.format == "videomae"
    assert model.encoder.size == size
    assert model.input == source.input == model.encoder.input
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "videomae"
    assert metadata["version"] == "1"
    assert metadata["kind"] == "pretrain"
    assert metadata["decoder_depth"] == "3"


@pytest.mark.parametrize(("make", "kind"), [(classifier, Classifier), (encoder, Encoder)])
def test_our_file_is_built_again_whatever_its_kind(make, kind, tmp_path):
    save_weights(make(), tmp_path / "a.safetensors")
    model, _ = model_from(tmp_path / "a.safetensors")
    assert type(model) is kind
    assert equal(model, make())
    assert model.input.size == (32, 32)


def test_our_files_geometry_is_checked(tmp_path):
    save_weights(pretrain(), tmp_path / "a.safetensors")
    larger = videomae.pretrain_model("vit_tiny", decoder_depth=2, frames=8, image_size=32)
    assert "the file's frames: 4, the model's: 8" in str(videomae.load_weights(larger, tmp_path / "a.safetensors"))
    tiny = SIZES["vit_tiny"]
    other_heads = VideoMAE(Size(64, 2, 8, tiny.decoder_width, 4), Input(4, 32), decoder_depth=2)
    with pytest.raises(ValueError, match="heads 4, the model 8"):
        videomae.load_weights(other_heads, tmp_path / "a.safetensors")


def test_our_file_of_another_version_or_broken_metadata_is_refused(tmp_path):
    save_file(encoder().state_dict(), tmp_path / "a.safetensors", {"format": "videomae", "version": "2"})
    with pytest.raises(ValueError, match="format version 2; this code reads version 1"):
        model_from(tmp_path / "a.safetensors")
    save_file(encoder().state_dict(), tmp_path / "a.safetensors", {"format": "videomae", "version": "1", "size": "{}"})
    with pytest.raises(ValueError, match="metadata that is missing or ill-formed"):
        model_from(tmp_path / "a.safetensors")


def test_half_precision_weights_are_read_and_said(tmp_path):
    halves = {name: tensor.half() for name, tensor in encoder().state_dict().items()}
    model = encoder(seed=1)
    assert "torch.float16 weights became torch.float32" in str(videomae.load_weights(model, halves))
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight.half(), halves["norm.weight"])


def test_a_file_of_no_known_width_is_not_guessed_at():
    with pytest.raises(ValueError, match="width 40, which is no known size"):
        model_from(Encoder(Size(40, 1, 2, 16, 1), Input(4, 32)).state_dict())
    with pytest.raises(ValueError, match="no VideoMAE: it has no patch_embed.proj.weight"):
        model_from({"a": torch.ones(2)})


@pytest.mark.parametrize("make", [pretrain, classifier])
def test_the_command_goes_there_and_back_without_changing_a_bit(make, tmp_path, capsys):
    save_official(make(), tmp_path / "a.pth")
    assert main([str(tmp_path / "a.pth"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert "official weights" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "hf")) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_attention_heads"] == 4
    assert main([str(tmp_path / "hf"), str(tmp_path / "b.pth"), "--to", "official"]) == 0
    assert "hugging face weights" in capsys.readouterr().out
    there, back = (torch.load(tmp_path / name)["model"] for name in ("a.pth", "b.pth"))
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)


@pytest.mark.long
def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    command = [sys.executable, "-m", "videomae.weights", str(tmp_path / "bad.pth"), str(tmp_path / "hf"), "--to", "hf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "bad.pth is damaged, or no PyTorch file" in done.stderr
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("nowhere.pth", "out", "no such file or folder"),
        ("a.pth", "a.pth", "is a folder; .* is a file"),
        ("a.pth", "a.pth/b", ""),
    ],
    ids=["no source", "target is a file", "target under a file"],
)
def test_the_command_refuses_bad_paths(source, target, says, tmp_path, capsys):
    save_official(encoder(), tmp_path / "a.pth")
    assert main([str(tmp_path / source), str(tmp_path / target), "--to", "hf"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(says, error)


@pytest.mark.parametrize("name", ["blocks.999999999.x", "decoder.blocks.999999999.x"])
def test_a_name_alone_makes_no_blocks(name):
    tensors = pretrain().state_dict() | {name: torch.zeros(1)}
    with pytest.raises(ValueError, match="names blocks .* but has only"):
        videomae.weights.describe(tensors)


def test_many_tensors_are_named_by_their_modules():
    names = ["mask_token", "norm.weight", "norm.bias", *(f"decoder.blocks.{i}.norm1.weight" for i in range(9))]
    assert grouped(names) == "mask_token, norm.* (2), decoder.* (9)"
    assert grouped(names[:3]) == "mask_token, norm.weight, norm.bias"
