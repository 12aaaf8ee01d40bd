"""objective: what a pre-training step minimises is the loss that the configuration names, of its masks and weights."""

from dataclasses import replace

import pytest
import torch

import kernels
import videomae
from kernels.pixel_loss import ERRORS
from train.objective import PretrainObjective
from train.pretrain import Pretraining
from train.recipes import PRETRAIN, Target


@pytest.mark.parametrize(
    "target", [Target(loss=loss) for loss in ERRORS] + [Target(normalize=False, loss="l1")], ids=str
)
def test_it_is_the_loss_that_was_asked_for(target):
    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_tiny", frames=4, image_size=16, cube=(2, 8, 8), decoder_depth=1)
    objective = Pretraining(replace(PRETRAIN["demo"](), target=target)).objective(model, "float32")
    frames, keys = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8), torch.arange(2)
    weight = torch.tensor([0.5, 2.0])
    mask = objective.mask(keys)
    options = {"cube": (2, 8, 8), "weight": weight, "scale": 0.5, "error": target.loss}
    wanted = kernels.pixel_loss(objective.predict(frames, mask), frames, mask.predicted, target.normalize, **options)
    torch.testing.assert_close(objective(frames, keys, weight, 0.5), wanted)
    plain = PretrainObjective(model, mask_ratio=0.75)(frames, keys, weight, 0.5)
    assert (objective(frames, keys, weight, 0.5) == plain) == (target == Target())
