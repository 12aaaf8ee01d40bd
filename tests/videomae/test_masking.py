"""Masks: exact counts, structure, purity, and the way from and to booleans."""

import pytest
import torch

from videomae import masking
from videomae.masking import Mask

GRID = (8, 14, 14)
# RECIPES C: ratio -> masked of a tube, masked of a random mask
COUNTS = {
    0.5: (784, 784),
    0.6: (936, 940),
    0.75: (1176, 1176),
    0.8: (1248, 1254),
    0.85: (1328, 1332),
    0.9: (1408, 1411),
    0.95: (1488, 1489),
}
MAKERS = {"tube": masking.tube, "random": masking.random, "frame": masking.frame}


@pytest.mark.parametrize("ratio", COUNTS)
def test_hides_the_published_number_of_cubes(ratio):
    keys = torch.arange(3)
    tube, random = COUNTS[ratio]
    assert masking.tube(GRID, ratio, keys=keys).masked.shape == (3, tube)
    assert masking.random(GRID, ratio, keys=keys).masked.shape == (3, random)
    assert masking.num_masked("tube", GRID, ratio) == tube


def test_frame_mask_hides_seven_of_eight_slots_at_87_5_percent():
    mask = masking.frame(GRID, 0.875, keys=torch.arange(50))
    assert mask.masked.shape == (50, 1372)
    slots = mask.visible // 196
    assert (slots == slots[:, :1]).all()
    assert len(slots[:, 0].unique()) > 4


@pytest.mark.parametrize("kind", MAKERS)
def test_partitions_the_cubes_in_ascending_order(kind):
    mask = MAKERS[kind]((4, 5, 7), 0.6, keys=torch.arange(20))
    assert mask.visible.dtype == mask.masked.dtype == torch.int64
    for part in (mask.visible, mask.masked):
        assert (part.diff(dim=1) > 0).all()
    together = torch.cat((mask.visible, mask.masked), 1).sort(1).values
    assert (together == torch.arange(140)).all()


def test_a_tube_hides_the_same_places_at_all_times():
    mask = masking.tube(GRID, 0.9, keys=torch.arange(10)).to_bool().view(10, 8, 196)
    assert (mask == mask[:, :1]).all()
    assert (mask[:, 0].sum(1) == 176).all()


def test_every_place_is_hidden_equally_often():
    hidden = masking.random((2, 4, 4), 0.75, keys=torch.arange(4000)).to_bool().float().mean(0)
    # deviation of a mean of 4000 draws: 0.007
    assert (hidden - 0.75).abs().max() < 0.035
    places = masking.tube((2, 4, 4), 0.75, keys=torch.arange(4000)).to_bool()[:, :16].float()
    # two places are hidden together with probability 12 * 11 / (16 * 15)
    together = (places.T @ places / 4000)[~torch.eye(16, dtype=torch.bool)]
    assert (together - 0.55).abs().max() < 0.05


@pytest.mark.parametrize("kind", MAKERS)
def test_is_a_pure_function_of_each_clips_key(kind):
    keys = torch.tensor([5, -(2**62), 17, 5])
    whole = MAKERS[kind]((8, 4, 4), 0.7, keys=keys)
    assert torch.equal(whole.masked[0], whole.masked[3])
    assert not torch.equal(whole.masked[0], whole.masked[2])
    for i in range(4):
        assert torch.equal(MAKERS[kind]((8, 4, 4), 0.7, keys=keys[i : i + 1]).masked[0], whole.masked[i])


def test_draws_keys_from_a_generator_and_from_nothing_else():
    before = torch.get_rng_state()
    first = masking.tube(GRID, 0.9, batch=2, generator=torch.Generator().manual_seed(1))
    again = masking.tube(GRID, 0.9, batch=2, generator=torch.Generator().manual_seed(1))
    other = masking.tube(GRID, 0.9, batch=2, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.masked, again.masked)
    assert not torch.equal(first.masked, other.masked)
    assert not torch.equal(first.masked[0], first.masked[1])
    assert torch.equal(before, torch.get_rng_state())


def test_from_bool_and_back():
    hidden = masking.random(GRID, 0.9, keys=torch.arange(3)).to_bool()
    mask = Mask.from_bool(hidden)
    assert torch.equal(mask.to_bool(), hidden)
    assert (mask.visible.diff(dim=1) > 0).all()
    assert torch.equal(mask.masked[1], hidden[1].nonzero().flatten())


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        (torch.tensor([[True, False], [True, True]]), "same number"),
        (torch.ones(2, 4, dtype=torch.bool), "not 4"),
        (torch.zeros(2, 4, dtype=torch.bool), "not 0"),
        (torch.zeros(2, 4), "must be bool"),
        (torch.zeros(0, 4, dtype=torch.bool), "same number"),
    ],
    ids=["uneven", "all", "none", "float", "empty"],
)
def test_from_bool_refuses(hidden, says):
    with pytest.raises(ValueError, match=says):
        Mask.from_bool(hidden)


@pytest.mark.parametrize(("ratio", "says"), [(0, "between"), (1.0, "between"), (-1, "between"), (0.1, "hides 0 of 4")])
def test_refuses_ratios_that_hide_nothing_or_all(ratio, says):
    with pytest.raises(ValueError, match=says):
        masking.tube((2, 2, 2), ratio, keys=torch.arange(1))


def test_refuses_to_draw_from_nowhere():
    with pytest.raises(ValueError, match="keys, or batch and generator"):
        masking.tube(GRID, 0.9, batch=2)
    with pytest.raises(ValueError, match="int64"):
        masking.tube(GRID, 0.9, keys=torch.zeros(2))
    with pytest.raises(ValueError, match="one of tube, random, frame"):
        masking.make("cell", GRID, 0.9, torch.arange(2))


def test_decodes_and_predicts_what_is_masked_unless_told_otherwise():
    mask = masking.make("tube", GRID, 0.9, torch.arange(2))
    assert mask.decoded is mask.predicted is mask.masked
    moved = mask.to("meta")
    assert moved.decoded is moved.predicted is moved.masked
    assert moved.masked.is_meta
    assert moved.visible.is_meta
    assert (
        masking.counts("tube", GRID, 0.9) == masking.counts("tube", GRID, 0.9, "none", 0.3) == (160, 1408, 1408, 1408)
    )


def test_moves_all_of_its_parts():
    parts = [torch.arange(n).expand(2, n) for n in (3, 5, 4, 2)]
    moved = Mask(*parts).to("meta")
    for part, expected in zip((moved.visible, moved.masked, moved.decoded, moved.predicted), parts, strict=True):
        assert part.is_meta
        assert part.shape == expected.shape
    assert moved.num_cubes == 8


@pytest.mark.parametrize(
    ("decoded", "predicted"),
    [((2, 4), (2, 5)), ((2, 9), (2, 6)), ((3, 4), (3, 2)), ((2, 4), (1, 2)), ((4,), (2,)), ((2, 4), (2, 0))],
    ids=["more than decoded", "more than masked", "clips", "clips of one", "axes", "none"],
)
def test_refuses_parts_that_do_not_fit_together(decoded, predicted):
    visible, masked = torch.zeros(2, 3), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"with masked \(2, 5\); got"):
        Mask(visible, masked, torch.zeros(decoded), torch.zeros(predicted))
    with pytest.raises(ValueError, match="both decoded and predicted, or neither"):
        Mask(visible, masked, torch.zeros(decoded))


def test_moving_keeps_what_is_predicted_of_all_that_is_decoded():
    mask = masking.tube((2, 2, 2), 0.5, keys=torch.arange(2))
    some = masking.Mask(mask.visible, mask.masked, mask.masked, mask.masked[:, -2:])
    assert some.to("cpu").predicted.shape == (2, 2)
    assert mask.to("cpu").predicted is not None
    assert mask.to("cpu").predicted.shape == mask.masked.shape
