"""layer_norm: values, all four gradients, a constant row, registration, refusals."""

import pytest
import torch

from kernels import tiles
from kernels.layer_norm import forward_op, layer_norm, layer_norm_ref
from tests.kernels.harness import assert_matches, assert_works_captured, assert_works_compiled, sweep

# smallest with a variance; odd; one past a tile of rows and of columns; the widths of S's decoder, of S, B, L and H's
# encoders, and the widest
SHAPES = [(1, 2), (3, 5, 47), (5, 257), (9, 192), (6, 384), (5, 768), (5, 1024), (3, 1280), (2, 1536)]
EPS = 1e-6


def make(shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    like = [torch.randn(*shape) for _ in range(4)]
    x, residual, dy, ds = (t.to(device, dtype) for t in like)
    # an offset, so that a variance computed as the difference of two means would show
    return x + 3, residual, *(torch.randn(shape[-1]).to(device, dtype) for _ in range(2)), dy, ds


def with_residual(x, residual, w, b):
    return layer_norm(x, residual, w, b, EPS)


def without(x, w, b):
    return layer_norm(x, None, w, b, EPS)[0]


@pytest.mark.parametrize(("shape", "dtype"), sweep(SHAPES, half=[(3, 5, 47)]))
def test_matches_the_reference_with_a_residual(shape, dtype, kernel_device):
    x, residual, w, b, dy, ds = make(shape, dtype, kernel_device)

    def plain(x, residual, w, b):
        s = x + residual
        return torch.nn.functional.layer_norm(s, s.shape[-1:], w, b, EPS), s

    # the reference in float64, of the sum as it is stored
    def reference(x, residual, w, b):
        rounded = (x + residual).to(dtype).double() - (x + residual)
        return layer_norm_ref(x + rounded.detach(), residual, w, b, EPS)

    assert_matches(with_residual, reference, plain, (x, residual, w, b), (dy, ds))


@pytest.mark.parametrize(("shape", "dtype"), sweep(SHAPES, half=[(3, 5, 47)]))
def test_matches_the_reference_without_one(shape, dtype, kernel_device):
    x, _, w, b, dy, _ = make(shape, dtype, kernel_device)

    def plain(x, w, b):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, EPS)

    def reference(x, w, b):
        return layer_norm_ref(x, None, w, b, EPS)[0]

    assert_matches(without, reference, plain, (x, w, b), (dy,))


def test_sums_the_parameters_gradients_over_every_block_of_rows(kernel_device):
    x, residual, w, b, dy, ds = make((43, 70), torch.float32, kernel_device)

    def plain(x, residual, w, b):
        return torch.nn.functional.layer_norm(x + residual, (70,), w, b, EPS), x + residual

    def reference(x, residual, w, b):
        return layer_norm_ref(x, residual, w, b, EPS)

    with tiles.trying("layer_norm.backward", {"ROWS": 4, "PROGRAMS": 3, "num_warps": 4}):
        assert_matches(with_residual, reference, plain, (x, residual, w, b), (dy, ds))


def test_gives_x_itself_as_the_sum_without_a_residual(kernel_device):
    x, _, w, b, _, _ = make((3, 48), device=kernel_device)
    assert layer_norm(x, None, w, b)[1] is x


def test_gives_the_bias_for_a_constant_row(kernel_device):
    x, w, b = torch.full((3, 700), 0.1), torch.randn(700), torch.randn(700)
    y, _ = layer_norm(x.to(kernel_device), None, w.to(kernel_device), b.to(kernel_device), EPS)
    # 700 times 0.1 adds up to 0.1 within rounding; over sqrt(eps) that is 1e-5
    torch.testing.assert_close(y.cpu(), b.expand(3, 700), atol=1e-4, rtol=0)


def test_gives_exactly_the_bias_where_the_sum_is_exact(kernel_device):
    x = torch.full((2, 700), 5.0, device=kernel_device)
    w, b = (torch.randn(700, device=kernel_device) for _ in range(2))
    assert torch.equal(layer_norm(x, None, w, b, EPS)[0], b.expand(2, 700))


@pytest.mark.parametrize("used", [0, 1], ids=["norm", "sum"])
def test_differentiates_where_only_one_result_is_used(used, kernel_device):
    x, residual, w, b, dy, _ = make((5, 48), device=kernel_device)
    leaves = [t.requires_grad_() for t in (x, residual, w, b)]
    got = torch.autograd.grad(layer_norm(*leaves)[used], leaves, dy, allow_unused=True)
    wanted = torch.autograd.grad(layer_norm_ref(*leaves, EPS)[used], leaves, dy, allow_unused=True)
    for g, t in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, t, atol=1e-5, rtol=1e-5)


def test_takes_float32_parameters_beside_half_activations(kernel_device):
    x, residual, w, b, dy, ds = make((33, 48), torch.float16, kernel_device)
    leaves = [t.requires_grad_() for t in (x, residual, w.float(), b.float())]
    outputs = layer_norm(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, (dy, ds))
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    assert torch.equal(gradients[0], gradients[1])


def test_takes_nothing(kernel_device):
    x, w, b = (torch.ones(*s, device=kernel_device, requires_grad=True) for s in ((0, 48), (48,), (48,)))
    y, s = layer_norm(x, x, w, b)
    dx, dw, db = torch.autograd.grad((y, s), (x, w, b), (torch.zeros_like(y), torch.zeros_like(s)))
    assert y.shape == s.shape == dx.shape == (0, 48)
    assert torch.equal(dw, torch.zeros_like(w))
    assert torch.equal(db, torch.zeros_like(b))


@pytest.mark.parametrize("residual", [True, False])
def test_is_registered_as_torch_wants_it(residual, bare_kernel_device):
    x, r, w, b, _, _ = make((5, 48), device=bare_kernel_device)
    arguments = (
        x.requires_grad_(),
        r.requires_grad_() if residual else None,
        w.requires_grad_(),
        b.requires_grad_(),
        EPS,
    )
    torch.library.opcheck(forward_op, arguments)


def test_works_compiled(kernel_device):
    x, residual, w, b, dy, ds = make((33, 48), device=kernel_device)
    assert_works_compiled(with_residual, (x, residual, w, b), (dy, ds))
    assert_works_compiled(without, (x, w, b), (dy,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_works_captured(kernel_device):
    x, residual, w, b, dy, ds = make((33, 48), torch.bfloat16, kernel_device)
    assert_works_captured(with_residual, (x, residual, w, b), (dy, ds))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": torch.zeros(7)}, "weight must be"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"residual": torch.zeros(3, 8)}, "residual must be torch.float32 .2, 8., as x; got torch.float32 .3, 8."),
        ({"residual": torch.zeros(2, 8, dtype=torch.float16)}, "got torch.float16"),
        ({"x": torch.zeros(8, 2).t()}, "x must be contiguous"),
        ({"residual": torch.zeros(8, 2).t()}, "residual must be contiguous"),
        ({"bias": torch.zeros(8, device="meta")}, "bias is on meta, x on cpu"),
    ],
    ids=["weight", "bias", "residual shape", "residual dtype", "x strides", "residual strides", "device"],
)
def test_refuses(change, says):
    arguments = {"x": torch.zeros(2, 8), "residual": None, "weight": torch.ones(8), "bias": torch.zeros(8)} | change
    with pytest.raises(ValueError, match=says):
        layer_norm(**arguments)
