"""The detection loss: every class of every box by itself, the same for any micro-batch and any filling up."""

import copy

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from train.objective import DetectObjective
from videomae.detector import detector


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = detector("vit_tiny", num_classes=3, frames=4, image_size=16, cube=(2, 8, 8), drop_path=0, init_scale=40)
    return made.double()


def batch(clips=3, boxes=4):
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(clips, 4, 16, 16, 3, generator=generator, dtype=torch.float64)
    corners = torch.rand(clips, boxes, 2, generator=generator, dtype=torch.float64) * 8
    sides = torch.rand(clips, boxes, 2, generator=generator, dtype=torch.float64) * 7
    labels = torch.randint(0, 2, (clips, boxes, 3), generator=generator, dtype=torch.uint8)
    valid = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])[:clips, :boxes].bool()
    return {"frames": frames, "boxes": torch.cat((corners, corners + sides), -1), "labels": labels, "valid": valid}


def test_is_the_mean_over_classes_added_up_over_boxes(model):
    given = batch()
    logits = model(given["frames"], given["boxes"])
    wanted = 0.0
    for clip, box in given["valid"].nonzero().tolist():
        for c in range(3):
            x, y = logits[clip, box, c], given["labels"][clip, box, c]
            wanted += (-logsigmoid(x) if y else -logsigmoid(-x)) / 3
    assert DetectObjective(model)(**given).item() == pytest.approx(wanted.item() / 3, rel=1e-6)
    assert DetectObjective(model, sum_over=8)(**given).item() == pytest.approx(wanted.item() * 8 / 3, rel=1e-6)
    assert DetectObjective(model)(**given, scale=0.25).item() == pytest.approx(wanted.item() / 12, rel=1e-6)


def test_on_a_gpu_of_that_many_clips_it_is_the_published_one(model):
    """Mean over all boxes and classes, times the number of boxes (RECIPES H.4)."""
    given = batch()
    logits = model(given["frames"], given["boxes"])[given["valid"]]
    labels = given["labels"][given["valid"]].double()
    published = binary_cross_entropy_with_logits(logits, labels) * len(logits)
    assert DetectObjective(model, sum_over=3)(**given).item() == pytest.approx(published.item(), rel=1e-6)


def test_half_precision_ends_before_the_loss(model):
    given = {**batch(), "frames": batch()["frames"].float(), "boxes": batch()["boxes"].float()}
    narrow = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = narrow(given["frames"], given["boxes"])
    assert logits.dtype == torch.bfloat16
    logits, labels = logits[given["valid"]].float(), given["labels"][given["valid"]].float()
    wanted = binary_cross_entropy_with_logits(logits, labels) * len(logits) / 3
    loss = DetectObjective(narrow, autocast=torch.bfloat16)(**given)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_micro_batches_add_up_to_the_batch(model):
    given = batch()
    whole = DetectObjective(model)(**given)
    parts = [DetectObjective(model)(**{k: v[i : i + 1] for k, v in given.items()}, scale=1 / 3) for i in range(3)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_what_only_fills_up_changes_nothing(model):
    given = batch()
    other = {**given, "boxes": given["boxes"].clone(), "labels": given["labels"].clone()}
    other["boxes"][~given["valid"]] = 3.0
    other["labels"][~given["valid"]] = 1 - other["labels"][~given["valid"]]
    assert torch.equal(DetectObjective(model)(**given), DetectObjective(model)(**other))


def test_a_clip_without_weight_counts_for_nothing(model):
    given = batch()
    weight = torch.tensor([1.0, 0.0, 1.0])
    left = {k: v[[0, 2]] for k, v in given.items()}
    wanted = DetectObjective(model)(**left)
    given["frames"][1] = 1e6
    loss = DetectObjective(model)(**given, weight=weight)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    gradients = [torch.autograd.grad(one, model.head.weight)[0] for one in (loss, wanted)]
    torch.testing.assert_close(*gradients)


def test_a_batch_of_nothing_is_zero(model):
    given = batch()
    given["valid"] = torch.zeros_like(given["valid"])
    assert DetectObjective(model)(**given).item() == 0
    assert DetectObjective(model)(**given, weight=torch.zeros(3)).item() == 0


@pytest.mark.long
def test_is_compiled_in_one_piece(model):
    given = batch()
    torch._dynamo.reset()
    compiled = torch.compile(DetectObjective(model), fullgraph=True, dynamic=False, backend="aot_eager")
    losses = [one(**given, weight=torch.ones(3)) for one in (DetectObjective(model), compiled)]
    gradients = [torch.autograd.grad(loss, model.blocks[0].mlp.fc1.weight)[0] for loss in losses]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
