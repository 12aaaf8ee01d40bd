"""The settings of contrastive pre-training: the paper's, written out a second time, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from train.cli import flat
from train.moco_recipes import MOCO, Contrast, MocoConfig, MocoData, MocoModel
from train.recipes import PRETRAIN

ROOT = Path(__file__).resolve().parents[2]


def test_has_the_papers_numbers():
    config = MOCO["k400-base"]()
    assert (config.contrast.temperature, config.contrast.momentum) == (0.2, 0.99)
    assert (config.model.size, config.model.hidden, config.model.width) == ("vit_base", 4096, 256)
    assert config.model.frozen_cubes
    optim = config.optim
    assert (optim.base_lr, optim.weight_decay, optim.betas, optim.warmup_epochs) == (1.5e-4, 0.1, (0.9, 0.999), 40)
    augment = config.augment
    assert (augment.area, augment.flip, augment.jitter, augment.grey) == ((0.08, 1.0), True, 0.8, 0.2)
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.4, 0.4, 0.2, 0.1)


def test_the_demo_is_pre_trainings_but_for_what_contrast_needs():
    config, other = MOCO["demo"](), PRETRAIN["demo"]()
    assert (config.steps, config.batch_size, config.data.views_per_decode) == (other.steps, other.batch_size, 2)
    assert (config.model.size, config.model.input, config.sampling) == (
        other.model.size,
        other.model.input,
        other.sampling,
    )
    # its classes are directions
    assert not config.augment.flip


def test_every_recipe_gives_its_command_and_is_called_by_its_name():
    for name, recipe in MOCO.items():
        assert f"python -m train.moco {name}".removesuffix(" demo") in recipe.__doc__
        assert recipe().recipe == name


def test_every_setting_is_read_somewhere():
    source = "\n".join(p.read_text() for folder in ("train", "videomae") for p in sorted((ROOT / folder).rglob("*.py")))
    for name in flat(MOCO["demo"]()):
        assert re.search(rf"\.{name.rpartition('.')[2]}\b", source), f"nothing reads {name}"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MocoModel(hidden=0), "model.hidden must be at least 1"),
        (lambda: MocoModel(width=1), "model.width must be at least 2"),
        (lambda: MocoData(views_per_decode=4), "data.views-per-decode must be 2 here; got 4"),
        (lambda: Contrast(temperature=0), "contrast.temperature must be in"),
        (lambda: Contrast(momentum=1), r"contrast.momentum must be in \[0, 1\)"),
        (lambda: MocoConfig("demo", steps=1, batch_size=1), "batch-size must be at least 2"),
        (lambda: MocoConfig("demo", steps=1, micro_batch=3), "micro-batch must be even, and at least 4"),
        (lambda: replace(MOCO["demo"](), micro_batch=2), "micro-batch must be even, and at least 4"),
        (lambda: replace(MOCO["demo"](), micro_batch=48), "micro-batch 48 does not divide a step's 128 clips"),
    ],
)
def test_refuses_what_cannot_be(make, says):
    with pytest.raises(ValueError, match=says):
        make()
