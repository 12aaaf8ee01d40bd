"""launch: how float32 multiplies, by whichever of torch's settings."""

import pytest
import torch

from kernels.launch import channel_values, dot_precision

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def restored():
    before = MATMUL.fp32_precision
    yield
    MATMUL.fp32_precision = before


def test_float32_is_exact_unless_torch_is_told_otherwise():
    assert dot_precision(torch.float32) == "ieee"
    MATMUL.fp32_precision = "tf32"
    assert dot_precision(torch.float32) == "tf32"
    assert dot_precision(torch.bfloat16) == "ieee"
    MATMUL.fp32_precision = "ieee"
    assert dot_precision(torch.float32) == "ieee"


def test_the_older_setting_counts_as_well():
    torch.set_float32_matmul_precision("high")
    try:
        assert dot_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert dot_precision(torch.float32) == "ieee"


def test_values_first_made_in_inference_mode_can_be_saved_for_a_backward_pass():
    channel_values.cache_clear()
    with torch.inference_mode():
        channel_values((1.0, 2.0), 1, torch.float32, torch.device("cpu"))
    x, upstream = torch.randn(2, requires_grad=True), torch.randn(2)
    values = channel_values((1.0, 2.0), 1, torch.float32, torch.device("cpu"))
    (x * values).backward(upstream)
    assert torch.equal(x.grad, upstream * torch.tensor([1.0, 2.0]))
