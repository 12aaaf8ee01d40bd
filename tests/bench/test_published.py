"""The baseline `published` computes what our model does: it is slow for what it moves, not for what it is."""

import pytest
import torch
from torch import Tensor

from bench.published import pixel_target as published_target
from bench.published import published_loss, to_video
from bench.shapes import Shape
from bench.steps import clips_and_keys, model_of, our_step, published_step, transformers_step
from kernels import pixel_loss
from kernels.pixel_loss import pixel_target
from videomae import masking
from videomae.model import VideoMAE

# 2 x 3 x 3 cubes, 4 of 9 places hidden: no two of the letters are equal
SMALL = Shape("vit_tiny", clips=2, width=64, heads=4, decoder_width=64, frames=4, side=48, ratio=0.5)
CPU = torch.device("cpu")


def randomised_model() -> VideoMAE:
    """With biases and norms that are not 0 and 1, so that each of them matters."""
    torch.manual_seed(0)
    model = model_of(SMALL)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1 or weight.shape[0] == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


def batch() -> tuple[Tensor, masking.Mask]:
    frames, keys = clips_and_keys(SMALL)
    return frames, masking.tube(SMALL.grid, SMALL.ratio, keys=keys)


def gradients(model: VideoMAE, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def test_loss_and_every_gradient_are_ours():
    model = randomised_model()
    frames, mask = batch()
    ours = pixel_loss(model(frames, mask), frames, mask.masked)
    theirs = published_loss(model, to_video(frames), mask.to_bool())
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
    wanted, got = gradients(model, ours), gradients(model, theirs)
    assert wanted.keys() == got.keys()
    for name, gradient in got.items():
        error = torch.linalg.vector_norm(gradient - wanted[name]) / torch.linalg.vector_norm(wanted[name])
        assert error < 1e-5, f"{name} is off by {error:.1e}"


def test_the_target_is_ours():
    frames, mask = batch()
    got = published_target(to_video(frames), mask.to_bool(), (2, 16, 16))
    torch.testing.assert_close(got, pixel_target(frames, mask.masked, (2, 16, 16)), rtol=0, atol=1e-4)


def test_the_video_is_float_channels_first_and_normalised():
    frames = torch.zeros(1, 4, 48, 48, 3, dtype=torch.uint8)
    frames[0, 3, 5, 7, 1] = 255
    video = to_video(frames)
    assert video.shape == (1, 3, 4, 48, 48)
    assert video.dtype == torch.float32
    assert video.is_contiguous()
    assert video[0, 1, 3, 5, 7].item() == pytest.approx((1 - 0.456) / 0.224)
    assert video[0, 2, 3, 5, 7].item() == pytest.approx(-0.406 / 0.225)


@pytest.mark.parametrize("build", [transformers_step, published_step])
def test_steps_of_every_side_give_the_same_losses(build):
    if build is transformers_step:
        pytest.importorskip("transformers")
    weights = randomised_model()
    ours, theirs = our_step(SMALL, CPU, weights=weights), build(SMALL, CPU, weights=weights)
    wanted = torch.stack([ours.run() for _ in range(4)])
    got = torch.stack([theirs.run() for _ in range(4)])
    assert (wanted[:-1] > wanted[1:]).all()  # it learns
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=0)


def test_every_side_has_weights_of_its_own():
    weights = randomised_model()
    before = {name: value.clone() for name, value in weights.state_dict().items()}
    our_step(SMALL, CPU, weights=weights).run()
    published_step(SMALL, CPU, weights=weights).run()
    for name, value in weights.state_dict().items():
        assert torch.equal(value, before[name]), name
