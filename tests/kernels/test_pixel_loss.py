"""pixel_loss against RECIPES B written out in float64, its gradients, and the cases where precision is easily lost."""

import pytest
import torch
from einops import rearrange

from kernels import pixel_loss
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from tests.tolerance import assert_as_good_as_torch
from videomae import masking

CUBE = (2, 16, 16)


def make(seed=0, batch=2):
    torch.manual_seed(seed)
    frames = torch.randint(0, 256, (batch, 4, 32, 48, 3), dtype=torch.uint8)
    masked = masking.tube((2, 2, 3), 0.7, keys=torch.arange(batch)).masked
    return frames, masked, torch.randn(batch, masked.shape[1], 1536)


def written_out(pred, frames, masked, normalize=True):
    """Cube by cube, as the recipe says it."""
    videos = frames.double() / 255
    cubes = rearrange(videos, "b (t p0) (h p1) (w p2) c -> b (t h w) (p0 p1 p2) c", p0=2, p1=16, p2=16)
    per_clip = []
    for b in range(len(frames)):
        errors = []
        for m, n in enumerate(masked[b]):
            cube = cubes[b, n]
            if normalize:
                cube = (cube - cube.mean(0)) / (cube.var(0, unbiased=True).sqrt() + 1e-6)
            errors.append((pred[b, m].double() - rearrange(cube, "p c -> (p c)")) ** 2)
        per_clip.append(torch.stack(errors).mean())
    return torch.stack(per_clip)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_the_mean_squared_error_against_the_recipe(normalize, dtype):
    frames, masked, pred = make()
    pred = pred.to(dtype).requires_grad_()
    loss = pixel_loss(pred, frames, masked, normalize=normalize)
    assert loss.dtype == torch.float32
    truth_pred = pred.detach().double().requires_grad_()
    truth = written_out(truth_pred, frames, masked, normalize).mean()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    got, wanted = torch.autograd.grad(loss, pred)[0], torch.autograd.grad(truth, truth_pred)[0]
    assert_as_good_as_torch(got, wanted, wanted.to(dtype))


def test_gives_exactly_zero_target_for_a_constant_cube():
    masked = torch.arange(12).repeat(256, 1)
    frames = torch.arange(256, dtype=torch.uint8)[:, None, None, None, None].expand(256, 4, 32, 48, 3).contiguous()
    zeros = torch.zeros(256, 12, 1536)
    assert pixel_loss(zeros, frames, masked).item() == 0.0
    # and for float frames, where a mean of equal numbers need not be that number
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    assert pixel_loss(zeros, (frames.float() / 255 - mean) / std, masked).item() == 0.0


def test_keeps_small_deviations_on_a_bright_ground():
    frames, masked, pred = make()
    frames[:] = 250
    frames[..., ::2, :] = 251
    torch.testing.assert_close(
        pixel_loss(pred, frames, masked).double(), written_out(pred, frames, masked).mean(), rtol=1e-6, atol=0
    )


def test_takes_normalised_float_frames():
    frames, masked, pred = make()
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    normalised = (frames.float() / 255 - mean) / std
    for normalize in (True, False):
        torch.testing.assert_close(
            pixel_loss(pred, normalised, masked, normalize),
            pixel_loss(pred, frames, masked, normalize),
            rtol=1e-5,
            atol=0,
        )


def test_weights_clips_and_leaves_out_those_with_weight_zero():
    frames, masked, pred = make(batch=3)
    per_clip = written_out(pred, frames, masked).float()
    torch.testing.assert_close(
        pixel_loss(pred, frames, masked, weight=torch.tensor([1.0, 0.0, 3.0])), (per_clip[0] + 3 * per_clip[2]) / 4
    )
    pred[1] = float("nan")
    pred.requires_grad_()
    loss = pixel_loss(pred, frames, masked, weight=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(loss, (per_clip[0] + per_clip[2]) / 2)
    gradient = torch.autograd.grad(loss, pred)[0]
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0


def test_is_zero_when_no_clip_has_weight():
    frames, masked, pred = make()
    pred.requires_grad_()
    loss = pixel_loss(pred, frames, masked, weight=torch.zeros(2))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, pred)[0].abs().max() == 0


def test_scales_by_a_number_or_a_tensor():
    frames, masked, pred = make()
    plain = pixel_loss(pred, frames, masked)
    torch.testing.assert_close(pixel_loss(pred, frames, masked, scale=0.25), plain * 0.25)
    torch.testing.assert_close(pixel_loss(pred, frames, masked, scale=torch.tensor(8.0)), plain * 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pred": torch.zeros(2, 8, 1535)}, "pred must be"),
        ({"pred": torch.zeros(2, 8, 1536, dtype=torch.int32)}, "floating point"),
        ({"masked": torch.zeros(2, 8, dtype=torch.bool)}, "from_bool"),
        ({"weight": torch.ones(3)}, "weight must be"),
        ({"cube": (3, 16, 16)}, "multiples of the cube"),
        ({"cube": (1, 1, 1)}, "no variance"),
    ],
    ids=["entries", "int", "boolean mask", "weight", "cube", "one pixel"],
)
def test_refuses(change, says):
    frames, masked, pred = make()
    assert masked.shape == (2, 8)
    with pytest.raises(ValueError, match=says):
        pixel_loss(**({"pred": pred, "frames": frames, "masked": masked} | change))
