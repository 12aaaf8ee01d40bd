"""The published detection recipes (RECIPES H.5), written out a second time."""

import dataclasses
import re

import pytest

from train.detect_recipes import DETECT, DetectAugment, DetectConfig, DetectModel
from train.optim import parameter_groups
from videomae.data.sampling import KeyFrameClip
from videomae.detector import detector

# recipe: size, base lr, lr, layer decay, epochs, clips of a GPU
H5 = {
    "ava-small": ("vit_small", 1e-3, 5e-4, 0.6, 30, 8),
    "ava-base": ("vit_base", 2.5e-4, 1.25e-4, 0.75, 30, 4),
    "ava-large": ("vit_large", 2.5e-4, 1.25e-4, 0.75, 30, 4),
    "ava-huge": ("vit_huge", 5e-4, 2.5e-4, 0.8, 20, 2),
    "ava-small-k400": ("vit_small", 5e-4, 2.5e-4, 0.6, 30, 8),
    "ava-base-k400": ("vit_base", 5e-4, 2.5e-4, 0.75, 30, 4),
    "ava-large-k400": ("vit_large", 5e-4, 2.5e-4, 0.8, 20, 4),
    "ava-huge-k400": ("vit_huge", 5e-4, 2.5e-4, 0.8, 20, 2),
}


@pytest.mark.parametrize("name", H5)
def test_is_as_published(name):
    size, base_lr, lr, decay, epochs, gpu_batch = H5[name]
    recipe = DETECT[name]()
    model, optim = recipe.model, recipe.optim
    assert (model.size, recipe.epochs, recipe.batch_size, recipe.sum_over) == (size, epochs, 128, gpu_batch)
    assert optim.base_lr == base_lr
    assert optim.base_lr * recipe.batch_size / 256 == pytest.approx(lr)
    assert optim.min_lr * recipe.batch_size / 256 == pytest.approx(5e-7)
    assert (optim.layer_decay, optim.warmup_epochs) == (decay, 5)
    assert (optim.weight_decay, optim.betas, optim.eps, optim.clip_grad) == (0.05, (0.9, 0.999), 1e-8, None)
    assert (model.drop_path, model.init_scale, model.aligned, model.frozen) == (0.2, 0.001, False, False)
    assert (model.frames, model.image_size, model.cube) == (16, 224, (2, 16, 16))
    assert model.recompute == ("block" if size in ("vit_large", "vit_huge") else "none")
    assert recipe.clip == KeyFrameClip(stride=4, rate=25.0, short_side=256)
    assert recipe.augment == DetectAugment(flip=True, colour=True, jitter=True, max_boxes=100)
    assert (recipe.data.views_per_decode, recipe.data.least_score) == (1, 0.8)
    assert (recipe.validate_every, recipe.protocol, recipe.iou) == (10, "official", 0.5)
    assert recipe.steps is None


def test_every_published_run_has_a_recipe():
    assert set(DETECT) == {"demo", *H5}


@pytest.mark.parametrize("name", DETECT)
def test_names_its_command(name):
    recipe = DETECT[name]
    assert recipe().recipe == name
    line = (
        "python -m train.detect --weights"
        if name == "demo"
        else f"python -m train.detect {name} --data ava --weights W"
    )
    assert line in recipe.__doc__
    assert name == "demo" or re.search(r"\d\d\.\d mAP", recipe.__doc__)


def test_layers_learn_at_their_rates_and_the_last_norm_with_the_head():
    model = detector("vit_tiny", num_classes=3, frames=4, image_size=16, cube=(2, 8, 8))
    rates = {
        name: group["rate"]
        for group in parameter_groups(model, 0.05, 0.6)
        for name, parameter in model.named_parameters()
        if any(parameter is one for one in group["params"])
    }
    assert rates["head.weight"] == rates["norm.weight"] == 1
    assert rates["blocks.1.mlp.fc2.weight"] == pytest.approx(0.6)
    assert rates["blocks.0.attn.qkv.weight"] == pytest.approx(0.6**2)
    assert rates["patch_embed.proj.weight"] == pytest.approx(0.6**3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"validate_every": -1}, "validate-every"),
        ({"weights": ""}, "weights"),
        ({"protocol": "coco"}, "protocol"),
        ({"iou": 0}, "iou"),
        ({"clip": KeyFrameClip(short_side=200)}, "do not fit"),
        ({"sum_over": 0}, "sum-over"),
        ({"pictures": -1}, "pictures"),
    ],
)
def test_refuses_what_cannot_be(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(DETECT["ava-base"](), **change)


def test_refuses_parts_that_cannot_be():
    for make, says in (
        (lambda: DetectModel(drop_path=1), "drop-path"),
        (lambda: DetectAugment(max_boxes=0), "max-boxes"),
        (lambda: dataclasses.replace(DetectConfig("demo").data, least_score=2), "least-score"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
