"""The two sides of the fine-tuning bench at a tiny size: one loss from the same weights, and both train."""

from dataclasses import replace

import pytest
import torch

from bench.finetune_steps import TheirStep, our_step, our_step_on_tensors, plain, recipe
from bench.shapes import Shape

SMALL = Shape("vit_tiny", clips=2, width=64, heads=4, decoder_width=64, frames=4, side=48)


@pytest.fixture
def sides(tmp_path):
    pytest.importorskip("transformers")
    with_all = recipe(SMALL, 5, tmp_path / "recipe")
    first = our_step(with_all, SMALL)
    return {
        "recipe": first,
        "plain": our_step(plain(recipe(SMALL, 5, tmp_path / "plain")), SMALL, first.model),
        "tensors": our_step_on_tensors(plain(recipe(SMALL, 5, tmp_path / "tensors")), SMALL, first.model),
        "transformers": TheirStep(SMALL, first.model),
    }


def test_all_sides_give_one_loss_and_train(sides):
    wanted = sides["transformers"].loss()
    for name in ("plain", "tensors"):
        torch.testing.assert_close(sides[name].loss(), wanted, rtol=1e-5, atol=0)
    assert wanted > 0.1
    for name, side in sides.items():
        before = [p.detach().clone() for p in side.model.parameters()]
        losses = [side.run(n) for n in range(8)]
        assert all(not torch.equal(a, b) for a, b in zip(before, side.model.parameters(), strict=True)), name
        if name != "recipe":
            assert losses[0] == pytest.approx(wanted.item(), rel=1e-5)
            assert losses[-1] < losses[0], name
    assert sides["transformers"].processing > 0


def test_the_recipe_is_the_published_one_but_for_batch_and_size(tmp_path):
    config = recipe(SMALL, 5, tmp_path)
    assert (config.mix.probability, config.erasing.probability) == (1, 0.25)
    assert (config.model.drop_path, config.optim.layer_decay) == (0.1, 0.75)
    assert replace(plain(config), mix=config.mix, erasing=config.erasing, smoothing=0.1, model=config.model) == config
