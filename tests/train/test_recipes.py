"""Recipes against the published tables, and every flag read by something."""

import dataclasses
import re
from pathlib import Path

import pytest

from train.cli import flat
from train.recipes import PRETRAIN

ROOT = Path(__file__).resolve().parents[2]

# RECIPES D.2: size, epochs, total batch, base lr, lr, mask ratio, stride, decoder depth
PUBLISHED = {
    "k400-small-1600": ("vit_small", 1600, 1024, 1.5e-4, 6e-4, 0.9, 4, 4),
    "k400-base-800": ("vit_base", 800, 2048, 1.5e-4, 1.2e-3, 0.9, 4, 4),
    "k400-base-1600": ("vit_base", 1600, 2048, 1.5e-4, 1.2e-3, 0.9, 4, 4),
    "k400-large-1600": ("vit_large", 1600, 512, 1.5e-4, 3e-4, 0.9, 4, 12),
    "k400-huge-1600": ("vit_huge", 1600, 1024, 1.5e-4, 6e-4, 0.9, 4, 12),
    "ssv2-small-2400": ("vit_small", 2400, 2048, 1.5e-4, 1.2e-3, 0.9, 2, 4),
    "ssv2-base-800": ("vit_base", 800, 2048, 1.5e-4, 1.2e-3, 0.9, 2, 4),
    "ssv2-base-2400": ("vit_base", 2400, 2048, 1.5e-4, 1.2e-3, 0.9, 2, 4),
    "ucf101-base-3200": ("vit_base", 3200, 192, 3e-4, 2.25e-4, 0.75, 4, 4),
    "hmdb51-base-4800": ("vit_base", 4800, 192, 3e-4, 2.25e-4, 0.75, 2, 4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_numbers(name):
    size, epochs, batch, base_lr, lr, ratio, stride, depth = PUBLISHED[name]
    config = PRETRAIN[name]()
    assert (config.recipe, config.model.size, config.epochs, config.steps) == (name, size, epochs, None)
    assert (config.batch_size, config.optim.base_lr, config.mask.ratio) == (batch, base_lr, ratio)
    assert (config.sampling.stride, config.data.views_per_decode, config.model.decoder_depth) == (stride, 1, depth)
    assert config.optim.base_lr * config.batch_size / 256 == pytest.approx(lr)
    # RECIPES D.1
    optim = config.optim
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip_grad) == ((0.9, 0.95), 1e-8, 0.05, None)
    assert (optim.min_lr, optim.warmup_epochs) == (1e-5, 40)
    assert config.augment.scales == (1, 0.875, 0.75, 0.66)
    assert not config.augment.flip
    assert (config.model.frames, config.model.image_size, config.model.cube) == (16, 224, (2, 16, 16))
    assert (config.mask.kind, config.target.normalize) == ("tube", True)
    assert config.model.recompute == ("block" if size == "vit_huge" else "none")


def test_every_recipe_gives_its_command_and_is_called_by_its_name():
    assert set(PUBLISHED) | {"demo", "demo-scenes", "tiny"} == set(PRETRAIN)
    for name, recipe in PRETRAIN.items():
        assert f"python -m train.pretrain {name}".removesuffix(" demo") in recipe.__doc__
        assert recipe().recipe == name
    for name in PUBLISHED:
        assert re.search(r"Published on \d+ GPUs.*top-1", PRETRAIN[name].__doc__), name


def test_every_setting_is_read_somewhere():
    source = "\n".join(p.read_text() for folder in ("train", "videomae") for p in sorted((ROOT / folder).rglob("*.py")))
    for name in flat(PRETRAIN["demo"]()):
        field = name.rpartition(".")[2]
        assert re.search(rf"\.{field}\b", source), f"nothing reads {name}"


def test_settings_are_frozen():
    config = PRETRAIN["demo"]()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.frames = 3
