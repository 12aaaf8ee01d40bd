"""pixel_loss against RECIPES B written out in float64, and torch's other errors; its gradients, and the cases where
precision is easily lost."""

import pytest
import torch
from einops import rearrange
from torch.nn import functional

from kernels import pixel_loss
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from kernels.pixel_loss import ERRORS, forward_op, pixel_loss_ref, rescale_op
from tests.kernels.harness import assert_matches, assert_works_captured, assert_works_compiled, sweep
from tests.tolerance import assert_as_good_as_torch
from videomae import masking

CUBE = (2, 16, 16)


def make(seed=0, batch=2):
    torch.manual_seed(seed)
    frames = torch.randint(0, 256, (batch, 4, 32, 48, 3), dtype=torch.uint8)
    masked = masking.tube((2, 2, 3), 0.7, keys=torch.arange(batch)).masked
    return frames, masked, torch.randn(batch, masked.shape[1], 1536)


def targets(frames, masked, normalize=True):
    """Cube by cube, as the recipe says it, in float64."""
    videos = frames.double() / 255
    cubes = rearrange(videos, "b (t p0) (h p1) (w p2) c -> b (t h w) (p0 p1 p2) c", p0=2, p1=16, p2=16)
    found = []
    for b in range(len(frames)):
        for n in masked[b]:
            cube = cubes[b, n]
            if normalize:
                cube = (cube - cube.mean(0)) / (cube.var(0, unbiased=True).sqrt() + 1e-6)
            found.append(rearrange(cube, "p c -> (p c)"))
    return torch.stack(found).view(*masked.shape, -1)


def written_out(pred, frames, masked, normalize=True):
    return ((pred.double() - targets(frames, masked, normalize)) ** 2).mean(dim=(1, 2))


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


OTHERS = {"l1": functional.l1_loss, "smooth-l1": functional.smooth_l1_loss}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error", OTHERS)
def test_measures_other_errors_as_torch_does(error, dtype, normalize):
    frames, masked, pred = make()
    pred = (pred * 2).to(dtype).requires_grad_()
    weight, target = torch.tensor([0.5, 1.5]), targets(frames, masked, normalize)
    truth_pred = pred.detach().double().requires_grad_()
    each = OTHERS[error](truth_pred, target, reduction="none").mean(dim=(1, 2))
    for weights, truth in ((None, each.mean()), (weight, (each * weight).sum() / weight.sum())):
        loss = pixel_loss(pred, frames, masked, normalize, weight=weights, scale=3.0, error=error)
        torch.testing.assert_close(loss.double(), 3 * truth, rtol=1e-6, atol=0)
        got = torch.autograd.grad(loss, pred)[0].double()
        wanted = torch.autograd.grad(3 * truth, truth_pred, retain_graph=True)[0]
        # of the largest slope; the target has a few roundings of its own
        assert (got - wanted).abs().max() <= max(torch.finfo(dtype).eps, 4e-6) * wanted.abs().max()


def assert_turns_in_the_right_places(device):
    """Where the prediction is right, and where smooth-l1 goes over into a line; a black cube has target 0."""
    frames = torch.zeros(1, 1, 2, 4, 3, dtype=torch.uint8, device=device)
    masked, pred = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(1, 1, 24, device=device)
    pred[0, 0, :6] = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -3.0])
    slopes = {"mse": [0, 0, 2, -2, 1, -6], "l1": [0, 0, 1, -1, 1, -1], "smooth-l1": [0, 0, 1, -1, 0.5, -1]}
    sums = {"mse": 11.25, "l1": 5.5, "smooth-l1": 3.625}
    for error in ERRORS:
        loss = pixel_loss(pred.requires_grad_(), frames, masked, cube=(1, 2, 4), scale=24.0, error=error)
        assert loss.item() == pytest.approx(sums[error])
        slope = torch.autograd.grad(loss, pred)[0][0, 0]
        torch.testing.assert_close(slope[:6].cpu(), torch.tensor(slopes[error], dtype=torch.float32))
        assert slope[6:].abs().max() == 0


def test_turns_in_the_right_places():
    assert_turns_in_the_right_places("cpu")


def test_other_errors_pass_on_what_is_not_finite():
    frames, masked, pred = make()
    for error in ERRORS:
        pred[0, 0, 0] = float("nan")
        assert pixel_loss(pred, frames, masked, error=error).isnan()
        pred[0, 0, 0] = float("inf")
        assert pixel_loss(pred, frames, masked, error=error).isinf()


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


def kernel_case(dtype, device, cube=CUBE, batch=2, count=5, frames=4, height=32, width=48, channels=3):
    torch.manual_seed(0)
    clip = torch.randint(0, 256, (batch, frames, height, width, channels), dtype=torch.uint8)
    num_cubes = (frames // cube[0]) * (height // cube[1]) * (width // cube[2])
    masked = torch.stack([torch.randperm(num_cubes)[:count] for _ in range(batch)])
    pred = torch.randn(batch, count, cube[0] * cube[1] * cube[2] * channels).to(device, dtype)
    return pred, clip.to(device), masked.to(device)


MEANS, STDS = (0.485, 0.456, 0.406, 0.1, 0.9), (0.229, 0.224, 0.225, 0.5, 0.05)


def assert_kernel_matches(
    pred, clip, masked, cube=CUBE, normalize=True, weight=None, scale=1.0, upstream=0.7, error="mse"
):
    channels = clip.shape[-1]
    constants = {"mean": MEANS[:channels], "std": STDS[:channels], "error": error}

    def op(pred):
        return pixel_loss(pred, clip, masked, normalize, cube=cube, weight=weight, scale=scale, **constants)

    def reference(pred):
        return pixel_loss_ref(pred, clip, masked, cube, normalize, weight, scale, *constants.values())

    assert_matches(op, reference, reference, (pred,), (torch.tensor(upstream, device=pred.device),))


# one cube of one clip; odd counts; a real clip at 16x112x112; other cubes, sides that are no powers of two, channels; a
# cube of 2 pixels; entries that fill no group of vectors
KERNEL_CASES = {
    "one cube": {"batch": 1, "count": 1},
    "odd": {"batch": 3, "count": 7},
    "real": {"frames": 16, "height": 112, "width": 112, "count": 80},
    "cube 1x8x8": {"cube": (1, 8, 8), "count": 9},
    "cube 4x32x32": {"height": 64, "width": 64, "cube": (4, 32, 32), "count": 3},
    "cube 2x14x14": {"height": 42, "width": 56, "cube": (2, 14, 14)},
    "cube 3x12x20": {"frames": 6, "height": 36, "width": 60, "cube": (3, 12, 20)},
    "two pixels": {"cube": (1, 1, 2)},
    "one channel": {"channels": 1, "cube": (1, 8, 8)},
    "five channels": {"channels": 5, "cube": (1, 8, 8)},
}


@pytest.mark.parametrize(("case", "dtype"), sweep(KERNEL_CASES, half=["odd"], long=["real", "cube 4x32x32"]))
def test_kernel_matches_the_reference(case, dtype, kernel_device):
    sizes = KERNEL_CASES[case]
    assert_kernel_matches(*kernel_case(dtype, kernel_device, **sizes), cube=sizes.get("cube", CUBE))


@pytest.mark.parametrize(("normalize", "dtype"), sweep([True, False]))
def test_kernel_takes_float_frames_and_plain_targets(normalize, dtype, kernel_device):
    pred, clip, masked = kernel_case(dtype, kernel_device)
    mean, std = (torch.tensor(v, device=kernel_device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert_kernel_matches(pred, clip, masked, normalize=normalize)
    assert_kernel_matches(pred, (clip / 255 - mean) / std, masked, normalize=normalize)


@pytest.mark.parametrize(("error", "dtype"), sweep(OTHERS, long=["l1"]))
def test_kernel_measures_other_errors(error, dtype, kernel_device):
    sizes = {"batch": 3, "count": 1, "frames": 1, "height": 4, "width": 8}
    pred, clip, masked = kernel_case(dtype, kernel_device, cube=(1, 4, 4), **sizes)
    weight = torch.tensor([0.3, 0.0, 2.0], device=kernel_device)
    assert_kernel_matches(pred * 2, clip, masked, cube=(1, 4, 4), weight=weight, scale=0.25, error=error)


@pytest.mark.long
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("error", OTHERS)
def test_kernel_measures_other_errors_of_all_frames(error, normalize, kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device, count=2, cube=(2, 8, 8))
    for frames in (clip, clip / 255 - 0.5):
        assert_kernel_matches(pred * 2, frames, masked, cube=(2, 8, 8), normalize=normalize, error=error)


def test_kernel_turns_in_the_right_places(kernel_device):
    assert_turns_in_the_right_places(kernel_device)


@pytest.mark.parametrize("upstream", [1.0, 65536.0, 0.0])
def test_kernel_scales_in_forward_and_by_what_comes_from_above(upstream, kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    assert_kernel_matches(pred, clip, masked, scale=0.25, upstream=upstream)
    assert_kernel_matches(pred, clip, masked, scale=torch.tensor(8.0, device=kernel_device), upstream=upstream)


def test_kernel_saves_half_precision_gradients_from_underflow_by_the_scale(kernel_device):
    """1e-8 is nothing in float16; the loss scale enters before the rounding."""
    pred, clip, masked = kernel_case(torch.float16, kernel_device, batch=2, count=4)
    pred = (pred * 0.01).requires_grad_()
    loss = pixel_loss(pred, clip, masked, scale=1e-3) * 1e3
    lost = torch.autograd.grad(loss, pred)[0]
    kept = torch.autograd.grad(pixel_loss(pred, clip, masked, scale=1e3), pred)[0]
    assert lost.unique().numel() < kept.unique().numel() / 4


def test_kernel_weights_clips_and_ignores_what_has_no_weight(kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device, batch=3)
    weight = torch.tensor([0.3, 0.0, 2.0], device=kernel_device)
    assert_kernel_matches(pred, clip, masked, weight=weight)
    assert_kernel_matches(pred, clip, masked, weight=torch.zeros(3, device=kernel_device))
    pred[1] = float("nan")
    pred.requires_grad_()
    loss = pixel_loss(pred, clip, masked, weight=weight)
    gradient = torch.autograd.grad(loss, pred)[0]
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0


def test_kernel_gives_exactly_zero_target_for_a_constant_cube(kernel_device):
    values = torch.arange(0, 256, 15, dtype=torch.uint8)
    clip = values[:, None, None, None, None].expand(18, 2, 16, 16, 3).contiguous()
    clip, masked = clip.to(kernel_device), torch.zeros(18, 1, dtype=torch.int64, device=kernel_device)
    zeros = torch.zeros(18, 1, 1536, device=kernel_device)
    assert pixel_loss(zeros, clip, masked).item() == 0.0
    mean, std = (torch.tensor(v, device=kernel_device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert pixel_loss(zeros, (clip / 255 - mean) / std, masked).item() == 0.0


def test_kernel_keeps_small_deviations_on_a_bright_ground(kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    clip[:] = 250
    clip[..., 5, 0] = 251
    assert_kernel_matches(pred, clip, masked)


def test_kernel_gives_nan_for_a_cube_that_is_none(kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    for wrong in (-1, 12, 2**40):
        broken = masked.clone()
        broken[1, 2] = wrong
        assert pixel_loss(pred, clip, broken).isnan()


def test_kernel_writes_no_gradient_where_none_is_wanted(kernel_device, monkeypatch):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    made = []
    like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append(like(*a, **k)) or made[-1])
    plain = pixel_loss(pred, clip, masked)
    with torch.no_grad():
        unrecorded = pixel_loss(pred.requires_grad_(), clip, masked)
    assert made == []
    assert torch.equal(plain, unrecorded)
    assert torch.equal(pixel_loss(pred, clip, masked).detach(), plain)
    assert len(made) == 1


def test_kernel_refuses_a_second_backward_through_one_graph(kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    loss = pixel_loss(pred.requires_grad_(), clip, masked)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_kernel_refuses_it_behind_saved_tensor_hooks_too(kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = pixel_loss(pred.requires_grad_(), clip, masked)
    loss.backward(torch.tensor(3.0, device=kernel_device), retain_graph=True)
    with pytest.raises(RuntimeError, match="hands out its gradient once"):
        loss.backward()


def test_kernel_goes_with_recomputation_and_two_passes_through_it(kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    pred.requires_grad_()

    def recomputed(pred):
        return torch.utils.checkpoint.checkpoint(lambda p: pixel_loss(p, clip, masked), pred, use_reentrant=False)

    up = torch.tensor(3.0, device=kernel_device)
    (wanted,) = torch.autograd.grad(pixel_loss(pred, clip, masked), pred, up)
    loss = recomputed(pred)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(loss, pred, up, retain_graph=True)[0], wanted)


@pytest.mark.long
def test_kernel_compiles_a_few_times_for_any_batch(kernel_device):
    """A dozen times would be once for every batch, and an error."""
    torch._dynamo.reset()
    compiled = torch.compile(pixel_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in range(2, 12):
        pred, clip, masked = kernel_case(torch.float32, kernel_device, batch=batch, count=1, cube=(2, 8, 8))
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(pred, clip, masked, cube=(2, 8, 8)), pixel_loss(pred, clip, masked, cube=(2, 8, 8))
            )


def test_kernel_takes_an_empty_batch(kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    pred = pred[:0].requires_grad_()
    loss = pixel_loss(pred, clip[:0], masked[:0])
    assert loss.item() == 0
    assert torch.autograd.grad(loss, pred)[0].shape == pred.shape


@pytest.mark.parametrize(
    ("error", "writes"), [("mse", True), ("mse", False), pytest.param("l1", True, marks=pytest.mark.long)]
)
def test_kernel_is_registered_as_torch_wants_it(error, writes, bare_kernel_device):
    pred, clip, masked = kernel_case(torch.float32, bare_kernel_device, batch=1, count=2)
    torch.library.opcheck(forward_op, (pred, clip, masked, None, None, None, CUBE, True, error, 0.1, writes))
    torch.library.opcheck(rescale_op, (pred, torch.tensor(3.0, device=bare_kernel_device)))


@pytest.mark.long
def test_kernel_works_compiled(kernel_device):
    pred, clip, masked = kernel_case(torch.float32, kernel_device)
    weight = torch.tensor([0.5, 1.0], device=kernel_device)
    for upstream in (1.0, 3.0):
        up = torch.tensor(upstream, device=kernel_device)
        assert_works_compiled(lambda pred: pixel_loss(pred, clip, masked), (pred,), (up,))
    options = {"weight": weight, "scale": 2.0, "error": "smooth-l1"}
    assert_works_compiled(lambda pred: pixel_loss(pred, clip, masked, **options), (pred,), (up,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_works_captured(kernel_device):
    pred, clip, masked = kernel_case(torch.bfloat16, kernel_device)
    up = torch.tensor(3.0, device=kernel_device)
    assert_works_captured(lambda pred: pixel_loss(pred, clip, masked), (pred,), (up,))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pred": torch.zeros(2, 8, 1535)}, "pred must be"),
        ({"pred": torch.zeros(2, 8, 1536, dtype=torch.int32)}, "floating point"),
        ({"masked": torch.zeros(2, 8, dtype=torch.bool)}, "from_bool"),
        ({"weight": torch.ones(3)}, "weight must be"),
        ({"cube": (3, 16, 16)}, "multiples of the cube"),
        ({"cube": (1, 1, 1)}, "no variance"),
        ({"pred": torch.zeros(2, 1536, 8).mT}, "pred must be contiguous"),
        ({"scale": torch.ones(2)}, "scale must be one number; got shape .2,"),
        ({"scale": torch.ones((), requires_grad=True)}, "scale is fixed"),
        ({"weight": torch.ones(2, requires_grad=True)}, "weight is fixed"),
        ({"weight": torch.ones(2, device="meta")}, "weight is on meta, frames on cpu"),
        ({"mean": (0.5,)}, "3 channels"),
        ({"error": "huber"}, "error must be one of mse, l1, smooth-l1; got 'huber'"),
    ],
    ids=[
        "entries",
        "int",
        "boolean mask",
        "weight",
        "cube",
        "one pixel",
        "strides",
        "scale",
        "trained scale",
        "trained weight",
        "device",
        "mean",
        "error",
    ],
)
def test_refuses(change, says):
    frames, masked, pred = make()
    assert masked.shape == (2, 8)
    with pytest.raises(ValueError, match=says):
        pixel_loss(**({"pred": pred, "frames": frames, "masked": masked} | change))
