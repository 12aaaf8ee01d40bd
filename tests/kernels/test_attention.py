"""attention: values and the gradient of packed qkv, both backward kernels, extremes, registration, refusals."""

import pytest
import torch

from kernels import tiles
from kernels.attention import attention, attention_ref, forward_op
from tests.kernels.harness import (
    assert_matches,
    assert_works_captured,
    assert_works_compiled,
    sweep,
    values_and_gradients,
)

# smallest; odd everything, narrower than a tile; heads as in H (80 = 64 + 16) and in V2's giant (88); one past a block
# of queries; ViT-S at 90 % masking; one past what one program's backward holds
SHAPES = [(1, 1, 1, 1), (2, 37, 3, 7), (1, 80, 2, 80), (1, 33, 1, 88), (1, 65, 2, 32), (1, 160, 2, 64), (1, 257, 1, 64)]
LONG = [(1, 2048, 1, 16), (1, 400, 2, 80)]


def make(shape, dtype=torch.float32, device="cpu"):
    batch, tokens, heads, width = shape
    torch.manual_seed(0)
    qkv, dout = torch.randn(batch, tokens, 3, heads, width) * 1.5, torch.randn(batch, tokens, heads * width)
    return qkv.to(device, dtype), dout.to(device, dtype)


def plain(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * qkv.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


CASES = sweep([*SHAPES, *LONG], half=[(2, 37, 3, 7), (1, 160, 2, 64)], long=LONG)


# float32's small tiles take minutes over 2048 tokens in the interpreter
@pytest.mark.parametrize(("shape", "dtype"), [c for c in CASES if c.values != (LONG[0], torch.float32)])
def test_matches_the_reference(shape, dtype, kernel_device):
    qkv, dout = make(shape, dtype, kernel_device)
    assert_matches(attention, attention_ref, plain, (qkv,), (dout,))


@pytest.mark.parametrize("rows", [64, 32], ids=["whole", "blocked"])
@pytest.mark.parametrize("width", [64, 80])
def test_both_backward_kernels_match(rows, width, kernel_device):
    """float32 would never take the first, half precision only takes the second on long sequences."""
    qkv, dout = make((2, 50, 2, width), torch.float32, kernel_device)
    tile = {"ROWS": rows, "COLS": 16, "num_warps": 4, "num_stages": 1}
    with tiles.trying("attention.backward", tile):
        assert_matches(attention, attention_ref, plain, (qkv,), (dout,))


def test_survives_scores_that_overflow_exponentials(kernel_device):
    qkv, dout = make((1, 40, 1, 16), torch.float32, kernel_device)
    qkv[:, :, :2] *= 40  # scores of thousands
    out, gradient = values_and_gradients(attention, (qkv.requires_grad_(),), (dout,))
    truth = values_and_gradients(attention_ref, (qkv.detach().double().requires_grad_(),), (dout.double(),))
    torch.testing.assert_close(out.double(), truth[0], atol=1e-4, rtol=0)
    # backward computes the weights again from scores of 1e4, where float32 has steps of 1e-3
    assert (gradient - truth[1]).abs().max() <= 2e-3 * truth[1].abs().max()


@pytest.mark.parametrize("rows", [64, 32], ids=["whole", "blocked"])
def test_keys_past_the_end_count_nothing_where_every_score_is_very_low(rows, kernel_device):
    """A zero in place of a key would win by far."""
    qkv, dout = make((1, 37, 1, 16), torch.float32, kernel_device)
    qkv[:, :, :2] *= 0.05
    qkv[:, :, 0] += 20
    qkv[:, :, 1] -= 20  # scores of about -1600
    with tiles.trying("attention.backward", {"ROWS": rows, "COLS": 16, "num_warps": 4, "num_stages": 1}):
        out, gradient = values_and_gradients(attention, (qkv.requires_grad_(),), (dout,))
    truth = values_and_gradients(attention_ref, (qkv.detach().double().requires_grad_(),), (dout.double(),))
    torch.testing.assert_close(out.double(), truth[0], atol=1e-3, rtol=0)
    assert (gradient - truth[1]).abs().max() <= 1e-3 * truth[1].abs().max()


def test_agrees_with_torch(kernel_device):
    qkv, _ = make((2, 37, 3, 64), torch.float32, kernel_device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(qkv), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)], ids=["no clip", "no token"])
def test_takes_nothing(shape, kernel_device):
    qkv, dout = make(shape, torch.float32, kernel_device)
    out = attention(qkv.requires_grad_())
    assert out.shape == dout.shape
    assert torch.autograd.grad(out, qkv, dout)[0].shape == qkv.shape


def test_is_registered_as_torch_wants_it(bare_kernel_device):
    qkv, _ = make((1, 5, 2, 16), torch.float32, bare_kernel_device)
    torch.library.opcheck(forward_op, (qkv.requires_grad_(),))


def test_works_compiled(kernel_device):
    qkv, dout = make((2, 37, 2, 16), torch.float32, kernel_device)
    assert_works_compiled(attention, (qkv,), (dout,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_works_captured(kernel_device):
    qkv, dout = make((2, 160, 3, 64), torch.bfloat16, kernel_device)
    assert_works_captured(attention, (qkv,), (dout,))


@pytest.mark.parametrize(
    ("qkv", "says"),
    [
        (torch.zeros(2, 5, 2, 4, 16), r"\[B, V, 3, A, d\]; got shape"),
        (torch.zeros(2, 5, 192), r"\[B, V, 3, A, d\]"),
        (torch.zeros(1, 5, 3, 1, 129), "1 to 128 wide; got 129"),
        (torch.zeros(2, 5, 4, 3, 16).transpose(2, 3), "contiguous"),
    ],
    ids=["two", "flat", "wide", "strides"],
)
def test_refuses(qkv, says):
    with pytest.raises(ValueError, match=says):
        attention(qkv)
