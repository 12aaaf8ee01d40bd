"""Our models against transformers' on the same weights: prediction, loss, every gradient, and logits, at the real size.

transformers differs in LayerNorm's epsilon alone (1e-12 in blocks, 1e-5 in the last norms): it is set to ours here.
"""

import pytest
import torch
from torch import Tensor, nn

import kernels
import videomae
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from videomae import hugging_face, masking
from videomae.blocks import NORM_EPS
from videomae.weights import save_hugging_face

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LONG = pytest.mark.long
# relative, max |a - b| / max |b|, float32: about 2e-6 is seen
TOLERANCE = 1e-4


def fill_(model: nn.Module) -> None:
    """Random weights of their usual size, and biases and norms that are not 0 and 1, so that each of them matters."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 1:
                weight.copy_(noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)


def theirs_from(kind: type, model: nn.Module, folder) -> nn.Module:
    """transformers' model of the same weights, by way of the folder that we write: nothing missing, nothing spare."""
    save_hugging_face(model, folder)
    theirs, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = NORM_EPS
    return theirs.train(False)


def as_pixel_values(frames: Tensor) -> Tensor:
    """uint8 [B, T, H, W, C] as transformers takes it: normalised, [B, T, C, H, W]."""
    normalised = (frames.float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return normalised.permute(0, 1, 4, 2, 3).contiguous()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def assert_close(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    errors = {name: relative_error(got, wanted) for name, (got, wanted) in pairs.items()}
    worst = max(errors, key=errors.__getitem__)
    print(f"worst of {len(errors)}: {worst} {errors[worst]:.1e}")
    assert errors[worst] <= TOLERANCE, f"{worst} is off by {errors[worst]:.1e}"


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not missing, missing
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("size", ["vit_small", pytest.param("vit_base", marks=LONG)])
def test_pretraining_gives_their_prediction_loss_and_gradients(size, tmp_path):
    torch.manual_seed(0)
    ours = videomae.pretrain_model(size, decoder_depth=4)
    fill_(ours)
    theirs = theirs_from(transformers.VideoMAEForPreTraining, ours, tmp_path)
    frames = torch.randint(0, 256, (1, 16, 224, 224, 3), dtype=torch.uint8)
    mask = masking.tube((8, 14, 14), 0.9, keys=torch.tensor([7]))

    pred = ours(frames, mask)
    loss = kernels.pixel_loss(pred, frames, mask.masked)
    loss.backward()
    reference = theirs(as_pixel_values(frames), bool_masked_pos=mask.to_bool())
    reference.loss.backward()

    assert_close({"prediction": (pred, reference.logits), "loss": (loss, reference.loss)})
    got, wanted = gradients_of(ours), hugging_face.to_official(gradients_of(theirs))
    assert got.keys() == wanted.keys()
    assert_close({name: (got[name], wanted[name]) for name in got})


def test_pretraining_agrees_for_a_random_upstream_gradient_and_several_clips(tmp_path):
    # small: the loss's own gradient is smooth, and one clip hides a mixed-up batch axis
    torch.manual_seed(1)
    ours = videomae.pretrain_model("vit_tiny", frames=4, image_size=64, decoder_depth=2)
    fill_(ours)
    theirs = theirs_from(transformers.VideoMAEForPreTraining, ours, tmp_path)
    frames = torch.randint(0, 256, (3, 4, 64, 64, 3), dtype=torch.uint8)
    mask = masking.random((2, 4, 4), 0.75, keys=torch.tensor([1, 2, 3]))
    pred, reference = ours(frames, mask), theirs(as_pixel_values(frames), bool_masked_pos=mask.to_bool())
    upstream = torch.randn_like(pred)
    pred.backward(upstream)
    reference.logits.backward(upstream)
    got, wanted = gradients_of(ours), hugging_face.to_official(gradients_of(theirs))
    loss = kernels.pixel_loss(pred, frames, mask.masked)
    assert_close({"prediction": (pred, reference.logits), "loss": (loss, reference.loss)})
    assert_close({name: (got[name], wanted[name]) for name in wanted})


@pytest.mark.parametrize(
    ("size", "num_classes", "frames", "side", "batch"),
    [
        # every weight has its real shape; few tokens, so that it is quick
        ("vit_small", 174, 4, 64, 2),
        pytest.param("vit_small", 400, 16, 224, 1, marks=LONG),
        pytest.param("vit_base", 174, 8, 112, 1, marks=LONG),
        pytest.param("vit_base", 400, 8, 112, 1, marks=LONG),
    ],
)
def test_a_classifier_gives_their_logits_and_gradients(size, num_classes, frames, side, batch, tmp_path):
    torch.manual_seed(2)
    ours = videomae.classifier(size, num_classes=num_classes, frames=frames, image_size=side, drop_path=0.1).eval()
    fill_(ours)
    theirs = theirs_from(transformers.VideoMAEForVideoClassification, ours, tmp_path)
    clips = torch.randint(0, 256, (batch, frames, side, side, 3), dtype=torch.uint8)
    logits, reference = ours(clips), theirs(as_pixel_values(clips)).logits
    upstream = torch.randn_like(logits)
    logits.backward(upstream)
    reference.backward(upstream)
    assert_close({"logits": (logits, reference)})
    got, wanted = gradients_of(ours), hugging_face.to_official(gradients_of(theirs))
    assert got.keys() == wanted.keys()
    assert_close({name: (got[name], wanted[name]) for name in got})


def test_an_encoder_gives_their_features(tmp_path):
    torch.manual_seed(3)
    ours = videomae.encoder("vit_tiny", frames=4, image_size=64)
    fill_(ours)
    theirs = theirs_from(transformers.VideoMAEModel, ours, tmp_path)
    frames = torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert_close({"features": (ours(frames), theirs(as_pixel_values(frames)).last_hidden_state)})


@pytest.mark.parametrize("kind", ["VideoMAEForPreTraining", "VideoMAEForVideoClassification"])
def test_what_transformers_saves_loads_with_the_same_output(kind, tmp_path):
    # the other direction: its random weights, saved by it (under version 4's bias names, as 5.23 still writes them)
    torch.manual_seed(4)
    pretrains = kind == "VideoMAEForPreTraining"
    config = transformers.VideoMAEConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=64, num_frames=4,
        decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=256, layer_norm_eps=NORM_EPS, use_mean_pooling=not pretrains, num_labels=5,
    )  # fmt: skip
    theirs = getattr(transformers, kind)(config).eval()
    fill_(theirs)
    for norm in (theirs.decoder.norm,) if pretrains else (theirs.fc_norm,):
        norm.eps = NORM_EPS
    theirs.save_pretrained(tmp_path)
    frames = torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8)
    mask = masking.tube((2, 4, 4), 0.5, keys=torch.tensor([5, 6]))
    if pretrains:
        ours = videomae.pretrain_model("vit_tiny", frames=4, image_size=64, decoder_depth=2)
    else:
        ours = videomae.classifier("vit_tiny", num_classes=5, frames=4, image_size=64).eval()
    report = videomae.load_weights(ours, tmp_path)
    assert report.format == "hugging face"
    assert not report.fresh
    assert not report.ignored
    with torch.no_grad():
        got = ours(frames, mask) if pretrains else ours(frames)
        pixels = as_pixel_values(frames)
        wanted = theirs(pixels, bool_masked_pos=mask.to_bool()) if pretrains else theirs(pixels)
        assert_close({"output": (got, wanted.logits)})
