"""decoder_input: every token at its place with its own position, and the gradients' way back."""

import pytest
import torch

from kernels import decoder_input
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mask_token": torch.zeros(4)}, "mask_token must be"),
        ({"positions": torch.zeros(18, 4)}, "positions must be"),
        ({"visible_index": torch.zeros(3, 2, dtype=torch.int64)}, "visible_index must be"),
        ({"masked_index": torch.zeros(2, 10, dtype=torch.int64)}, "one row per clip"),
    ],
    ids=["mask token", "positions", "visible index", "masked index"],
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
