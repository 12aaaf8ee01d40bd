"""bias_gelu: values, both gradients, the polynomial's tails, registration, refusals."""

import pytest
import torch

from kernels import tiles
from kernels.bias_gelu import bias_gelu, bias_gelu_ref, forward_op
from tests.kernels.harness import assert_matches, assert_works_captured, assert_works_compiled, sweep

# smallest; odd; one past a tile both ways; ViT-S's hidden layer
SHAPES = [(1, 1), (3, 5, 47), (5, 1025), (2, 40, 1536)]


def make(shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    x, b, dy = torch.randn(*shape) * 3, torch.randn(shape[-1]), torch.randn(*shape)
    return [t.to(device, dtype) for t in (x, b, dy)]


def plain(x, b):
    return torch.nn.functional.gelu(x + b)


@pytest.mark.parametrize(("shape", "dtype"), sweep(SHAPES, half=[(3, 5, 47)]))
def test_matches_the_reference(shape, dtype, kernel_device):
    x, b, dy = make(shape, dtype, kernel_device)
    assert_matches(bias_gelu, bias_gelu_ref, plain, (x, b), (dy,))


def test_sums_the_bias_gradient_over_every_block_of_rows(kernel_device):
    x, b, dy = make((43, 70), torch.float32, kernel_device)
    with tiles.trying("bias_gelu.backward", {"ROWS": 4, "COLS": 32, "PROGRAMS": 3, "num_warps": 4}):
        assert_matches(bias_gelu, bias_gelu_ref, plain, (x, b), (dy,))


def test_is_exact_gelu_from_end_to_end(kernel_device):
    """Not the tanh approximation, which errs by 5e-4, and nothing strange far out."""
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -100.0, 100.0, 1e30]))).to(kernel_device)
    y = bias_gelu(x.requires_grad_(), torch.zeros_like(x))
    truth_x = x.detach().double().requires_grad_()
    truth = torch.nn.functional.gelu(truth_x)
    assert ((y - truth).abs() <= 3e-7 + 1e-7 * truth.abs()).all()
    ones = torch.ones_like(y)  # entry by entry: the derivative itself
    (slope,), (truth_slope,) = torch.autograd.grad(y, x, ones), torch.autograd.grad(truth, truth_x, ones.double())
    assert (slope - truth_slope).abs().max() <= 5e-7


def test_takes_parameters_of_another_dtype(kernel_device):
    x, b, dy = make((33, 48), torch.float16, kernel_device)
    x, b = x.requires_grad_(), b.float().requires_grad_()
    y = bias_gelu(x, b)
    dx, db = torch.autograd.grad(y, (x, b), dy)
    assert (y.dtype, dx.dtype, db.dtype) == (torch.float16, torch.float16, torch.float32)


def test_takes_nothing(kernel_device):
    x, b = torch.zeros(0, 48, device=kernel_device, requires_grad=True), torch.ones(48, device=kernel_device)
    b.requires_grad_()
    y = bias_gelu(x, b)
    dx, db = torch.autograd.grad(y, (x, b), torch.zeros_like(y))
    assert dx.shape == (0, 48)
    assert torch.equal(db, torch.zeros_like(b))


def test_is_registered_as_torch_wants_it(bare_kernel_device):
    x, b, _ = make((5, 48), device=bare_kernel_device)
    torch.library.opcheck(forward_op, (x.requires_grad_(), b.requires_grad_()))


def test_works_compiled(kernel_device):
    x, b, dy = make((33, 48), device=kernel_device)
    assert_works_compiled(bias_gelu, (x, b), (dy,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_works_captured(kernel_device):
    x, b, dy = make((33, 48), torch.bfloat16, kernel_device)
    assert_works_captured(bias_gelu, (x, b), (dy,))


@pytest.mark.parametrize(
    ("x", "b", "says"),
    [
        (torch.zeros(2, 8), torch.zeros(7), "x's last axis"),
        (torch.zeros(8, 2).t(), torch.zeros(8), "contiguous; got shape .2, 8. with strides"),
        (torch.tensor(1.0), torch.zeros(1), "D at least 1; got shape"),
        (torch.zeros(2, 0), torch.zeros(0), "D at least 1; got shape"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), "b is on meta, x on cpu"),
    ],
    ids=["bias length", "transposed x", "scalar", "no column", "device"],
)
def test_refuses(x, b, says):
    with pytest.raises(ValueError, match=says):
        bias_gelu(x, b)


def test_refuses_dtypes_the_kernel_does_not_take(kernel_device):
    x, b, _ = make((2, 8), torch.float64, kernel_device)
    with pytest.raises(ValueError, match="x must be bfloat16, float16 or float32 to run a kernel; got torch.float64"):
        bias_gelu(x, b)
