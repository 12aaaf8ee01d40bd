"""MoCo v3's parts against formulas of their own."""

import math

import pytest
import torch
from torch.nn import functional

from videomae.classifier import classifier
from videomae.features import features_of
from videomae.moco import (
    BatchNorm,
    Contrasted,
    Head,
    compare,
    follow,
    momentum_at,
    momentum_encoder_of,
    spread,
)
from videomae.model import Encoder, Input, size_of
from videomae.weights import load_weights, model_from, save_weights

INPUT = Input(4, 16, (2, 8, 8))


def contrasted(seed=0):
    torch.manual_seed(seed)
    return Contrasted(size_of("vit_tiny"), INPUT, hidden=12, width=8)


def clips(count, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 16, 16, 3), generator=made, dtype=torch.uint8)


def info_nce(queries, keys, own, temperature, there):
    """By its definition, query by query: -2 tau log(exp(own / tau) / sum of exp(each / tau))."""
    losses = []
    for query, positive in zip(queries, own.tolist(), strict=True):
        cosines = [(query @ key) / (query.norm() * key.norm()) for key in keys]
        others = sum((c / temperature).exp() for c, t in zip(cosines, there.tolist(), strict=True) if t)
        losses.append(-2 * temperature * ((cosines[positive] / temperature).exp() / others).log())
    return torch.stack(losses)


@pytest.mark.parametrize("there", [[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0, 1]], ids=["all keys", "five of seven"])
def test_compares_as_info_nce_is_defined_with_its_gradient(there):
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 5), torch.randn(7, 5)
    own, counted, upstream = torch.tensor([2, 3, 4]), torch.tensor(there, dtype=torch.float32), torch.randn(3)
    ours = queries.clone().requires_grad_()
    made = compare(ours, keys, own, 0.2, counted)
    made.loss.backward(upstream)
    wide = queries.double().requires_grad_()
    wanted = info_nce(wide, keys.double(), own, 0.2, counted)
    wanted.backward(upstream.double())
    torch.testing.assert_close(made.loss.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    nearest = [
        max((k for k in range(7) if there[k]), key=lambda k: functional.cosine_similarity(q, keys[k], 0))
        for q in queries
    ]
    assert made.found.tolist() == [n == o for n, o in zip(nearest, own.tolist(), strict=True)]


def test_gives_keys_no_gradient():
    queries, keys = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = compare(queries, keys, torch.arange(4), 0.2, torch.ones(4)).loss
    loss.backward(torch.rand(loss.shape) + 0.5)
    assert queries.grad is not None
    assert keys.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_normalises_over_the_clips_that_count(autocast):
    norm = BatchNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, upstream = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6)
    counted = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    x += 30  # what half precision would round
    ours, wide = x.float().requires_grad_(), x[counted > 0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = norm(ours, counted)
    wanted = functional.batch_norm(wide, None, None, norm.weight.double(), norm.bias.double(), training=True)
    torch.testing.assert_close(made[counted > 0].double(), wanted, rtol=1e-5, atol=2e-5)
    made.backward(upstream * counted[:, None])
    wanted.backward(upstream[counted > 0].double())
    torch.testing.assert_close(ours.grad[counted > 0].double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert not ours.grad[counted == 0].any()


def test_has_heads_of_three_and_two_layers_each_with_a_norm():
    model = contrasted()
    assert [tuple(x.weight.shape) for x in model.projector.layers] == [(12, 64), (12, 12), (8, 12)]
    assert [tuple(x.weight.shape) for x in model.predictor.layers] == [(12, 8), (8, 12)]
    head, x, counted = Head(4, 6, 3), torch.randn(7, 4), torch.ones(7)
    (first, last), norms = head.layers, head.norms
    wanted = norms[1](last(norms[0](first(x), counted).clamp_min(0)), counted)
    torch.testing.assert_close(head(x, counted), wanted)
    # the last norm has no weights
    assert [len(list(norm.parameters())) for norm in norms] == [2, 0]
    for head in (model.projector, model.predictor):
        assert [norm.weight is None for norm in head.norms] == [False] * (len(head.norms) - 1) + [True]
    head, x, counted = Head(4, 6, 3), torch.randn(7, 4), torch.ones(7)
    # no ReLU at the end
    assert (head(x, counted) < 0).any()


def test_momentum_follows_by_its_rate():
    model = contrasted()
    momentum = momentum_encoder_of(model)
    before = {name: x.clone() for name, x in momentum.named_parameters()}
    theirs = dict(contrasted(seed=1).named_parameters())
    assert set(before) == {name for name in theirs if not name.startswith("predictor.")}
    for name, x in model.named_parameters():
        assert name.startswith("predictor.") or torch.equal(x, before[name])
        x.data = theirs[name].data
    follow(momentum, model, 0.9)
    for name, x in momentum.named_parameters():
        torch.testing.assert_close(x, 0.9 * before[name] + 0.1 * theirs[name])
        assert not x.requires_grad


def test_momentum_rises_to_one_along_half_a_cosine():
    rates = [momentum_at(step, 100, 0.99) for step in range(101)]
    assert rates[0] == 0.99
    assert rates[50] == pytest.approx(0.995)
    assert rates[25] == pytest.approx(1 - 0.01 * (1 + math.sqrt(0.5)) / 2)
    assert rates[100] == 1
    assert rates == sorted(rates)


def test_spread_tells_a_collapse():
    counted = torch.ones(1000)
    everywhere = torch.randn(1000, 16)
    assert spread(everywhere, counted) == pytest.approx(1, abs=0.02)
    assert spread(everywhere[:1].expand(1000, -1), counted) == pytest.approx(0, abs=1e-3)
    assert spread(everywhere + 100, counted) < 0.05
    half = torch.cat((everywhere[:500], torch.full((500, 16), 7.0)))
    torch.testing.assert_close(spread(half, (torch.arange(1000) < 500).float()), spread(half[:500], counted[:500]))


def test_its_file_is_an_encoders_for_everybody_else(tmp_path):
    model = contrasted()
    save_weights(model, tmp_path / "model.safetensors")
    found, report = model_from(tmp_path / "model.safetensors")
    assert type(found) is Encoder
    assert report.fresh == report.messages == ()
    assert all(name.startswith(("projector.", "predictor.")) for name in report.ignored)
    torch.testing.assert_close(features_of(found, clips(2)), model.pooled(clips(2)))
    tuned = classifier("vit_tiny", num_classes=3, frames=4, image_size=16, cube=(2, 8, 8))
    report = load_weights(tuned, tmp_path / "model.safetensors")
    assert torch.equal(tuned.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert {name.split(".")[0] for name in report.fresh} == {"fc_norm", "head"}
    again = contrasted(seed=1)
    report = load_weights(again, tmp_path / "model.safetensors")
    assert report.ignored == report.fresh == ()
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(("hidden", "width"), [(0, 8), (4, 1)])
def test_refuses_heads_that_tell_nothing_apart(hidden, width):
    with pytest.raises(ValueError, match=f"heads must be at least 1 and 2 wide; got {hidden} and {width}"):
        Contrasted(size_of("vit_tiny"), INPUT, hidden=hidden, width=width)
