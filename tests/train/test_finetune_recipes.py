"""The published numbers (RECIPES E.1 to E.3), written out a second time."""

import dataclasses
import re

import pytest

from train.finetune_recipes import FINETUNE, FinetuneConfig, FinetuneData, FinetuneModel
from videomae.data.mix import Erasing, Mixing
from videomae.data.rand_augment import RandAugment

# recipe: size, epochs, batch, views, base lr, lr, layer decay, drop path, head dropout, least base lr, sampling
E2 = {
    "k400-small-1600": ("vit_small", 150, 384, 2, 5e-4, 7.5e-4, 0.75, 0.1, 0, 1e-6, ("dense", 4)),
    "k400-base-800": ("vit_base", 100, 512, 1, 1e-3, 2e-3, 0.75, 0.1, 0, 1e-6, ("dense", 4)),
    "k400-base-1600": ("vit_base", 75, 384, 2, 5e-4, 7.5e-4, 0.75, 0.1, 0, 1e-6, ("dense", 4)),
    "k400-large-1600": ("vit_large", 35, 128, 2, 2e-3, 1e-3, 0.75, 0.1, 0, 1e-6, ("dense", 4)),
    "k400-huge-1600": ("vit_huge", 50, 512, 2, 1e-3, 2e-3, 0.75, 0.2, 0.5, 1e-5, ("dense", 4)),
    "ssv2-small-2400": ("vit_small", 40, 384, 2, 1e-3, 1.5e-3, 0.7, 0.1, 0, 1e-6, ("uniform", 4)),
    "ssv2-base-800": ("vit_base", 50, 512, 1, 5e-4, 1e-3, 0.75, 0.1, 0, 1e-6, ("uniform", 4)),
    "ssv2-base-2400": ("vit_base", 30, 384, 2, 5e-4, 7.5e-4, 0.75, 0.1, 0, 1e-6, ("uniform", 4)),
    "ucf101-base-3200": ("vit_base", 100, 128, 2, 5e-4, 2.5e-4, 0.7, 0.2, 0.5, 1e-5, ("dense", 4)),
}
# the paper's own: the same, without the least learning rate
E3 = {
    "hmdb51-base-4800": ("vit_base", 50, 128, 2, 1e-3, 5e-4, 0.7, 0.2, 0, 1e-6, ("dense", 2)),
    "k400-small-paper": ("vit_small", 150, 512, 2, 1e-3, 2e-3, 0.7, 0.1, 0, 1e-6, ("dense", 4)),
    "k400-base-paper": ("vit_base", 75, 512, 2, 1e-3, 2e-3, 0.75, 0.1, 0, 1e-6, ("dense", 4)),
    "k400-large-paper": ("vit_large", 50, 512, 2, 1e-3, 2e-3, 0.75, 0.2, 0.5, 1e-6, ("dense", 4)),
    "k400-huge-paper": ("vit_huge", 50, 512, 2, 1e-3, 2e-3, 0.75, 0.2, 0.5, 1e-6, ("dense", 4)),
    "ssv2-small-paper": ("vit_small", 40, 512, 2, 1e-3, 2e-3, 0.7, 0.1, 0, 1e-6, ("uniform", 4)),
    "ssv2-base-paper": ("vit_base", 40, 512, 2, 5e-4, 1e-3, 0.75, 0.1, 0, 1e-6, ("uniform", 4)),
    "ssv2-large-paper": ("vit_large", 30, 512, 2, 5e-4, 1e-3, 0.75, 0.2, 0.5, 1e-6, ("uniform", 4)),
}


@pytest.mark.parametrize("name", E2 | E3)
def test_is_as_published(name):
    size, epochs, batch, views, base_lr, lr, decay, drop_path, dropout, min_lr, sampling = (E2 | E3)[name]
    recipe = FINETUNE[name]()
    model, optim = recipe.model, recipe.optim
    assert (model.size, recipe.epochs, recipe.batch_size, recipe.data.views_per_decode) == (size, epochs, batch, views)
    assert optim.base_lr == base_lr
    assert optim.base_lr * recipe.batch_size / 256 == pytest.approx(lr)
    assert (optim.layer_decay, optim.min_lr, optim.warmup_epochs) == (decay, min_lr, 5)
    assert (optim.weight_decay, optim.betas, optim.eps, optim.clip_grad) == (0.05, (0.9, 0.999), 1e-8, None)
    assert (model.drop_path, model.head_dropout, model.init_scale) == (drop_path, dropout, 0.001)
    assert (recipe.sampling.kind, recipe.sampling.stride) == sampling
    assert (model.frames, model.image_size, model.cube) == (16, 224, (2, 16, 16))
    assert recipe.augment.flip == (not name.startswith("ssv2"))
    assert recipe.rand_augment == RandAugment(9 if name in E3 and "paper" in name else 7, ops=4, deviation=0.5)
    assert recipe.erasing == Erasing(0.25, (0.02, 1 / 3))
    assert recipe.mix == Mixing(mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5)
    assert recipe.smoothing == 0.1
    assert recipe.ema is None
    assert recipe.steps is None


@pytest.mark.parametrize(("name", "epochs"), [("k400-base-scratch", 200), ("ssv2-base-scratch", 100)])
def test_from_scratch_all_layers_learn_alike(name, epochs):
    recipe = FINETUNE[name]()
    assert (recipe.epochs, recipe.optim.layer_decay, recipe.weights) == (epochs, 1.0, None)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("ssv2-base-from-k400", "ssv2-base-paper"),
        ("ucf101-base-from-k400", "ucf101-base-3200"),
        ("hmdb51-base-from-k400", "hmdb51-base-4800"),
    ],
)
def test_a_transfer_differs_by_its_weights_only(name, own):
    assert dataclasses.replace(FINETUNE[name](), recipe=own) == FINETUNE[own]()


@pytest.mark.parametrize("name", FINETUNE)
def test_names_its_command(name):
    recipe = FINETUNE[name]
    assert recipe().recipe == name
    assert re.search(r"python -m train\.finetune( \S+)?", recipe.__doc__)
    if name != "demo":
        assert f"train.finetune {name} --data" in recipe.__doc__


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dataclasses.replace(FINETUNE["ssv2-base-800"](), augment=FINETUNE["k400-base-800"]().augment), "left"),
        (lambda: FinetuneConfig("x", smoothing=1.0), "smoothing"),
        (lambda: FinetuneConfig("x", ema=1.0), "ema"),
        (lambda: FinetuneConfig("x", weights=""), "weights"),
        (lambda: FinetuneConfig("x", validate_every=-1), "validate-every"),
        (lambda: FinetuneModel(drop_path=1.0), "drop-path"),
        (lambda: FinetuneModel("vit_giant"), "vit_base"),
        (lambda: FinetuneModel(recompute="all"), "recompute"),
        (lambda: FinetuneConfig("x", data=FinetuneData(views_per_decode=2), mix=Mixing(group=6)), "group"),
    ],
)
def test_refuses(make, says):
    with pytest.raises(ValueError, match=says):
        make()
