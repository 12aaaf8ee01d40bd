"""decoder_input: every token at its place with its own position, and the gradients' way back."""

import pytest
import torch

from kernels import decoder_input, tiles
from kernels.decoder_input import decoder_input_ref, forward_op
from tests.kernels.harness import assert_matches, assert_works_captured, assert_works_compiled, sweep
from videomae import masking


def make():
    torch.manual_seed(0)
    mask = masking.random((2, 3, 3), 0.6, keys=torch.arange(3))
    visible = torch.randn(3, mask.visible.shape[1], 5, dtype=torch.float64, requires_grad=True)
    token = torch.randn(5, dtype=torch.float64, requires_grad=True)
    return visible, token, torch.randn(18, 5, dtype=torch.float64), mask


def test_puts_visible_tokens_first_and_mask_tokens_after_each_with_its_position():
    visible, token, positions, mask = make()
    out = decoder_input(visible, token, positions, mask.visible, mask.masked)
    assert out.shape == (3, 18, 5)
    for b in range(3):
        for v, n in enumerate(mask.visible[b]):
            torch.testing.assert_close(out[b, v], visible[b, v] + positions[n])
        for m, n in enumerate(mask.masked[b]):
            torch.testing.assert_close(out[b, mask.visible.shape[1] + m], token + positions[n])


def test_sends_each_gradient_to_its_source():
    visible, token, positions, mask = make()
    out = decoder_input(visible, token, positions, mask.visible, mask.masked)
    upstream = torch.randn_like(out)
    to_visible, to_token = torch.autograd.grad(out, (visible, token), upstream)
    num_visible = mask.visible.shape[1]
    torch.testing.assert_close(to_visible, upstream[:, :num_visible])
    torch.testing.assert_close(to_token, upstream[:, num_visible:].sum((0, 1)))


def kernel_case(batch, num_visible, num_masked, width, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    order = torch.rand(batch, num_visible + num_masked).argsort(1)
    index = (order[:, :num_visible].contiguous(), order[:, num_visible:].contiguous())
    sizes = ((batch, num_visible, width), (width,), (batch, num_visible + num_masked, width))
    visible, token, dout = (torch.randn(*s).to(device, dtype) for s in sizes)
    positions = torch.randn(num_visible + num_masked, width).to(device)
    return (visible, token), positions, *(i.to(device) for i in index), dout


def assert_kernel_matches(leaves, positions, visible_index, masked_index, dout):
    def op(visible, token):
        return decoder_input(visible, token, positions, visible_index, masked_index)

    def reference(visible, token):
        return decoder_input_ref(visible, token, positions.to(visible.dtype), visible_index, masked_index)

    assert_matches(op, reference, reference, leaves, (dout,))


# smallest; odd; one past a tile of tokens (4096 / 64) and of columns; ViT-S's decoder; H's
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 47), (2, 65, 65, 64), (1, 3, 5, 257), (2, 40, 352, 192), (1, 20, 30, 640)]


@pytest.mark.parametrize(("shape", "dtype"), sweep(SHAPES, half=[(3, 5, 7, 47)]))
def test_kernel_matches_the_reference(shape, dtype, kernel_device):
    assert_kernel_matches(*kernel_case(*shape, dtype, kernel_device))


def test_kernel_sums_the_token_gradient_over_every_block(kernel_device):
    with tiles.trying("decoder_input.backward", {"ROWS": 4, "PROGRAMS": 3, "num_warps": 4}):
        assert_kernel_matches(*kernel_case(5, 7, 21, 24, torch.float32, kernel_device))


def test_kernel_keeps_each_dtype_and_takes_int32(kernel_device):
    (visible, token), positions, seen, hidden, dout = kernel_case(2, 5, 7, 16, torch.float16, kernel_device)
    visible, token = visible.requires_grad_(), token.float().requires_grad_()
    out = decoder_input(visible, token, positions, seen.int(), hidden.to(torch.int16))
    gradients = torch.autograd.grad(out, (visible, token), dout)
    assert [x.dtype for x in (out, *gradients)] == [torch.float16, torch.float16, torch.float32]
    wanted = decoder_input_ref(visible.float(), token, positions, seen, hidden)
    torch.testing.assert_close(out.float(), wanted, atol=5e-3, rtol=0)


def test_kernel_gives_nan_for_a_cube_that_is_none(kernel_device):
    (visible, token), positions, seen, hidden, _ = kernel_case(2, 5, 7, 16, torch.float32, kernel_device)
    for wrong in (-1, 12, 2**40):
        seen_wrong, hidden_wrong = seen.clone(), hidden.clone()
        seen_wrong[1, 2], hidden_wrong[0, 3] = wrong, wrong
        out = decoder_input(visible, token, positions, seen_wrong, hidden_wrong)
        assert out[1, 2].isnan().all()
        assert out[0, 5 + 3].isnan().all()
        assert out.isnan().sum() == 2 * 16


@pytest.mark.parametrize("shape", [(0, 5, 7, 16), (2, 0, 7, 16), (2, 5, 0, 16)], ids=["clip", "visible", "masked"])
def test_kernel_takes_nothing(shape, kernel_device):
    assert_kernel_matches_or_empty(*kernel_case(*shape, torch.float32, kernel_device))


def assert_kernel_matches_or_empty(leaves, positions, seen, hidden, dout):
    visible, token = (x.requires_grad_() for x in leaves)
    out = decoder_input(visible, token, positions, seen, hidden)
    dvisible, dtoken = torch.autograd.grad(out, (visible, token), dout)
    torch.testing.assert_close(out, decoder_input_ref(visible, token, positions, seen, hidden))
    assert torch.equal(dvisible, dout[:, : seen.shape[1]])
    torch.testing.assert_close(dtoken, dout[:, seen.shape[1] :].sum((0, 1)), atol=1e-5, rtol=1e-5)


def test_kernel_is_registered_as_torch_wants_it(bare_kernel_device):
    (visible, token), positions, seen, hidden, _ = kernel_case(2, 5, 7, 16, torch.float32, bare_kernel_device)
    torch.library.opcheck(forward_op, (visible.requires_grad_(), token.requires_grad_(), positions, seen, hidden))


def test_kernel_works_compiled(kernel_device):
    leaves, positions, seen, hidden, dout = kernel_case(2, 5, 7, 16, torch.float32, kernel_device)
    assert_works_compiled(
        lambda visible, token: decoder_input(visible, token, positions, seen, hidden), leaves, (dout,)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_works_captured(kernel_device):
    leaves, positions, seen, hidden, dout = kernel_case(2, 5, 7, 16, torch.bfloat16, kernel_device)
    assert_works_captured(
        lambda visible, token: decoder_input(visible, token, positions, seen, hidden), leaves, (dout,)
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mask_token": torch.zeros(4)}, "mask_token must be"),
        ({"positions": torch.zeros(18, 4)}, "positions must be"),
        ({"visible_index": torch.zeros(3, 2, dtype=torch.int64)}, "visible_index must be"),
        ({"masked_index": torch.zeros(2, 10, dtype=torch.int64)}, "one row per clip"),
        ({"visible": torch.zeros(3, 5, 8).mT}, "visible must be contiguous"),
        ({"positions": torch.zeros(18, 5, requires_grad=True)}, "positions are fixed"),
        ({"mask_token": torch.zeros(5, device="meta")}, "mask_token is on meta, visible on cpu"),
    ],
    ids=["mask token", "positions", "visible index", "masked index", "strides", "trained positions", "device"],
)
def test_refuses(change, says):
    visible, token, positions, mask = make()
    arguments = {
        "visible": visible,
        "mask_token": token,
        "positions": positions,
        "visible_index": mask.visible,
        "masked_index": mask.masked,
    } | change
    with pytest.raises(ValueError, match=says):
        decoder_input(**arguments)
