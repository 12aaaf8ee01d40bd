"""Schedule, parameter groups, and steps that are skipped on the device."""

import numpy as np
import pytest
import torch

import videomae
from train.optim import FinetuneOptim, Optim, Schedule, Updater, parameter_groups, resolve_precision, schedule

CPU = torch.device("cpu")


def test_schedule_follows_the_published_one_step_by_step():
    # K400 base: 1.5e-4 and 1e-5 for 256, batch 2048
    made = schedule(Optim(), batch_size=2048, steps=1000, warmup_steps=50)
    assert made.peak == pytest.approx(1.2e-3)
    assert made.floor == pytest.approx(8e-5)
    cosine = [8e-5 + 0.5 * (1.2e-3 - 8e-5) * (1 + np.cos(np.pi * i / 950)) for i in range(950)]
    expected = [*np.linspace(0, 1.2e-3, 50), *cosine]
    assert [made.at(step) for step in range(1000)] == pytest.approx(expected, rel=1e-9)
    assert made.at(999) > made.floor


@pytest.mark.parametrize(("warmup", "first"), [(0, 1.0), (1, 0.0), (2, 0.0)])
def test_schedule_has_short_warm_ups(warmup, first):
    made = Schedule(1.0, 0.0, warmup, 10)
    assert made.at(0) == first
    assert made.at(warmup) == 1.0


def test_refuses_a_warm_up_as_long_as_the_run():
    with pytest.raises(ValueError, match="shorter than the run"):
        schedule(Optim(), batch_size=256, steps=10, warmup_steps=10)


def test_decays_matrices_only():
    model = videomae.pretrain_model("vit_tiny", image_size=32, decoder_depth=1)
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0
    assert {names[id(p)] for p in decayed["params"]} == {
        name
        for name in names.values()
        if name.endswith(
            ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight", "encoder_to_decoder.weight")
        )
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def small(config=None, precision="float32"):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    return model, Updater(model, config or Optim(), Schedule(0.1, 0.0, 0, 10), precision, CPU)


def test_updates_as_adamw_does():
    model, updater = small()
    twin = torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    reference = torch.optim.AdamW(parameter_groups(twin, 0.05), lr=0.1, betas=(0.9, 0.95))
    x = torch.randn(4, 3)
    for step in range(3):
        for group in reference.param_groups:
            group["lr"] = updater._schedule.at(step)
        twin(x).square().mean().backward()
        reference.step()
        reference.zero_grad()
        for half in (x[:2], x[2:]):
            (model(half).square().mean() / 2 * updater.loss_scale).backward()
        updater.set_rate(step)
        stats = updater.step(torch.zeros(()))
        updater.optimizer.zero_grad()
        assert stats.nonfinite == 0
        torch.testing.assert_close(model.weight, twin.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    model, updater = small(Optim(clip_grad=1.0))
    (model(torch.randn(4, 3)).sum() * updater.loss_scale).backward()
    updater.set_rate(0)
    updater.step(torch.zeros(()))
    updater.optimizer.zero_grad()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = updater.optimizer.state[model.weight]["exp_avg"].clone()
    count = updater.optimizer.state[model.weight]["step"].clone()
    ((model(torch.randn(4, 3)) * torch.tensor([1.0, bad])).sum() * updater.loss_scale).backward()
    stats = updater.step(torch.zeros(()))
    assert stats.nonfinite == 1
    assert not stats.grad_norm.isfinite()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert torch.equal(updater.optimizer.state[model.weight]["exp_avg"], moments)
    assert torch.equal(updater.optimizer.state[model.weight]["step"], count)
    updater.optimizer.zero_grad()
    (model(torch.randn(4, 3)).sum() * updater.loss_scale).backward()
    assert updater.step(torch.zeros(())).nonfinite == 0
    assert not torch.equal(model.weight, weights["weight"])


def test_a_loss_that_is_not_finite_counts_even_if_its_gradient_is_and_so_does_a_step_without_clips():
    model, updater = small()
    before = model.weight.clone()
    (model(torch.randn(4, 3)).sum() * updater.loss_scale).backward()
    updater.set_rate(0)
    assert updater.step(torch.tensor(float("inf"))).nonfinite == 1
    (model(torch.randn(4, 3)).sum() * 0 * updater.loss_scale).backward()
    assert updater.step(torch.zeros(()), skip=True).nonfinite == 0
    assert torch.equal(model.weight, before)


def test_clips_the_norm_and_reports_it_unclipped():
    model, updater = small(Optim(clip_grad=1e-3))
    (model(torch.ones(1, 3)).sum() * 100 * updater.loss_scale).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert updater.step(torch.zeros(())).grad_norm.item() == pytest.approx(norm.item())
    # AdamW's first moment is a tenth of the clipped gradient
    moment = torch.cat([updater.optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()]).norm()
    assert moment.item() == pytest.approx(1e-4, rel=1e-3)


def test_grad_factor_scales_gradients():
    model, updater = small()
    (model(torch.ones(1, 3)).sum() * updater.loss_scale).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert updater.step(torch.zeros(()), grad_factor=4.0).grad_norm.item() == pytest.approx(4 * norm.item())


def test_float16_scales_the_loss_and_takes_it_out_of_the_gradients():
    model, updater = small(precision="float16")
    assert updater.loss_scale.item() == 65536
    x = torch.ones(1, 3)
    (model(x).square().mean() * updater.loss_scale).backward()
    twin = torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    twin(x).square().mean().backward()
    torch.testing.assert_close(model.weight.grad, twin.weight.grad * 65536)
    norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    assert updater.step(torch.zeros(())).grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)


def test_precision_is_resolved_by_device():
    assert resolve_precision("auto", CPU) == "float32"
    assert resolve_precision("bfloat16", CPU) == "bfloat16"
    with pytest.raises(ValueError, match="needs a GPU"):
        resolve_precision("float16", CPU)


@pytest.mark.parametrize(
    "bad",
    [
        {"base_lr": 0},
        {"warmup_epochs": -1},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"eps": 0},
        {"clip_grad": 0},
        {"max_nonfinite": 0},
    ],
    ids=str,
)
def test_refuses_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=r"optim\.|learning rates"):
        Optim(**bad)


def test_going_on_takes_the_moments_of_the_file_and_the_settings_of_the_run():
    model, old = small(Optim(weight_decay=0.05))
    (model(torch.ones(1, 3)).sum() * old.loss_scale).backward()
    old.set_rate(0)
    old.step(torch.zeros(()))
    model, new = small(Optim(weight_decay=0.3, betas=(0.5, 0.6)))
    new.load_state_dict(old.state_dict() | {"optimizer": dict(old.moments())})
    assert [group["weight_decay"] for group in new.optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.5, 0.6) for group in new.optimizer.param_groups)
    assert not any(group["capturable"] for group in new.optimizer.param_groups)
    kept = next(iter(old.optimizer.state.values()))["exp_avg"]
    assert torch.equal(new.optimizer.state[model.weight]["exp_avg"], kept)
    new.set_rate(0)
    assert all(group["lr"].item() == pytest.approx(0.1) for group in new.optimizer.param_groups)


def test_moments_of_another_model_are_refused():
    model, updater = small()
    with pytest.raises(ValueError, match=r"knows 1 other parameters: decoder\.weight"):
        updater.load_state_dict({"scaler": {}, "optimizer": {"decoder.weight.exp_avg": torch.zeros(3)}})


def test_float16_goes_on_from_a_run_that_did_not_scale():
    _, old = small()
    _, new = small(precision="float16")
    new.load_state_dict(old.state_dict() | {"optimizer": {}})
    assert new.loss_scale.item() == 65536


@pytest.mark.parametrize(
    ("size", "decay", "rates"),
    [
        (
            "vit_base",
            0.75,
            {"patch_embed.proj.weight": 0.023757, "blocks.0.norm1.bias": 0.031676, "blocks.11.mlp.fc2.weight": 0.75},
        ),
        ("vit_large", 0.75, {"patch_embed.proj.bias": 7.53e-4, "blocks.23.attn.q_bias": 0.75}),
        ("vit_huge", 0.75, {"patch_embed.proj.weight": 7.5e-5}),
        ("vit_small", 0.7, {"patch_embed.proj.weight": 0.009689, "blocks.0.attn.qkv.weight": 0.013841}),
        ("vit_base", 1.0, {"patch_embed.proj.weight": 1.0}),
    ],
)
def test_decays_the_rate_from_the_head_down(size, decay, rates):
    with torch.device("meta"):
        model = videomae.classifier(size, num_classes=3)
    groups = parameter_groups(model, 0.05, decay)
    found = {id(p): group for group in groups for p in group["params"]}
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(by_name)
    # the multipliers of RECIPES E.1, and 1 for what comes after the blocks
    for name, rate in rates.items():
        assert by_name[name]["rate"] == pytest.approx(rate, rel=6e-3 if rate < 1e-3 else 3e-5)
    for name in ("fc_norm.weight", "head.weight", "head.bias"):
        assert by_name[name]["rate"] == 1
    for name, parameter in model.named_parameters():
        assert by_name[name]["weight_decay"] == (0 if parameter.ndim <= 1 else 0.05)


def test_every_layer_moves_by_its_own_rate():
    torch.manual_seed(0)
    model = videomae.classifier("vit_tiny", num_classes=2, frames=2, image_size=16, cube=(2, 8, 8))
    updater = Updater(model, FinetuneOptim(layer_decay=0.5, weight_decay=0), Schedule(0.1, 0.0, 0, 10), "float32", CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    updater.set_rate(0)
    updater.step(torch.tensor(1.0))
    # Adam's first step is the learning rate itself; two blocks: embedding 1/8, blocks 1/4 and 1/2, the rest 1
    for name, rate in {
        "patch_embed.proj": 1 / 8,
        "blocks.0.": 1 / 4,
        "blocks.1.": 1 / 2,
        "head": 1,
        "fc_norm": 1,
    }.items():
        moved = [before[n] - p.detach() for n, p in model.named_parameters() if n.startswith(name)]
        assert moved
        for change in moved:
            torch.testing.assert_close(change, torch.full_like(change, 0.1 * rate), rtol=1e-4, atol=1e-6)
