"""detector: boxes' logits against an independent composition, frames of any size, the sizes' parameter counts."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional

import videomae
from videomae.blocks import Attention, set_attention, set_recompute
from videomae.clip import interpolated_positions, sinusoid_positions
from videomae.data.sampling import KeyFrameClip
from videomae.detector import AVA_MEAN, AVA_STD, Detector, clamped
from videomae.inputs import set_positions
from videomae.model import SIZES, Encoder, Input, Size
from videomae.weights import model_from, save_weights

TINY = Size(8, 2, 2, 8, 2)
INPUT = Input(4, 32, (2, 16, 16), AVA_MEAN, AVA_STD)


def detector(seed=0, input=INPUT, **others):
    """Small, and with every weight of some size."""
    model = Detector(TINY, input, num_classes=3, drop_path=0.0, **others)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def clips(height=32, width=32, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, height, width, 3), dtype=torch.uint8, generator=generator)


BOXES = torch.tensor(
    [
        [[3.5, 2.0, 20.9, 29.2], [0.0, 0.0, 31.0, 31.0], [25.0, 30.0, 90.0, 44.0]],
        [[-7.0, 5.0, 12.0, 9.0], [10.0, 10.0, 10.0, 10.0], [0.0, 0.0, 0.0, 0.0]],
    ]
)


def attended(x, attn):
    """Self-attention of tokens [N, D], head by head (RECIPES A.3)."""
    q, k, v = (x @ attn.qkv.weight.T).chunk(3, dim=-1)
    q, v = q + attn.q_bias, v + attn.v_bias
    heads = []
    for i in range(attn.heads):
        part = slice(i * q.shape[1] // attn.heads, (i + 1) * q.shape[1] // attn.heads)
        scores = q[:, part] @ k[:, part].T * q[:, part].shape[1] ** -0.5
        heads.append(scores.softmax(-1) @ v[:, part])
    return functional.linear(torch.cat(heads, -1), attn.proj.weight, attn.proj.bias)


def normed(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def encoded(model, pixels, positions):
    """Features [h, w, D] of normalised frames [T, H, W, 3] whose cubes are whole."""
    x = functional.conv3d(
        pixels.movedim(-1, 0), model.patch_embed.proj.weight, model.patch_embed.proj.bias, (2, 16, 16)
    )
    slots, rows, columns = x.shape[1:]
    x = x.flatten(1).T + positions
    for block in model.blocks:
        x = x + attended(normed(x, block.norm1), block.attn)
        hidden = functional.linear(normed(x, block.norm2), block.mlp.fc1.weight, block.mlp.fc1.bias)
        x = x + functional.linear(functional.gelu(hidden), block.mlp.fc2.weight, block.mlp.fc2.bias)
    return normed(x, model.norm).view(slots, rows, columns, -1).mean(0)


def at(features, y, x):
    """Bilinear between places; nothing further than one place beyond the last, where small boxes at the edges reach."""
    h, w = features.shape[:2]
    total = torch.zeros_like(features[0, 0])
    if y > h or x > w:
        return total
    y, x = min(y, h - 1), min(x, w - 1)
    for i in range(h):
        for j in range(w):
            total = total + features[i, j] * max(1 - abs(y - i), 0) * max(1 - abs(x - j), 0)
    return total


def best(features, box):
    """The largest of 7 x 7 bins in every channel, [D]; box in features."""
    x1, y1, x2, y2 = box
    height, width = max(y2 - y1, 1.0), max(x2 - x1, 1.0)
    tall, wide = math.ceil(height / 7), math.ceil(width / 7)
    bins = []
    for i, j in product(range(7), range(7)):
        ys = [y1 + height * (i + (a + 0.5) / tall) / 7 for a in range(tall)]
        xs = [x1 + width * (j + (b + 0.5) / wide) / 7 for b in range(wide)]
        bins.append(torch.stack([at(features, y, x) for y, x in product(ys, xs)]).mean(0))
    return torch.stack(bins).amax(0)


def detected(model, pixels, positions, boxes, frame):
    """Logits [R, C] of one clip of normalised frames, by the words of RECIPES H.4."""
    features = encoded(model, pixels, positions)
    height, width = frame
    pooled = []
    for box in boxes.tolist():
        x1, y1, x2, y2 = (min(max(v, 0), side - 1) / 16 for v, side in zip(box, (width, height) * 2, strict=True))
        pooled.append(best(features, (x1, y1, x2, y2)))
    return functional.linear(torch.stack(pooled), model.head.weight, model.head.bias)


def normalised(frames):
    mean = torch.tensor([122.7717, 115.9465, 102.9801], dtype=torch.float64)
    return (frames.double() - mean) / 57.375


def test_it_is_the_best_of_each_box_of_normed_features_meant_over_time():
    model, frames = detector(), clips()
    got = model(frames, BOXES)
    exact = detector().double()
    positions = sinusoid_positions(8, 8).double()
    wanted = [
        detected(exact, normalised(clip), positions, row, (32, 32)) for clip, row in zip(frames, BOXES, strict=True)
    ]
    torch.testing.assert_close(got, torch.stack(wanted).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(48, 80), (40, 57), (16, 33), (32, 31)])
def test_frames_of_any_size_are_padded_and_have_positions_of_their_own(height, width):
    model, frames = detector(), clips(height, width)
    boxes = BOXES * 1.7
    got = model(frames, boxes)
    padded = functional.pad(normalised(frames), (0, 0, 0, -width % 16, 0, -height % 16))
    grid = (2, padded.shape[2] // 16, padded.shape[3] // 16)
    positions = interpolated_positions((2, 2, 2), grid, 8).double()
    exact = detector().double()
    wanted = [detected(exact, clip, positions, row, (height, width)) for clip, row in zip(padded, boxes, strict=True)]
    torch.testing.assert_close(got, torch.stack(wanted).float(), rtol=1e-5, atol=1e-5)
    # floating-point frames are taken as they are
    torch.testing.assert_close(model(normalised(frames).float(), boxes), got, rtol=1e-5, atol=1e-5)
    assert model.features(frames).shape == (2, *grid[1:], 8)


def test_frames_of_its_own_size_are_left_alone():
    model = detector()
    encoder = Encoder(TINY, INPUT)
    encoder.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model.embed(clips()), encoder.embed(clips()))
    assert not model._tables
    # whole cubes stay uint8, whose path may differ by rounding
    assert model._padded(clips(48, 80)).dtype == torch.uint8


def test_positions_are_kept_by_size_and_follow_the_model():
    model, frames = detector(), clips(48, 80)
    with torch.inference_mode():
        model.features(frames)
    (table,) = model._tables.values()
    assert torch.equal(table, interpolated_positions((2, 2, 2), (2, 3, 5), 8))
    # one made in inference serves training too
    assert not table.is_inference()
    features = model.train().features(frames)
    features.backward(torch.randn(features.shape))
    assert next(iter(model._tables.values())) is table
    assert not any("position" in name or "table" in name for name in model.state_dict())
    model.double().features(frames.double() / 255)
    (again,) = model._tables.values()
    assert again.dtype == torch.float64
    # of another grid from the beginning: its table, not that of the one in between
    set_positions(model, (8, 14, 14))
    model.features(frames.double() / 255)
    assert torch.equal(list(model._tables.values())[-1], interpolated_positions((8, 14, 14), (2, 3, 5), 8).double())


def test_interpolated_positions_survive_saving(tmp_path):
    model = detector(input=replace(INPUT, positions_of=(2, 3, 5)))
    save_weights(model, tmp_path / "a.safetensors")
    again, _ = model_from(tmp_path / "a.safetensors")
    assert again.input == model.input
    for size in ((32, 32), (40, 57)):
        assert torch.equal(again.eval()(clips(*size), BOXES), model(clips(*size), BOXES))
        # of the file's grid, not the model's
        assert not torch.allclose(detector()(clips(*size), BOXES), model(clips(*size), BOXES), atol=1e-3)
    # from the grid that it has itself, its own table
    assert torch.equal(model._positions((2, 3, 5)), sinusoid_positions(30, 8))


def test_every_weight_has_a_gradient_that_is_its_own():
    model, frames = detector().double(), normalised(clips(40, 57))
    upstream = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(frames, BOXES.double()).backward(upstream)
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    weight = model.norm.weight
    for i in (0, 5):
        sides = []
        for step in (1e-6, -1e-6):
            other = detector().double()
            with torch.no_grad():
                other.norm.weight[i] += step
                sides.append((other(frames, BOXES.double()) * upstream).sum())
        assert math.isclose(weight.grad[i], (sides[0] - sides[1]) / 2e-6, rel_tol=1e-5, abs_tol=1e-7)


def test_of_equal_bins_one_alone_has_the_gradient():
    features = torch.ones(1, 14, 14, 8, requires_grad=True)
    logits = detector().classify(features, torch.tensor([[[0.0, 0.0, 223.0, 223.0]]]))
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    # a bin of 2 x 2 samples lies between 3 x 3 features at most
    assert 0 < (features.grad[..., 0] != 0).sum() <= 9


def test_a_box_changes_nothing_for_another():
    model, frames = detector(), clips(40, 57)
    wanted = model(frames, BOXES)
    more = torch.cat((BOXES, torch.tensor([[[0.0, 0.0, 0.0, 0.0], [-1e6, 1e6, 1e9, 3.0]]]).expand(2, -1, -1)), dim=1)
    torch.testing.assert_close(model(frames, more)[:, :3], wanted, rtol=1e-6, atol=1e-6)
    assert model(frames, more).isfinite().all()
    assert model(frames, BOXES[:, :0]).shape == (2, 0, 3)


def test_its_parts_are_the_whole():
    model, frames = detector(), clips(40, 57)
    features = model.features(frames)
    assert torch.equal(model.classify(features, clamped(BOXES, (40, 57))), model(frames, BOXES))
    # boxes beyond what is padded are clamped there, so that bins never want more samples than they may have
    assert model.classify(features, BOXES * 100).isfinite().all()


def test_boxes_are_clamped_to_the_last_pixels():
    boxes = torch.tensor([[-3.0, -4.0, 99.0, 98.0], [5.0, 60.0, 7.0, 61.0]])
    assert clamped(boxes, (40, 57)).tolist() == [[0, 0, 56, 39], [5, 39, 7, 39]]


def test_aligned_boxes_are_half_a_feature_away():
    features, boxes = detector().features(clips(64, 64)), torch.tensor([[[9.0, 10.0, 50.0, 55.0]]] * 2)
    got, wanted = detector(aligned=True).classify(features, boxes), detector().classify(features, boxes - 8)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, detector().classify(features, boxes), atol=1e-2)


@pytest.mark.long
def test_it_compiles_whole():
    model, frames = detector(), clips(40, 57)
    wanted = model(frames, BOXES)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(frames, BOXES), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", ["norms", "mlp", "block"])
def test_recomputing_changes_no_gradient(recompute):
    plain, other = detector().train(), detector().train()
    set_recompute(other, recompute)
    for model in (plain, other):
        logits = model(clips(), BOXES)
        logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)))
    pairs = zip(plain.parameters(), other.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7) for a, b in pairs)


def test_half_precision_is_near():
    model, frames = detector(), clips(40, 57)
    wanted = model(frames, BOXES)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(frames, BOXES)
    whole = detector().bfloat16()(frames, BOXES)
    assert got.dtype == whole.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(whole.float(), wanted, rtol=0.1, atol=0.1)


def test_its_attention_can_be_chosen():
    model = detector()
    set_attention(model, "sdpa")
    assert {module.backend for module in model.modules() if isinstance(module, Attention)} == {"sdpa"}


@pytest.mark.parametrize(
    ("size", "count"),
    [("vit_small", 21_910_736), ("vit_base", 86_288_720), ("vit_large", 303_942_736), ("vit_huge", 631_709_520)],
)
def test_it_has_the_published_number_of_parameters(size, count):
    with torch.device("meta"):
        model = videomae.detector(size, num_classes=80)
    assert sum(weight.numel() for weight in model.parameters()) == count


def test_a_new_one_begins_as_published():
    torch.manual_seed(0)
    model = videomae.detector("vit_tiny", num_classes=80, frames=4, image_size=32)
    assert model.input == INPUT
    assert (model.input.mean, model.input.std) == (AVA_MEAN, AVA_STD)
    assert [round(255 * x, 4) for x in AVA_MEAN + AVA_STD] == [122.7717, 115.9465, 102.9801] + [57.375] * 3
    assert not model.head.bias.any()
    assert math.isclose(model.head.weight.std().item(), 2e-5, rel_tol=0.05)
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.2]
    assert model.size == SIZES["vit_tiny"]
    assert (model.classes, model.class_ids, model.key_clip, model.aligned) == (None, None, None, False)
    model.key_clip = KeyFrameClip()
    # any number of classes at once: each begins near one half
    assert model.eval()(clips(), BOXES).abs().max() < 0.01


@pytest.mark.parametrize(
    ("frames", "boxes", "says"),
    [
        (clips()[:, :2], BOXES, r"clips \[B, 4, H, W, C\]; got \(2, 2, 32, 32, 3\)"),
        (clips()[0], BOXES, r"clips \[B, 4, H, W, C\]"),
        (clips(), BOXES[0], r"boxes must be \[2, R, 4\]; got shape \(3, 4\)"),
        (clips(), BOXES[:1], r"boxes must be \[2, R, 4\]; got shape \(1, 3, 4\)"),
        (clips(), BOXES[..., :3], r"boxes must be \[..., 4\]"),
        (clips(), BOXES.long(), "boxes must be floating point"),
        (clips()[:, :, :0], BOXES, "height must be a multiple"),
    ],
)
def test_it_refuses_what_does_not_fit(frames, boxes, says):
    with pytest.raises(ValueError, match=says):
        detector()(frames, boxes)
    with pytest.raises(ValueError, match="num_classes must be at least 1; got 0"):
        videomae.detector("vit_tiny", num_classes=0)
