"""positions: a table for another grid is its own, or the old grid's interpolated, and a file remembers which."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import videomae
from videomae import masking
from videomae.clip import interpolated_positions, sinusoid_positions
from videomae.data.sampling import Sampling
from videomae.model import SIZES, Input, VideoMAE
from videomae.weights import model_from, save_hugging_face, save_official, save_weights

TINY = SIZES["vit_tiny"]


def cubic_taps(place):
    """(old index, weight) of the cubic convolution with a = -0.75, Keys 1981."""
    first = math.floor(place) - 1
    for index in range(first, first + 4):
        x = abs(place - index)
        inner = 1.25 * x**3 - 2.25 * x**2 + 1
        outer = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        yield index, inner if x <= 1 else outer if x < 2 else 0.0


def linear_taps(place):
    yield math.floor(place), 1 - (place - math.floor(place))
    yield math.floor(place) + 1, place - math.floor(place)


def resizing(old, new, taps):
    """The matrix [new, old] of a resize whose corners are not aligned; beyond the ends the last value goes on."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        for index, weight in taps((i + 0.5) * old / new - 0.5):
            matrix[i, min(max(index, 0), old - 1)] += weight
    return matrix


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((2, 3, 5), (2, 7, 4)),
        ((2, 3, 5), (5, 3, 5)),
        ((4, 2, 2), (3, 1, 6)),
        ((1, 1, 1), (2, 3, 1)),
        ((8, 14, 14), (16, 20, 20)),
    ],
    ids=["space", "time", "both", "from one", "32 frames of 320 pixels"],
)
def test_it_interpolates_by_cubic_convolution_then_linearly(old, new):
    table = sinusoid_positions(math.prod(old), 6).double().view(*old, 6)
    parts = [resizing(old[i], new[i], cubic_taps if i else linear_taps) for i in range(3)]
    wanted = torch.einsum("thwd,at,bh,cw->abcd", table, *parts).flatten(0, 2)
    got = interpolated_positions(old, new, 6)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    torch.testing.assert_close(got, wanted.float(), rtol=0, atol=1e-6)


def test_it_keeps_the_table_of_a_grid_that_stays():
    assert torch.equal(interpolated_positions((4, 3, 5), (4, 3, 5), 64), sinusoid_positions(60, 64))


def test_an_input_knows_whose_positions_it_has():
    own = Input(4, 32)
    assert Input(4, 32, positions_of=(2, 2, 2)) == own
    other = Input(4, 32, positions_of=[4, 2, 2])
    assert other == replace(own, positions_of=(4, 2, 2)) != own
    assert len({own, other, replace(other), replace(own, sampling=Sampling("dense", 4))}) == 3
    with pytest.raises(ValueError, match="positions_of must be a grid of three positive numbers; got \\(4, 0, 2\\)"):
        Input(4, 32, positions_of=(4, 0, 2))


def pretrain(frames=4, image_size=32, seed=0, **others):
    torch.manual_seed(seed)
    return VideoMAE(TINY, Input(frames, image_size, **others), decoder_depth=1)


def assert_positions(model, old):
    """The table is the old grid's, in the encoder and, where there is one, in the decoder."""
    encoder = model.encoder if isinstance(model, VideoMAE) else model
    wanted = interpolated_positions(old, model.input.grid, 64)
    assert torch.equal(encoder.positions, wanted)
    assert encoder.input == model.input
    if isinstance(model, VideoMAE):
        assert torch.equal(model.decoder_positions, wanted)


def save(model, folder, format):
    if format == "ours":
        save_weights(model, folder / "a.safetensors")
        return folder / "a.safetensors"
    save_hugging_face(model, folder)
    return folder


@pytest.mark.parametrize("format", ["ours", "hugging face"])
@pytest.mark.parametrize("kind", ["pretrain", "classifier"])
def test_weights_of_another_grid_leave_the_models_own_table_or_bring_theirs(kind, format, tmp_path):
    path = save(pretrain(), tmp_path, format)
    larger = {"frames": 8, "image_size": 48}
    model = pretrain(**larger) if kind == "pretrain" else videomae.classifier("vit_tiny", num_classes=3, **larger)
    report = videomae.load_weights(model, path)
    assert_positions(model, model.input.grid)
    assert "positions: the model's own, of 4x3x3 cubes; the weights know 2x2x2" in str(report)
    report = videomae.load_weights(model, path, positions="interpolate")
    assert_positions(model, (2, 2, 2))
    assert model.input.positions_of == (2, 2, 2)
    assert "positions: those of 2x2x2 cubes, interpolated to 4x3x3" in str(report)
    assert "assumed" not in str(report)
    # and back
    videomae.load_weights(model, path, positions="fresh")
    assert_positions(model, model.input.grid)


def test_weights_that_state_no_grid_are_taken_for_16_frames_of_224():
    tensors = pretrain().state_dict()
    model = videomae.encoder("vit_tiny", frames=4, image_size=32)
    assert "positions" not in str(videomae.load_weights(model, tensors))
    assert_positions(model, (2, 2, 2))
    report = videomae.load_weights(model, tensors, positions="interpolate")
    assert_positions(model, (8, 14, 14))
    assert "those of 8x14x14 cubes, interpolated to 2x2x2 (clips of 16x224x224 are assumed" in str(report)
    usual = videomae.encoder("vit_tiny")
    assert "positions" not in str(videomae.load_weights(usual, tensors, positions="interpolate"))
    assert_positions(usual, (8, 14, 14))


def test_an_interpolated_table_survives_saving(tmp_path):
    source = pretrain(8, 48)
    videomae.load_weights(source, save(pretrain(seed=1), tmp_path, "ours"), positions="interpolate")
    path = save(source, tmp_path, "ours")
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["positions"]) == {"from": [2, 2, 2]}
        assert not any("positions" in name for name in file.keys())  # noqa: SIM118 (it is no dict)
    frames = torch.randint(0, 256, (1, 8, 48, 48, 3), dtype=torch.uint8)
    mask = masking.tube((4, 3, 3), 0.5, keys=torch.tensor([1]))
    built, report = model_from(path)
    assert "interpolated to 4x3x3" in str(report)
    given = pretrain(8, 48, seed=2)
    videomae.load_weights(given, path)
    for model in (built, given):
        assert model.input == source.input
        assert_positions(model, (2, 2, 2))
        assert torch.equal(model(frames, mask), source(frames, mask))
    encoder = videomae.encoder("vit_tiny", frames=8, image_size=48)
    videomae.load_weights(encoder, path)
    assert_positions(encoder, (2, 2, 2))


def test_a_table_interpolated_twice_comes_from_where_it_began(tmp_path):
    path = save(pretrain(8, 48, positions_of=(2, 2, 2)), tmp_path, "ours")
    larger, first = pretrain(16, 64), pretrain()
    videomae.load_weights(larger, path, positions="interpolate")
    assert_positions(larger, (2, 2, 2))
    videomae.load_weights(first, path, positions="interpolate")
    assert first.input.positions_of is None
    assert_positions(first, (2, 2, 2))


def test_a_model_takes_the_table_of_weights_of_its_own_grid(tmp_path):
    path = save(pretrain(), tmp_path, "ours")
    model = pretrain(positions_of=(8, 14, 14))
    assert_positions(model, (8, 14, 14))
    videomae.load_weights(model, path)
    assert_positions(model, (2, 2, 2))


def test_it_refuses_other_words_and_formats_that_cannot_say_it(tmp_path):
    model = pretrain(positions_of=(8, 14, 14))
    with pytest.raises(ValueError, match="positions must be one of fresh, interpolate; got 'bicubic'"):
        videomae.load_weights(model, model.state_dict(), positions="bicubic")
    for save_it in (save_hugging_face, save_official):
        with pytest.raises(ValueError, match=r"interpolated from those of \(8, 14, 14\) cubes"):
            save_it(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
