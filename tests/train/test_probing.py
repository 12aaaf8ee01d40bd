"""Probes against slow computations by hand, and that a look at an encoder in training leaves no trace."""

import math

import numpy as np
import pytest
import torch

import videomae
from tests.videos import moving_frames, write_video
from train import probing
from train.inference import Reading
from train.optim import Schedule
from train.probing import (
    AttentiveProbe,
    MultiScaleReader,
    OnlineProbe,
    Pass,
    Probing,
    choose_l2,
    draw,
    fit_linear,
    knn_probabilities,
    minibatches,
    share_right,
    train_head,
)
from videomae.data.augment import crop_resize, multi_scale_crop
from videomae.data.dataset import CROP, FRAMES, Sample
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.sampling import Sampling
from videomae.features import video_features
from videomae.keys import Draws
from videomae.model import Input


def clouds(count, width=6, classes=3, spread=0.1, seed=0):
    """Features around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(classes, width) * 3 + 5  # far from the origin, as features are
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("neighbours", [1, 5, 100])
def test_knn_is_the_vote_of_the_nearest(monkeypatch, neighbours):
    monkeypatch.setattr(probing, "_ROWS", 4)
    torch.manual_seed(0)
    train, test, labels = torch.randn(23, 5), torch.randn(9, 5), torch.randint(0, 4, (23,))
    found = knn_probabilities(train, labels, test, 4, neighbours=neighbours, temperature=0.2)
    for row, feature in zip(found, test, strict=True):
        near = []
        for other, label in zip(train, labels, strict=True):
            cosine = sum(a * b for a, b in zip(feature.tolist(), other.tolist(), strict=True))
            near.append((cosine / (feature.norm() * other.norm()).item(), label.item()))
        votes = [0.0] * 4
        for cosine, label in sorted(near, reverse=True)[:neighbours]:
            votes[label] += math.exp(cosine / 0.2)
        assert row.tolist() == pytest.approx([vote / sum(votes) for vote in votes], rel=1e-4, abs=1e-6)


def test_knn_of_features_that_are_apart_is_right():
    features, labels = clouds(30)
    others, wanted = clouds(12, seed=1)
    assert share_right(knn_probabilities(features, labels, others, 3, neighbours=5), wanted) == 100
    with pytest.raises(ValueError, match="neighbours must be at least 1; got 0"):
        knn_probabilities(features, labels, others, 3, neighbours=0)


@pytest.mark.parametrize("l2", [1.0, 1e-3, 1e-5])
def test_the_linear_probe_is_at_the_minimum_of_penalised_logistic_regression(l2):
    features, labels = clouds(40, spread=2.0)
    fit = fit_linear(features, labels, 3, l2=l2)
    x = features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    weight, bias = fit.weight.numpy(), fit.bias.numpy()
    scores = np.exp(x @ weight.T + bias)
    error = scores / scores.sum(1, keepdims=True) - np.eye(3)[labels.numpy()]
    # the gradient of the mean cross-entropy and of the penalty; the problem is convex
    assert np.abs(error.T @ x / 40 + l2 * weight).max() < 1e-6
    assert np.abs(error.mean(0)).max() < 1e-6
    logits = fit(features)
    np.testing.assert_allclose(logits.numpy(), x @ weight.T + bias, atol=1e-9)


def test_the_linear_probe_depends_on_neither_start_nor_scale_nor_a_feature_that_is_constant():
    features, labels = clouds(40, spread=2.0)
    fit = fit_linear(features, labels, 3, l2=1e-2)
    far = fit._replace(weight=torch.randn_like(fit.weight), bias=torch.randn_like(fit.bias))
    again = fit_linear(features, labels, 3, l2=1e-2, start=far)
    torch.testing.assert_close(again.weight, fit.weight, rtol=0, atol=1e-5)
    scaled = torch.cat((features * torch.tensor([1, 10, 100, 0.1, 1, 1]) - 7, torch.full((40, 1), 0.3)), dim=1)
    other = fit_linear(scaled, labels, 3, l2=1e-2)
    torch.testing.assert_close(other(scaled), fit(features), rtol=0, atol=1e-4)
    assert torch.equal(fit_linear(features, labels, 3, l2=1e-2).weight, fit.weight)
    with pytest.raises(ValueError, match="l2 must be positive; got 0"):
        fit_linear(features, labels, 3, l2=0)


def test_the_linear_probe_tells_what_is_apart_even_within_no_grad():
    features, labels = clouds(30)
    others, wanted = clouds(12, seed=1)
    with torch.no_grad():
        assert share_right(fit_linear(features, labels, 3, l2=1e-3)(others), wanted) == 100


@pytest.mark.parametrize("spread", [0.5, 6.0])
def test_the_penalty_is_the_best_on_a_held_out_fifth(spread):
    features, labels = clouds(60, width=40, spread=spread)
    order = draw(60, None, 3)
    held, rest = order[:12], order[12:]
    scores = {}
    for l2 in (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5):
        logits = fit_linear(features[rest], labels[rest], 3, l2=l2)(features[held])
        right = (logits.argmax(1) == labels[held]).sum().item()
        scores[l2] = (right, -torch.nn.functional.cross_entropy(logits, labels[held]).item())
    assert choose_l2(features, labels, 3, seed=3) == max(scores, key=scores.get)
    with pytest.raises(ValueError, match="a fifth of 4 videos cannot be held out"):
        choose_l2(features[:4], labels[:4], 3)


def test_an_attentive_probe_is_a_query_over_the_tokens_in_heads():
    torch.manual_seed(0)
    probe, tokens = AttentiveProbe(8, 2, 3), torch.randn(4, 5, 8)
    torch.nn.init.normal_(probe.head.weight)
    torch.nn.init.normal_(probe.query)
    pooled = []
    flat = tokens.flatten(0, 1)
    normed = (tokens - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
    both = normed @ probe.key_value.weight.T + probe.key_value.bias
    for a in range(2):
        key, value = both[..., a * 4 : a * 4 + 4], both[..., 8 + a * 4 : 12 + a * 4]
        weights = (key @ probe.query[a, 0] / 2).softmax(1)
        pooled.append((weights[..., None] * value).sum(1))
    expected = torch.cat(pooled, dim=1) @ probe.head.weight.T + probe.head.bias
    made = probe(tokens)
    torch.testing.assert_close(made, expected)
    (made * torch.randn_like(made)).sum().backward()
    for name, parameter in probe.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_an_attentive_probe_learns_which_token_to_look_at():
    torch.manual_seed(0)
    labels = torch.arange(128) % 2
    tokens = torch.randn(128, 12, 8)
    # one token of twelve tells; it is known by its first number
    place = torch.randint(0, 12, (128,))
    tokens[torch.arange(128), place, 0] = 4.5
    tokens[torch.arange(128), place, 1] = 3 * (2.0 * labels - 1)
    probe = AttentiveProbe(8, 2, 2)
    batches = (Pass(tokens[rows], labels[rows]) for rows in minibatches(128, 16, 20, 0))
    optimizer = torch.optim.AdamW(probe.parameters())
    train_head(probe, batches, optimizer, Schedule(1e-2, 0, 10, 160))
    assert share_right(probe(tokens).detach(), labels) > 95
    mean = tokens.mean(1)
    assert share_right(fit_linear(mean, labels, 2, l2=1e-3)(mean), labels) < 90


def test_a_head_is_trained_at_the_schedules_rates():
    head = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(head.weight)
    x, labels = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
    losses = []
    optimizer = torch.optim.SGD(head.parameters(), momentum=0.9)
    train_head(head, [Pass(x, labels)] * 2, optimizer, Schedule(0.5, 0, 2, 4), lambda step, loss: losses.append(loss))
    # the first step of the warm-up has a rate of 0; the second repeats its gradient
    gradient = torch.tensor([[0.5, 1.0], [-0.5, -1.0]])
    torch.testing.assert_close(head.weight.detach(), -0.5 * (1.9 * gradient))
    assert [loss.item() for loss in losses] == pytest.approx([math.log(2)] * 2)


def test_minibatches_give_everything_once_in_an_epoch():
    batches = list(minibatches(10, 4, 2, 0))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    assert sorted(sum(batches[:3], [])) == sorted(sum(batches[3:], [])) == list(range(10))
    assert batches[:3] != batches[3:]
    assert draw(10, 3, 0) == draw(10, None, 0)[:3]


def test_training_clips_are_cropped_as_in_pre_training(tmp_path):
    path = write_video(tmp_path / "video.mp4", moving_frames(30, 48, 64))
    reader = MultiScaleReader(4, (24, 24), Sampling("dense", 3), seed=5)
    whole = Video(path).read(range(30))
    made = []
    for epoch in range(3):
        out = [np.zeros(reader.shape, dtype=np.uint8)]
        reader.read_into(str(path), [Sample(epoch, 2, 0)], out)
        numbers = Sampling("dense", 3).train(30, 4, Draws(5, epoch, 2, FRAMES))
        crop = multi_scale_crop(48, 64, (24, 24), (1, 0.875, 0.75, 0.66), Draws(5, epoch, 2, 0, CROP))
        assert np.array_equal(out[0], crop_resize(whole[numbers], crop, (24, 24)))
        made.append(out[0])
    assert not np.array_equal(made[0], made[1])
    write_video(tmp_path / "one.mp4", moving_frames(1, 48, 64))
    with pytest.raises(UnreadableVideo, match="a single frame"):
        reader.read_into(str(tmp_path / "one.mp4"), [Sample(0, 0, 0)], out)


@pytest.fixture
def labelled(tmp_path):
    """Two classes, bright and dark, that any encoder tells apart."""
    for split, count in (("train", 6), ("val", 3)):
        for number, name in enumerate(("dark", "light")):
            folder = tmp_path / "labelled" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                frames = moving_frames(12, 20, 24, seed=i) // 4 + 170 * np.uint8(number)
                write_video(folder / f"{i}.mp4", frames)
    return tmp_path / "labelled"


def model_of(seed=0):
    torch.manual_seed(seed)
    return videomae.pretrain_model("vit_tiny", frames=4, image_size=16, cube=(2, 8, 8), decoder_depth=1)


def online(labelled, say=print, **changes):
    config = Probing(str(labelled), clips=changes.pop("clips", 100), **changes)
    input = Input(4, 16, (2, 8, 8))
    return OnlineProbe(config, input, Sampling("dense", 2), seed=0, reading=Reading(workers=0), say=say)


def test_an_online_probe_measures_the_encoder_it_is_given(labelled):
    probe = online(labelled, neighbours=3)
    assert probe.counts == (12, 6)
    model = model_of()
    first = probe.probe(model)
    assert first == {"probe_knn": 100.0, "probe_linear": 100.0}
    assert tuple(first) == probe.names
    # an encoder that sees nothing guesses
    with torch.no_grad():
        model.encoder.norm.weight.zero_()
    assert probe.probe(model)["probe_linear"] == 50
    assert probe.probe(model_of(), torch.bfloat16) == first


def test_an_online_probe_sees_the_middle_clips(labelled):
    probe = online(labelled)
    model = model_of()
    path = labelled / "train/dark/3.mp4"
    # a video of 12 frames has one window of 8 in the middle
    row = draw(12, 100, 0).index(3)
    numbers = Sampling("dense", 2).middle(12, 4)
    frames = torch.from_numpy(Video(path).read(numbers))
    with torch.no_grad():
        resized = torch.nn.functional.interpolate(
            frames.permute(0, 3, 1, 2).float(), size=(16, 19), mode="bilinear", antialias=False
        )
    expected = resized[..., 1:17].permute(0, 2, 3, 1)
    assert (probe._train.frames[row].float() - expected).abs().max() <= 1
    assert probe._train.labels[row] == 0
    assert video_features(model, path, stride=2).shape == (2, 64)


def test_a_run_with_a_probe_is_bit_identical_to_one_without(labelled):
    probe = online(labelled)

    def train(with_probe):
        model = model_of()
        model.encoder.blocks[0].drop_path.rate = 0.5  # draws in train mode
        model.decoder.eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        clips = torch.randint(0, 256, (4, 4, 16, 16, 3), dtype=torch.uint8)
        for step in range(4):
            model.encoder(clips).square().mean().backward()
            if with_probe and step % 2:
                gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
                probe.probe(model)
                assert torch.equal(state, torch.get_rng_state())
                assert modes == [module.training for module in model.modules()]
                kept = [p.grad for p in model.parameters() if p.grad is not None]
                assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    plain, probed = train(False), train(True)
    assert all(torch.equal(value, probed[name]) for name, value in plain.items())


def test_an_online_probe_takes_few_clips_and_says_which_it_cannot_read(labelled):
    said = []
    (labelled / "train/dark/3.mp4").write_bytes(b"none")
    (labelled / "val/dark/1.mp4").write_bytes(b"none")
    probe = online(labelled, said.append)
    assert probe.counts == (11, 5)
    assert sum(line.startswith("probe: skipped: ") for line in said) == 2
    assert any("those of val serve" in line for line in said)
    assert set(probe.probe(model_of())) == {"probe_knn", "probe_linear"}
    assert online(labelled, said.append, clips=4).counts[1] <= 4


def test_an_online_probe_of_features_that_are_not_finite_recognises_nothing(labelled):
    model = model_of()
    model.encoder.blocks[0].mlp.fc2.bias.data.fill_(math.nan)
    assert online(labelled).probe(model) == {"probe_knn": 0.0, "probe_linear": 0.0}


def test_an_online_probe_refuses_what_memory_does_not_hold(labelled, monkeypatch):
    monkeypatch.setattr(probing, "memory_budget", lambda device: 10_000)
    with pytest.raises(ValueError, match="the 12 and 6 clips of the probe take 0 MB .* give fewer --probe.clips"):
        online(labelled)
    for name in ("every", "clips", "neighbours"):
        with pytest.raises(ValueError, match=f"probe.{name} must be at least 1; got 0"):
            Probing("x", **{name: 0})
    for l2 in (0, 1e300, math.nan):
        with pytest.raises(ValueError, match="probe.l2 must be in"):
            Probing("x", l2=l2)
    with pytest.raises(ValueError, match="a probe needs labelled videos"):
        OnlineProbe(Probing(), Input(4, 16, (2, 8, 8)), Sampling(), seed=0)
