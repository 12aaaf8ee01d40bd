"""VideoMAE V2's dual masking: the running cell against a construction with loops, and the model's loss under it against
one that decodes everything with boolean masks."""

import numpy as np
import pytest
import torch

import kernels
import videomae
from videomae import keys, masking
from videomae.masking import Counts, Mask

GRIDS = [(8, 14, 14), (4, 4, 4), (8, 7, 7), (4, 5, 6), (16, 14, 14)]  # real, small, odd, odd and even, twice as long
SIZES = {"frames": 8, "image_size": 32, "cube": (2, 8, 8)}
GRID = (4, 4, 4)  # of SIZES


def cells(start, ratio, slots):
    """RECIPES C, word by word: one 2x2 cell per slot, 1 = the decoder skips."""
    ones = int(4 * ratio)
    queue = [1] * ones + [0] * (4 - ones)
    read = [[queue[(start + t + 1 + i) % 4] for i in range(4)] for t in range(slots)]
    return np.array(read, dtype=bool).reshape(slots, 2, 2)


def kept_by_decoder(start, ratio, grid):
    """bool [T', H', W']: the cells tiled over the map, cut at its border."""
    slots, rows, columns = grid
    kept = np.zeros(grid, dtype=bool)
    for t, cell in enumerate(cells(start, ratio, slots)):
        for row in range(rows):
            for column in range(columns):
                kept[t, row, column] = not cell[row % 2, column % 2]
    return kept


def start_of(key):
    """The published hash, in plain integers."""
    return keys.key(key, -1) & 3


def dual(grid, ratio, some_keys, tube=0.75):
    return masking.make("tube", grid, tube, torch.as_tensor(some_keys), "running-cell", ratio)


def test_has_the_published_cells():
    published = [[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]]
    assert cells(0, 0.5, 4).tolist() == published
    key = next(k for k in range(100) if start_of(k) == 0)
    decoded = dual((8, 14, 14), 0.5, [key]).decoded[0]
    kept = torch.zeros(1568, dtype=torch.bool).index_fill(0, decoded, True).view(8, 7, 2, 7, 2)
    for t in range(8):
        assert (kept[t] == ~torch.tensor(published[t % 4], dtype=torch.bool)[:, None, :]).all()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_decodes_and_predicts_what_the_rule_says(grid, ratio):
    mask = dual(grid, ratio, range(12))
    hidden = mask.to_bool().numpy()
    starts = [start_of(key) for key in range(12)]
    assert set(starts) == {0, 1, 2, 3}
    for b, start in enumerate(starts):
        kept = kept_by_decoder(start, ratio, grid).ravel()
        predicted, context = np.flatnonzero(kept & hidden[b]), np.flatnonzero(kept & ~hidden[b])
        assert mask.predicted[b].tolist() == predicted.tolist()
        assert mask.decoded[b].tolist() == [*context, *predicted]


def test_leaves_the_encoders_mask_as_it_is():
    plain, both = masking.tube((8, 14, 14), 0.9, keys=torch.arange(5)), dual((8, 14, 14), 0.5, range(5), tube=0.9)
    assert torch.equal(plain.visible, both.visible)
    assert torch.equal(plain.masked, both.masked)
    assert both.num_cubes == 1568


@pytest.mark.parametrize(
    ("grid", "tube", "ratio", "expected"),
    [
        ((8, 14, 14), 0.9, 0.5, Counts(160, 1408, 784, 704)),  # RECIPES C
        ((8, 14, 14), 0.9, 0.25, Counts(160, 1408, 1176, 1056)),
        ((8, 14, 14), 0.9, 0.75, Counts(160, 1408, 392, 352)),
        ((8, 14, 14), 0.9, 0.49, Counts(160, 1408, 1176, 1056)),  # floor(4 * 0.49) = 1
        ((8, 14, 14), 0.9, 0.0, Counts(160, 1408, 1408, 1408)),
        ((8, 7, 7), 0.75, 0.5, Counts(104, 288, 196, 144)),  # 13 and 36 of 49 places
    ],
)
def test_counts_without_any_data(grid, tube, ratio, expected):
    counts = masking.counts("tube", grid, tube, "running-cell", ratio)
    assert counts == expected
    # on the meta device nothing can look at a value: all that is done there is done without waiting for a device
    there = masking.make("tube", grid, tube, torch.empty(3, dtype=torch.int64, device="meta"), "running-cell", ratio)
    assert [tuple(x.shape) for x in (there.decoded, there.predicted)] == [(3, counts.decoded), (3, counts.predicted)]
    assert all(x.is_meta and x.is_contiguous() and x.dtype == torch.int64 for x in (there.decoded, there.predicted))


def test_starts_anywhere_equally_often():
    # the slots in which the first place is kept tell the start
    decoded = dual((4, 2, 2), 0.75, range(8000), tube=0.5).decoded
    slot = (decoded // 4)[decoded % 4 == 0]
    share = torch.bincount(slot, minlength=4) / 8000
    # deviation of a share of 8000 draws: 0.0048
    assert (share - 0.25).abs().max() < 0.02


def test_is_a_pure_function_of_each_clips_key():
    some = [5, -(2**62), 17, 5]
    whole = dual((8, 7, 7), 0.5, some)
    assert torch.equal(whole.decoded[0], whole.decoded[3])
    for b, key in enumerate(some):
        alone = dual((8, 7, 7), 0.5, [key])
        assert torch.equal(alone.decoded[0], whole.decoded[b])
        assert torch.equal(alone.predicted[0], whole.predicted[b])


def test_works_on_a_tube_from_elsewhere():
    tube = masking.tube((8, 7, 7), 0.5, keys=torch.arange(4))
    given = masking.running_cell(Mask.from_bool(tube.to_bool()), (8, 7, 7), 0.5, torch.arange(4))
    assert torch.equal(given.decoded, dual((8, 7, 7), 0.5, range(4), tube=0.5).decoded)


@pytest.mark.parametrize(("kind", "grid"), [("tube", (8, 4, 4)), ("random", (6, 4, 4)), ("frame", (6, 4, 4))])
def test_a_ratio_of_zero_decodes_what_is_masked(kind, grid):
    mask = masking.make(kind, grid, 0.5, torch.arange(2), "running-cell", 0.0)
    assert mask.decoded is mask.predicted is mask.masked
    again = masking.running_cell(dual(GRID, 0.5, range(2)), GRID, 0.0, torch.arange(2))
    assert again.decoded is again.predicted is again.masked


def test_compiles_and_marks_a_mask_that_is_no_tube():
    grid, num_cubes = (8, 4, 4), 128
    tube = masking.tube(grid, 0.75, keys=torch.arange(3))
    hidden = tube.to_bool()
    hidden[1] = masking.random(grid, 0.75, keys=torch.arange(1)).to_bool()[0]
    broken = Mask.from_bool(hidden)

    def both(some_keys, visible, masked):
        made = masking.make("tube", grid, 0.75, some_keys, "running-cell", 0.5)
        put_on = masking.running_cell(Mask(visible, masked), grid, 0.5, some_keys)
        return made.decoded, made.predicted, put_on.decoded, put_on.predicted

    *made, decoded, predicted = torch.compile(both, fullgraph=True, backend="aot_eager")(
        torch.arange(3), broken.visible, broken.masked
    )
    eager = dual(grid, 0.5, range(3))
    assert torch.equal(made[0], eager.decoded)
    assert torch.equal(made[1], eager.predicted)
    for part, wanted in ((decoded, eager.decoded), (predicted, eager.predicted)):
        assert torch.equal(part[[0, 2]], wanted[[0, 2]])
        assert (part[1] == num_cubes).all()


@pytest.mark.parametrize("slots", [1, 2, 6])
def test_refuses_time_slots_in_which_the_cell_does_not_come_round(slots):
    with pytest.raises(ValueError, match=f"must be a multiple of 4; got {slots}"):
        masking.counts("tube", (slots, 14, 14), 0.9, "running-cell", 0.5)


@pytest.mark.parametrize("ratio", [0.2, 0.24999, 1.0, 1.5, -0.5, float("nan")])
def test_refuses_cells_that_skip_nothing_or_all(ratio):
    with pytest.raises(ValueError, match=f"decoder mask ratio must be 0, or from 0.25 to below 1, .*; got {ratio}"):
        masking.counts("tube", (8, 14, 14), 0.9, "running-cell", ratio)


@pytest.mark.parametrize("kind", ["random", "frame"])
def test_refuses_masks_under_which_clips_would_differ(kind):
    with pytest.raises(ValueError, match=f"needs a tube mask: with a {kind} mask, clips differ"):
        masking.counts(kind, (8, 4, 4), 0.5, "running-cell", 0.5)
    mask = masking.make(kind, (8, 4, 4), 0.5, torch.arange(2))
    with pytest.raises(ValueError, match="does not hide the same places in every time slot"):
        masking.running_cell(mask, (8, 4, 4), 0.5, torch.arange(2))
    mask = masking.random((8, 4, 4), 0.7, keys=torch.arange(2))  # 89 cubes
    with pytest.raises(ValueError, match="does not hide the same places in every time slot"):
        masking.running_cell(mask, (8, 4, 4), 0.5, torch.arange(2))


def test_refuses_keys_and_grids_of_another_mask():
    mask = masking.tube(GRID, 0.5, keys=torch.arange(2))
    with pytest.raises(ValueError, match=r"mask is for 2 clips of 64 cubes, .* for 2 clips of 128 cubes: \(8, 4, 4\)"):
        masking.running_cell(mask, (8, 4, 4), 0.5, torch.arange(2))
    with pytest.raises(ValueError, match="mask is for 2 clips of 64 cubes, .* for 3 clips of 64 cubes"):
        masking.running_cell(mask, GRID, 0.5, torch.arange(3))
    with pytest.raises(ValueError, match="int64"):
        masking.running_cell(mask, GRID, 0.5, torch.zeros(2))
    with pytest.raises(ValueError, match="keys are on meta, the mask on cpu"):
        masking.running_cell(mask, GRID, 0.5, torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="decoder mask must be one of none, running-cell; got 'cell'"):
        masking.make("tube", GRID, 0.5, torch.arange(2), "cell")


def test_the_decoder_takes_944_tokens_and_predicts_704():
    seen = []
    with torch.device("meta"):
        model = videomae.pretrain_model("vit_small")
        frames, some = torch.empty(2, 16, 224, 224, 3, dtype=torch.uint8), torch.empty(2, dtype=torch.int64)
    mask = masking.make("tube", (8, 14, 14), 0.9, some, "running-cell", 0.5)
    model.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    assert model(frames, mask).shape == (2, 704, 1536)
    ((sequence, num_predicted),) = seen
    assert sequence.shape == (2, 944, 192)
    assert num_predicted == 704


def slow_target(frames):
    """RECIPES B in loops: float64 [B, N, 384] of all cubes."""
    (_, clip_frames, height, width, _), (dt, dy, dx) = frames.shape, SIZES["cube"]
    pixels = frames.numpy().astype(np.float64) / 255
    rows = []
    for clip in pixels:
        for t in range(0, clip_frames, dt):
            for y in range(0, height, dy):
                for x in range(0, width, dx):
                    cube = clip[t : t + dt, y : y + dy, x : x + dx].reshape(-1, 3)
                    rows.append(((cube - cube.mean(0)) / (cube.std(0, ddof=1) + 1e-6)).ravel())
    return torch.from_numpy(np.stack(rows)).view(len(pixels), -1, rows[0].size)


def slow_loss(model, frames, hidden, kept):
    """RECIPES C, V2: every kept place stands in the decoder, in ascending order; all are decoded to the end; the mean
    over the kept and masked ones. hidden, kept: bool [B, N]."""
    target, total, count = slow_target(frames), 0.0, 0
    positions, token = model.decoder_positions, model.mask_token[0]
    for b in range(len(frames)):
        features = model.encoder(frames[b : b + 1], torch.nonzero(~hidden[b]).T.contiguous())[0]
        seen = features @ model.encoder_to_decoder.weight.T + positions[~hidden[b]]
        sequence = torch.cat((seen, token + positions[kept[b]]))[None]
        decoder = model.decoder
        out = decoder.head(decoder.norm(decoder.blocks(sequence)))[0, len(seen) :]
        per_token = (out - target[b, kept[b]]).square().mean(dim=1)
        counted = hidden[b, kept[b]]
        total, count = total + per_token[counted].sum(), count + int(counted.sum())
    return total / count


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_loss_is_v2s_with_every_gradient(ratio):
    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_tiny", decoder_depth=2, **SIZES).double()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, where errors would hide
            parameter.add_(torch.randn_like(parameter) * 0.05)
    frames = torch.randint(0, 256, (3, 8, 32, 32, 3), dtype=torch.uint8)
    some = [0, 1, 2]
    starts = [start_of(key) for key in some]
    assert len(set(starts)) > 1
    mask = dual(GRID, ratio, some)
    pred = model(frames, mask)
    assert pred.shape == (3, mask.predicted.shape[1], 384)
    loss = kernels.pixel_loss(pred, frames, mask.predicted, cube=SIZES["cube"])
    kept = torch.from_numpy(np.stack([kept_by_decoder(start, ratio, GRID).ravel() for start in starts]))
    slow = slow_loss(model, frames, mask.to_bool(), kept)
    torch.testing.assert_close(loss, slow, rtol=1e-10, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    upstream = torch.tensor(-1.7, dtype=torch.float64)
    both = (torch.autograd.grad(x, parameters, upstream) for x in (loss, slow))
    for name, got, wanted in zip(names, *both, strict=True):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10 * wanted.abs().max().item(), msg=name)


def test_the_kernels_give_what_the_references_give(kernel_device, monkeypatch):
    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_tiny", decoder_depth=1, **SIZES)
    frames = torch.randint(0, 256, (1, 8, 32, 32, 3), dtype=torch.uint8)

    def loss_and_gradients(device):
        model.to(device).zero_grad()
        mask = dual(GRID, 0.75, torch.arange(1, device=device))  # drawn where it is used
        loss = kernels.pixel_loss(model(frames.to(device), mask), frames.to(device), mask.predicted, cube=SIZES["cube"])
        return [x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))]

    got = loss_and_gradients(kernel_device)
    monkeypatch.setattr(kernels.launch, "_interpret", False)
    for one, truth in zip(got, loss_and_gradients("cpu"), strict=True):
        # the reference on a CPU and the kernel sum in another order
        torch.testing.assert_close(one, truth, atol=2e-5 * truth.abs().max().item(), rtol=1e-3)
