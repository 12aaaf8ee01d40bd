"""Mixup, CutMix, random erasing and the loss of mixed labels."""

import math
import time

import numpy as np
import pytest
import torch

from kernels import cube_embed
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from tests.kernels.harness import assert_works_captured, assert_works_compiled
from videomae.clip import sinusoid_positions
from videomae.data.mix import (
    Box,
    Erasing,
    Mix,
    Mixing,
    _beta,
    _draw_group,
    blend_tokens,
    cut,
    draw_erasing,
    draw_mix,
    erase,
    mixed_cross_entropy,
    normalize,
)
from videomae.keys import Draws, key

SIZE = (48, 32)  # height, width
CUTMIX, MIXUP = Mixing(mixup=0), Mixing(cutmix=0)


def clips(batch=8, seed=0, frames=4):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, *SIZE, 3), dtype=torch.uint8)


def keys_of(batch, seed=5):
    return [key(seed, i) for i in range(batch)]


def mixed(mixing, group, batch=8, seed=5, present=None):
    return draw_mix(mixing, group, keys_of(batch, seed), SIZE, present or [True] * batch)


class Given:
    """Draws that were made before."""

    def __init__(self, *numbers):
        self._numbers = list(numbers)

    def uniform(self):
        return self._numbers.pop(0)

    def below(self, n):
        assert self._numbers[0] in range(n)
        return self._numbers.pop(0)


def uniforms_for(lam):
    """Two draws of which Beta(1, 1) makes that share: with V = 0, 1/2 + sqrt(1 - U) / 2, turned round for V = 1/2."""
    return (2 * lam - 1) ** 2, 0.0 if lam >= 0.5 else 0.5


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0, 4.0])
def test_draws_have_the_beta_distribution(alpha):
    count = 20_000
    drawn = np.sort([_beta(alpha, Draws(3, i)) for i in range(count)])
    assert abs(drawn.mean() - 0.5) < 0.006
    assert abs(drawn.var() * 4 * (2 * alpha + 1) - 1) < 0.03
    # x = sin^2(angle) takes the poles of the density away
    angle = np.linspace(0, math.pi / 2, 20_001)
    density = (np.sin(angle) * np.cos(angle)) ** (2 * alpha - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    wanted = np.interp(np.arcsin(np.sqrt(drawn)), angle, below / below[-1])
    # Kolmogorov and Smirnov's distance; 1.63 is exceeded by one sample in a hundred
    distance = np.abs(wanted - np.arange(count) / count).max()
    assert distance * math.sqrt(count) < 1.63


@pytest.mark.parametrize("alpha", [1e-3, 1e3])
def test_extreme_alphas_draw_shares(alpha):
    drawn = np.array([_beta(alpha, Draws(i)) for i in range(500)])
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert (np.abs(drawn - 0.5) > 0.49).mean() > 0.97 if alpha < 1 else (np.abs(drawn - 0.5) < 0.05).all()


@pytest.mark.parametrize(
    ("lam", "y", "x", "box"),
    [
        # sides are int(48 * 0.5) = 24 and int(32 * 0.5) = 16
        (0.75, 20, 15, Box(8, 7, 32, 23)),
        (0.75, 0, 31, Box(0, 23, 12, 32)),
        # a scale of 0.6: int(28.8) = 28, and int(19.2) = 19 of which halves are 9
        (0.64, 40, 16, Box(26, 7, 48, 25)),
        (0.0001, 24, 16, Box(1, 1, 47, 31)),
    ],
)
def test_cutmix_draws_this_box_and_counts_its_pixels(lam, y, x, box):
    draws = Given(0.9, 0.49, *uniforms_for(lam), y, x)
    share, drawn = _draw_group(Mixing(), SIZE, draws)
    assert drawn == box
    assert share == 1 - (box.bottom - box.top) * (box.right - box.left) / (48 * 32)


def test_mixup_draws_this_share_and_a_box_without_pixels_mixes_nothing():
    assert _draw_group(Mixing(mixup=1.0), SIZE, Given(0.9, 0.5, *uniforms_for(0.3))) == (pytest.approx(0.3), None)
    assert _draw_group(Mixing(), SIZE, Given(0.9, 0.1, *uniforms_for(1.0), 20, 15)) == (1.0, None)


def test_groups_are_mixed_and_cut_as_often_as_asked():
    def shares(mixing, groups=2000):
        drawn = [_draw_group(mixing, SIZE, Draws(7, i)) for i in range(groups)]
        untouched = sum(lam == 1 and box is None for lam, box in drawn) / groups
        return untouched, sum(box is not None for _, box in drawn) / groups

    assert shares(Mixing()) == (pytest.approx(0, abs=0.01), pytest.approx(0.5, abs=0.03))
    assert shares(Mixing(switch=0.2))[1] == pytest.approx(0.2, abs=0.03)
    assert shares(Mixing(probability=0.3))[0] == pytest.approx(0.7, abs=0.03)
    assert shares(CUTMIX)[1] > 0.98
    assert shares(MIXUP)[1] == 0
    assert all(mixing.mixes for mixing in (Mixing(), CUTMIX, MIXUP))
    for mixing in (Mixing(probability=0), Mixing(mixup=0, cutmix=0)):
        assert shares(mixing) == (1, 0)
        assert not mixing.mixes


def test_a_group_shares_one_draw_and_pairs_from_both_ends():
    for seed in range(6):
        mix, boxes = mixed(Mixing(), 4, seed=seed)
        assert mix.partner.tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
        for first in (0, 4):
            same = slice(first, first + 4)
            assert len(set(boxes[same])) == len(set(mix.lam[same].tolist())) == 1
            blend = 1 if boxes[first] else mix.lam[first]
            assert (mix.blend[same] == blend).all()
        assert mix.lam[0] != mix.lam[4]
    assert (mix.lam.dtype, mix.partner.dtype, mix.blend.dtype) == (torch.float32, torch.int64, torch.float32)


def test_a_group_depends_on_its_own_first_key_only():
    keys = keys_of(8)
    before, boxes = draw_mix(Mixing(), 4, keys, SIZE, [True] * 8)
    after, others = draw_mix(Mixing(), 4, [keys[0], 1, 2, 3, *keys[4:]], SIZE, [True] * 8)
    assert (boxes, before.lam.tolist()) == (others, after.lam.tolist())
    other, _ = draw_mix(Mixing(), 4, [9, *keys[1:]], SIZE, [True] * 8)
    assert (other.lam == before.lam).tolist() == [False] * 4 + [True] * 4


def test_never_changes():
    # a change of these values would change every batch of every run that is to be resumed
    mix, boxes = draw_mix(Mixing(), 2, [1, 1, 3, 3], (224, 224), [True] * 4)
    assert (boxes[0], boxes[2]) == (None, Box(39, 44, 215, 220))
    assert mix.lam.tolist()[::2] == pytest.approx([0.9500976204872131, 0.38265305757522583], rel=1e-6)
    erased = [draw_erasing(Erasing(1.0), clip_key, (224, 224)) for clip_key in (1, 2)]
    assert erased == [Box(49, 49, 117, 188), Box(78, 33, 128, 198)]


@pytest.mark.parametrize("views", [1, 2, 4])
def test_no_video_is_paired_with_itself(views):
    for group in (None, 2 * views, 4 * views, 6 * views):
        size = Mixing(group=group).group_of(views)
        assert size == (group or 2 * views)
        mix, _ = mixed(Mixing(), size, batch=2 * size)
        clip = torch.arange(2 * size)
        assert (clip // views != mix.partner // views).all()
        assert (clip // size == mix.partner // size).all()
        assert torch.equal(mix.partner[mix.partner], clip)


def test_a_clip_that_could_not_be_read_is_not_mixed():
    present = [True, False, True, True]
    for mixing in (CUTMIX, MIXUP):
        mix, boxes = mixed(mixing, 4, 4, present=present)
        assert mix.lam[1:3].tolist() == mix.blend[1:3].tolist() == [1, 1]
        assert boxes[1:3] == [None, None]
        whole, all_boxes = mixed(mixing, 4, 4)
        assert mix.lam[0] == mix.lam[3] == whole.lam[0] < 1
        assert boxes[0] == boxes[3] == all_boxes[0]


def test_cutmix_pastes_the_partner_s_own_pixels_in_every_frame():
    frames = clips()
    mix, boxes = mixed(CUTMIX, 4)
    before = frames.clone()
    got = cut(frames, mix, boxes)
    assert torch.equal(frames, before)
    for clip, box in enumerate(boxes):
        inside = torch.zeros(SIZE, dtype=torch.bool)
        inside[box.top : box.bottom, box.left : box.right] = True
        wanted = torch.where(inside[..., None], frames[mix.partner[clip]], frames[clip])
        assert torch.equal(got[clip], wanted)


def test_lambda_is_the_share_of_own_pixels():
    # a pixel says which clip it came from
    frames = torch.arange(24.0)[:, None, None, None, None].expand(24, 2, *SIZE, 3).contiguous()
    mix, boxes = mixed(CUTMIX, 2, 24)
    own = (cut(frames, mix, boxes) == frames).double().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(mix.lam.double(), own, rtol=0, atol=1e-7)
    # some of the boxes are cut at the border
    assert any(0 in box[:2] or box.bottom == SIZE[0] or box.right == SIZE[1] for box in boxes)


def test_cutmix_leaves_all_without_a_box_as_it_is():
    frames = clips(4)
    mix, boxes = mixed(CUTMIX, 4, 4, present=[True, True, False, True])
    got = cut(frames, mix, boxes)
    assert torch.equal(got[1:3], frames[1:3])
    assert not torch.equal(got[0], frames[0])
    assert cut(frames, *mixed(MIXUP, 4, 4)) is frames


def test_erasing_draws_areas_and_aspects_in_range():
    drawn = [draw_erasing(Erasing(), key(1, i), (224, 200)) for i in range(4000)]
    boxes = [box for box in drawn if box is not None]
    assert len(boxes) / len(drawn) == pytest.approx(0.25, abs=0.02)
    sides = np.array([(b.bottom - b.top, b.right - b.left) for b in boxes])
    area = sides.prod(axis=1) / (224 * 200)
    aspect = np.log(sides[:, 0] / sides[:, 1]) / math.log(1 / 0.3)
    # a side is rounded: by half a pixel of at least sqrt(0.02 * 224 * 200 * 0.3) = 16
    assert 0.02 / 1.07 < area.min() < 0.025
    assert 0.31 < area.max() < 1.07 / 3
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert (np.abs(aspect) < 1.06).all()
    # evenly on a log scale
    assert [(np.abs(aspect) < share).mean() for share in (0.25, 0.5)] == pytest.approx([0.25, 0.5], abs=0.05)
    tops = np.array([(b.top / (224 - h), b.left / (200 - w)) for b, (h, w) in zip(boxes, sides, strict=True)])
    assert all(0 <= b.top < b.bottom <= 224 and 0 <= b.left < b.right <= 200 for b in boxes)
    assert tops.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.03)


def test_erasing_draws_this_box():
    # area 48 * 32 * (0.1 + 0.2 * 0.5) = 307.2, aspect 2^0 of [1/2, 2]: 17.5 rounds to 18
    erasing = Erasing(0.5, (0.1, 0.3), (0.5, 2.0))
    drawn = Given(0.49, 0.5, 0.5, 30, 14)
    assert erased_by(drawn, erasing) == Box(30, 14, 48, 32)
    # aspect 2: 25 high, 12 wide; the second try, as the first is 39 by 39 of 32
    large = Erasing(1.0, (0.2, 1.0), (0.5, 2.0))
    assert erased_by(Given(0.0, 1 - 2**-20, 0.5, 0.0, 1.0, 2, 3), large) == Box(2, 3, 2 + 25, 3 + 12)
    assert erased_by(Given(0.5), erasing) is None


def erased_by(draws, erasing):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("videomae.data.mix.Draws", lambda *numbers: draws)
        return draw_erasing(erasing, 0, SIZE)


def test_erasing_gives_up_after_its_tries():
    # all of the frame, which is too much; one of the draws is left
    draws = Given(0.0, *[0.5, 0.5] * 100, 0.7)
    assert erased_by(draws, Erasing(1.0, (1.0, 1.0), (1.5, 1.5))) is None
    assert draws.uniform() == 0.7


def test_erases_with_normal_noise_that_differs_in_every_frame_pixel_and_channel():
    frames = torch.full((2, 8, 100, 90, 3), 7.0)
    box = Box(10, 20, 90, 85)
    erase(frames, [None, box], [1, 2])
    assert (frames[0] == 7).all()
    noise = frames[1, :, 10:90, 20:85].clone()
    frames[1, :, 10:90, 20:85] = 7
    assert (frames == 7).all()
    assert (noise.mean().item(), noise.var().item()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))
    assert noise.unique().numel() > 0.99 * noise.numel()
    # not correlated with what lies one frame, row, column or channel on
    for dim in range(4):
        near = noise.narrow(dim, 1, noise.shape[dim] - 1) * noise.narrow(dim, 0, noise.shape[dim] - 1)
        assert near.mean().abs() < 0.02


def test_normalizes_as_the_embedding_does():
    frames = clips(2)
    got = normalize(frames, IMAGENET_MEAN, IMAGENET_STD)
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (IMAGENET_MEAN, IMAGENET_STD))
    wanted = (frames.double() / 255 - mean) / std
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)


def augmented(frames, keys, present, group, mixing):
    """What the step is given of these clips: pixels, and all of the mix but the partner's place."""
    pixels = normalize(frames, IMAGENET_MEAN, IMAGENET_STD)
    erase(pixels, [draw_erasing(Erasing(0.5), k, SIZE) for k in keys], keys)
    mix, boxes = draw_mix(mixing, group, keys, SIZE, present)
    tokens = blend_tokens(cut(pixels, mix, boxes).flatten(2), mix)
    return tokens, mix.lam, mix.blend, boxes


@pytest.mark.parametrize("mixing", [Mixing(), Mixing(switch=0.2, probability=0.6)], ids=["always", "sometimes"])
def test_micro_batches_and_places_change_no_bit(mixing):
    frames, keys, group = clips(16), keys_of(16), 4
    present = [i not in (2, 9) for i in range(16)]
    whole, lam, blend, boxes = augmented(frames, keys, present, group, mixing)
    assert not torch.equal(whole[0], whole[1])
    for parts in ([range(4), range(4, 16)], [range(8, 16), range(8)]):
        for part in parts:
            own = slice(part.start, part.stop)
            got = augmented(frames[own], keys[own], present[own], group, mixing)
            for part_of, x in zip(got, (whole, lam, blend), strict=False):
                assert torch.equal(part_of, x[own])
            assert got[3] == boxes[own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blended_tokens_are_the_tokens_of_blended_pixels(dtype):
    torch.manual_seed(0)
    frames = clips(6)
    mix, _ = mixed(MIXUP, 2, 6)
    weight, bias = torch.randn(40, 3, 2, 16, 16, dtype=dtype) * 0.03, torch.randn(40, dtype=dtype)
    weight.requires_grad_()
    positions = sinusoid_positions(2 * 3 * 2, 40).to(dtype)
    got = blend_tokens(cube_embed(frames, weight, bias, positions), mix)
    pixels = normalize(frames, IMAGENET_MEAN, IMAGENET_STD).to(dtype)
    share = mix.lam[:, None, None, None, None].to(dtype)
    wanted = cube_embed(share * pixels + (1 - share) * pixels[mix.partner], weight, bias, positions)
    # float64 too: pixels are normalised in float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (got - cube_embed(frames, weight, bias, positions)).abs().max() > 0.1
    upstream = torch.randn_like(got)
    gradients = (torch.autograd.grad(x, weight, upstream)[0] for x in (got, wanted))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4)


def test_tokens_without_mixup_keep_their_bits():
    tokens = torch.randn(4, 5, 8, dtype=torch.bfloat16)
    assert torch.equal(blend_tokens(tokens, mixed(CUTMIX, 4, 4)[0]), tokens)
    mix = mixed(MIXUP, 4, 4)[0]
    share = mix.blend.double()[:, None, None]
    wanted = share * tokens.double() + (1 - share) * tokens.double()[mix.partner]
    assert torch.equal(blend_tokens(tokens, mix), wanted.to(torch.bfloat16))


def soft_targets(labels, mix, smoothing, classes):
    """RECIPES E.1, written out, in float64."""
    out = []
    for clip, label in enumerate(labels.tolist()):
        lam, other = mix.lam[clip].item(), labels[mix.partner[clip]].item()
        off, on = smoothing / classes, 1 - smoothing + smoothing / classes
        own, others = ([on if c == chosen else off for c in range(classes)] for chosen in (label, other))
        out.append([lam * a + (1 - lam) * b for a, b in zip(own, others, strict=True)])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_soft_targets(smoothing, weighted, dtype):
    torch.manual_seed(1)
    labels = torch.tensor([0, 6, 3, 3, 2, 5, 1, 0])
    weight = torch.tensor([1.0, 0, 1, 1, 0.5, 1, 1, 0]) if weighted else None
    mix, _ = mixed(Mixing(switch=0.5), 4)
    logits = (2 * torch.randn(8, 7, dtype=torch.float64)).to(dtype).requires_grad_()
    got = mixed_cross_entropy(logits, labels, mix, smoothing, weight)
    exact = logits.detach().double().requires_grad_()
    losses = -(soft_targets(labels, mix, smoothing, 7) * torch.log_softmax(exact, dim=1)).sum(dim=1)
    wanted = losses.mean() if weight is None else (losses * weight).sum() / weight.double().sum()
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    close = {"rtol": 1e-6, "atol": 1e-7} if dtype != torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-4}
    # the shares are float32 in every dtype, and what is left of 1 with them
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)
    (3 * got).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, **close)


def test_the_loss_without_a_mix_is_cross_entropy():
    logits, labels = torch.randn(5, 9, dtype=torch.float64), torch.tensor([8, 0, 1, 1, 4])
    wanted = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, None, 0.1), wanted)


def test_clips_without_weight_reach_no_gradient():
    logits = torch.randn(4, 3)
    logits[1] = float("nan")
    logits.requires_grad_()
    labels, present = torch.tensor([0, 1, 2, 0]), [True, False, True, True]
    mix, _ = mixed(MIXUP, 4, 4, present=present)
    mixed_cross_entropy(logits, labels, mix, 0.1, torch.tensor(present).float()).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[0] != 0).all()
    for dtype in (torch.float32, torch.float64):
        assert mixed_cross_entropy(logits.to(dtype), labels, mix, 0.1, torch.zeros(4)) == 0


def tensor_parts():
    """The step's part of mixing, as a function of tensors, and random inputs for it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mix = mixed(MIXUP, 4)[0].to(device)
    labels, weight = torch.arange(8, device=device) % 5, torch.ones(8, device=device)

    def loss(tokens):
        logits = blend_tokens(tokens, mix).mean(dim=1)
        return mixed_cross_entropy(logits, labels, Mix(*mix), 0.1, weight)

    return loss, [torch.randn(8, 3, 5, device=device)], [torch.tensor(0.7, device=device)]


@pytest.mark.long
def test_the_step_s_part_is_compiled_and_captured_without_a_break():
    assert_works_compiled(*tensor_parts())
    if torch.cuda.is_available():
        assert_works_captured(*tensor_parts())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixing(mixup=-0.1), "mix.mixup"),
        (lambda: Mixing(cutmix=math.nan), "mix.cutmix"),
        (lambda: Mixing(probability=1.1), "mix.probability"),
        (lambda: Mixing(switch=-1), "mix.switch"),
        (lambda: Mixing(group=1), "mix.group must be at least 2"),
        (lambda: Mixing(group=6).group_of(2), "multiple of 4, twice the 2 views"),
        (lambda: Mixing().group_of(0), "views"),
        (lambda: Erasing(probability=2), "erasing.probability"),
        (lambda: Erasing(area=(0, 0.3)), "erasing.area"),
        (lambda: Erasing(area=(0.3, 0.2)), "erasing.area"),
        (lambda: Erasing(aspect=(3.3, 0.3)), "erasing.aspect"),
        (lambda: Erasing(tries=0), "erasing.tries"),
        (lambda: mixed(Mixing(), 3, 6), "even number of clips; got 3"),
        (lambda: mixed(Mixing(), 4, 6), "6 clips are no whole groups of 4"),
        (lambda: mixed(Mixing(), 2, 4, present=[True]), "present must be given for 4 clips; got 1"),
        (lambda: normalize(torch.zeros(1, 2, 4, 4, 3), IMAGENET_MEAN, IMAGENET_STD), "uint8"),
        (lambda: normalize(clips(1), (0.5,), (0.5,)), "3 channels"),
        (lambda: erase(clips(1), [None], [1]), "float32 and normalised"),
        (lambda: erase(clips(2).float(), [None], [1]), "1 boxes and 1 keys for 2 clips"),
        (lambda: cut(clips(4), mixed(CUTMIX, 2, 4)[0], [None]), "1 boxes for 4 clips"),
        (lambda: mixed_cross_entropy(torch.zeros(2), torch.tensor([0, 1])), "logits must be"),
        (lambda: mixed_cross_entropy(torch.zeros(2, 3), torch.tensor([0])), "labels must be"),
        (lambda: mixed_cross_entropy(torch.zeros(1, 3), torch.tensor([0]), None, 1.0), "smoothing"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_thousand_clips_are_drawn_in_milliseconds():
    keys, present = keys_of(1024), [True] * 1024
    begin = time.thread_time()
    draw_mix(Mixing(), 2, keys, (224, 224), present)
    for each in keys:
        draw_erasing(Erasing(), each, (224, 224))
    # 0.011 on a quiet core; a busy one may be slower, not by an order
    assert time.thread_time() - begin < 0.15
