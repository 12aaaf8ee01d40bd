"""weights of detectors: what each kind of file gives one, and what its own gives other models."""

import pytest
import torch

import videomae
from tests.videomae.test_weights import FORMATS, HALF, SMALL, classifier, detector, encoder, equal, pretrain, write
from videomae.detector import AVA_MEAN, AVA_STD, Detector
from videomae.model import SIZES, Input
from videomae.weights import model_from, save_hugging_face


@pytest.mark.parametrize("format", ["official", "V2", "deepspeed", "ours"])
def test_a_detectors_file_gives_it_every_tensor(format, tmp_path):
    source, model = detector(), detector(seed=1)
    path = write(source, tmp_path, format)
    report = videomae.load_weights(model, path)
    assert equal(model, source)
    assert set(report.used) == set(model.state_dict())
    assert report.ignored == report.fresh == ()
    built, _ = model_from(path)
    assert type(built) is Detector
    assert equal(built, source)
    # official files do not say it, and it is not pre-training's
    assert (built.input.mean, built.input.std) == (model.input.mean, model.input.std) == (AVA_MEAN, AVA_STD)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [pretrain, encoder])
def test_a_detector_begins_with_a_pretraining_files_encoder_and_norm(make, format, tmp_path):
    source, model, before = make(), detector(seed=1), detector(seed=1)
    report = videomae.load_weights(model, write(source, tmp_path, format))
    encoder = source.encoder if make is pretrain else source
    assert set(report.fresh) == {"head.weight", "head.bias"}
    assert equal(encoder, model)
    assert equal(model.head, before.head)
    # files of ours and of Hugging Face state pre-training's normalisation, which a detector does not have
    assert (model.input.mean, model.input.std) == (AVA_MEAN, AVA_STD)
    states = format == "ours" or format.startswith("hugging")
    assert ("normalised as the detector does, not as the file says" in str(report)) is states
    assert "final norm" not in str(report)


@pytest.mark.parametrize("format", FORMATS)
def test_a_detector_begins_with_a_finetuned_encoder_and_a_fresh_norm(format, tmp_path):
    source, model = classifier(), videomae.detector("vit_tiny", num_classes=5, **SMALL)
    head = model.head.weight.clone()
    report = videomae.load_weights(model, write(source, tmp_path, format))
    assert set(report.fresh) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert set(report.ignored) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert torch.equal(model.norm.weight, torch.ones(64))
    assert torch.equal(model.norm.bias, torch.zeros(64))
    # of as many classes, but a classifier's
    assert torch.equal(model.head.weight, head)
    assert equal(model.blocks, source.blocks)
    assert equal(model.patch_embed, source.patch_embed)
    assert "the final norm is fresh, in a new model weight 1 and bias 0: fine-tuned weights have none" in str(report)
    assert "the head is fresh: the file's is of another kind, and has 5 classes" in str(report)
    assert (model.input.mean, model.input.std) == (AVA_MEAN, AVA_STD)


@pytest.mark.parametrize("format", ["official", "ours"])
def test_a_detectors_head_of_other_classes_stays_fresh(format, tmp_path):
    source, model, before = detector(7), detector(5, seed=1), detector(5, seed=1)
    report = videomae.load_weights(model, write(source, tmp_path, format))
    assert set(report.fresh) == set(report.ignored) == {"head.weight", "head.bias"}
    assert "the head is fresh: the file's has 7 classes" in str(report)
    assert equal(model.head, before.head)
    assert equal(model.norm, source.norm)


@pytest.mark.parametrize("format", ["official", "ours"])
def test_a_detectors_encoder_serves_other_models(format, tmp_path):
    source = detector()
    path = write(source, tmp_path, format)
    model = encoder(seed=1)
    assert set(videomae.load_weights(model, path).ignored) == {"head.weight", "head.bias"}
    assert equal(model, source)
    named, before = classifier(seed=1), classifier(seed=1)
    report = videomae.load_weights(named, path)
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert equal(named.head, before.head)
    assert equal(named.blocks, source.blocks)
    assert "the file's is of another kind" in str(report)
    with pytest.raises(ValueError, match="no pre-training file.* mask_token is missing"):
        videomae.load_weights(pretrain(seed=1), path)


def test_an_image_transformer_begins_a_detector():
    image = {"patch_embed.proj.weight": torch.randn(64, 3, 16, 16), "head.weight": torch.randn(5, 64)}
    image |= {"head.bias": torch.zeros(5), "cls_token": torch.zeros(1, 1, 64)}
    image |= {
        name: tensor
        for name, tensor in encoder().state_dict().items()
        if not name.startswith("patch_embed.proj.weight")
    }
    model = detector(seed=1)
    report = videomae.load_weights(model, image)
    assert set(report.fresh) == {"head.weight", "head.bias"}
    assert torch.equal(model.norm.weight, image["norm.weight"])
    assert torch.equal(model.patch_embed.proj.weight[:, :, 0], image["patch_embed.proj.weight"] / 2)
    assert (model.input.mean, model.input.std) == (AVA_MEAN, AVA_STD)


def test_a_detectors_file_states_its_normalisation(tmp_path):
    source = Detector(SIZES["vit_tiny"], Input(4, 32, (2, 16, 16), *HALF), num_classes=5)
    path = write(source, tmp_path, "ours")
    model = detector()
    assert "normalised with the file's mean (0.5, 0.4, 0.3)" in str(videomae.load_weights(model, path))
    assert (model.input.mean, model.input.std) == HALF == (model_from(path)[0].input.mean, source.input.std)


def test_a_detector_that_sees_boxes_otherwise_is_another_model(tmp_path):
    path = write(detector(aligned=True), tmp_path, "ours")
    assert model_from(path)[0].aligned
    with pytest.raises(ValueError, match="aligned True, the model False"):
        videomae.load_weights(detector(), path)


def test_transformers_has_no_detector(tmp_path):
    with pytest.raises(ValueError, match="transformers has no VideoMAE that detects"):
        save_hugging_face(detector(), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
