"""layer_norm: values, all five gradients, rounding, a constant row, registration, refusals."""

import pytest
import torch

from kernels import tiles
from kernels.layer_norm import forward_op, layer_norm, layer_norm_ref
from tests.kernels.harness import assert_matches, assert_works_captured, assert_works_compiled, sweep

# smallest with a variance; odd; one past a tile of rows and of columns; the widths of S's decoder, of S, B, L and H's
# encoders, and the widest
SHAPES = [(1, 2), (3, 5, 47), (5, 257), (9, 192), (6, 384), (5, 768), (5, 1024), (3, 1280), (2, 1536)]
EPS = 1e-6
RESIDUAL = {"residual": torch.zeros(2, 8)}


def make(shape, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    like = [torch.randn(*shape) for _ in range(4)]
    x, residual, dy, ds = (t.to(device, dtype) for t in like)
    # an offset, so that a variance computed as the difference of two means would show
    return x + 3, residual, *(torch.randn(shape[-1]).to(device, dtype) for _ in range(2)), dy, ds


def bias_for(x):
    return torch.randn(x.shape[-1]).to(x)


def with_residual(x, residual, w, b, x_bias=None):
    return layer_norm(x, residual, w, b, EPS, x_bias)


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
def test_matches_the_reference_with_a_residual_and_a_bias(shape, dtype, kernel_device):
    x, residual, w, b, dy, ds = make(shape, dtype, kernel_device)

    def plain(x, residual, w, b, x_bias):
        s = x + x_bias + residual
        return torch.nn.functional.layer_norm(s, s.shape[-1:], w, b, EPS), s

    def reference(x, residual, w, b, x_bias):
        s = x + x_bias + residual
        return layer_norm_ref(x + (s.to(dtype).double() - s).detach(), residual, w, b, EPS, x_bias)

    assert_matches(with_residual, reference, plain, (x, residual, w, b, bias_for(x)), (dy, ds))


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

    def plain(x, residual, w, b, x_bias):
        s = x + x_bias + residual
        return torch.nn.functional.layer_norm(s, (70,), w, b, EPS), s

    def reference(x, residual, w, b, x_bias):
        return layer_norm_ref(x, residual, w, b, EPS, x_bias)

    with tiles.trying("layer_norm.backward", {"ROWS": 4, "PROGRAMS": 3, "num_warps": 4}):
        assert_matches(with_residual, reference, plain, (x, residual, w, b, bias_for(x)), (dy, ds))


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.float32], ids=str)
def test_rounds_the_sum_once(bias_dtype, kernel_device):
    x, residual, w, b, _, _ = make((33, 48), torch.float16, kernel_device)
    x_bias = torch.randn(48).to(kernel_device, bias_dtype)
    wanted = (x.float() + x_bias.float() + residual.float()).half()
    assert torch.equal(layer_norm(x, residual, w, b, EPS, x_bias)[1], wanted)
    assert torch.equal(layer_norm_ref(x, residual, w, b, EPS, x_bias)[1], wanted)


def test_sums_the_bias_gradient_before_it_is_rounded(kernel_device):
    x, residual, w, b, dy, ds = make((203, 48), torch.float16, kernel_device)
    w, b, x_bias = (t.float().requires_grad_() for t in (w, b, bias_for(x)))
    y, s = layer_norm(x, residual, w, b, EPS, x_bias)
    (got,) = torch.autograd.grad((y, s), x_bias, (dy, ds))
    stored = s.detach().double().requires_grad_()
    normed = torch.nn.functional.layer_norm(stored, (48,), w.detach().double(), b.detach().double(), EPS)
    truth = (torch.autograd.grad(normed, stored, dy.double())[0] + ds.double()).sum(0)
    # a sum of 203 rounded to float16 would be off by about 1e-3
    torch.testing.assert_close(got.double(), truth, atol=2e-5, rtol=0)


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


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("used", [0, 1], ids=["norm", "sum"])
def test_differentiates_where_only_one_result_is_used(used, biased, kernel_device):
    x, residual, w, b, dy, _ = make((5, 48), device=kernel_device)
    leaves = [t.requires_grad_() for t in (x, residual, w, b, bias_for(x))][: 5 if biased else 4]

    def reference(x, residual, w, b, x_bias=None):
        return layer_norm_ref(x, residual, w, b, EPS, x_bias)

    got = torch.autograd.grad(with_residual(*leaves)[used], leaves, dy, allow_unused=True)
    wanted = torch.autograd.grad(reference(*leaves)[used], leaves, dy, allow_unused=True)
    for g, t in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, t, atol=1e-5, rtol=1e-5)


def test_takes_float32_parameters_beside_half_activations(kernel_device):
    x, residual, w, b, dy, ds = make((33, 48), torch.float16, kernel_device)
    leaves = [t.requires_grad_() for t in (x, residual, w.float(), b.float(), bias_for(x).float())]
    outputs = with_residual(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, (dy, ds))
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    assert torch.equal(gradients[0], gradients[1])


def test_takes_nothing(kernel_device):
    x = torch.ones(0, 48, device=kernel_device, requires_grad=True)
    parameters = [torch.ones(48, device=kernel_device, requires_grad=True) for _ in range(3)]
    y, s = with_residual(x, x, *parameters)
    dx, *sums = torch.autograd.grad((y, s), (x, *parameters), (torch.zeros_like(y), torch.zeros_like(s)))
    assert y.shape == s.shape == dx.shape == (0, 48)
    assert all(torch.equal(total, torch.zeros(48, device=kernel_device)) for total in sums)


@pytest.mark.parametrize(("residual", "biased"), [(True, True), (True, False), (False, False)])
def test_is_registered_as_torch_wants_it(residual, biased, bare_kernel_device):
    x, r, w, b, _, _ = make((5, 48), device=bare_kernel_device)
    x, r, w, b, x_bias = (t.requires_grad_() for t in (x, r, w, b, bias_for(x)))
    torch.library.opcheck(forward_op, (x, r if residual else None, w, b, EPS, x_bias if biased else None))


def test_works_compiled(kernel_device):
    x, residual, w, b, dy, ds = make((33, 48), device=kernel_device)
    assert_works_compiled(with_residual, (x, residual, w, b), (dy, ds))
    assert_works_compiled(with_residual, (x, residual, w, b, bias_for(x)), (dy, ds))
    assert_works_compiled(without, (x, w, b), (dy,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_works_captured(kernel_device):
    x, residual, w, b, dy, ds = make((33, 48), torch.bfloat16, kernel_device)
    assert_works_captured(with_residual, (x, residual, w, b, bias_for(x)), (dy, ds))


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
        ({"x_bias": torch.zeros(8)}, "x_bias is added together with a residual; got none"),
        (RESIDUAL | {"x_bias": torch.zeros(7)}, "x_bias must be .8,., x's last axis; got .7,."),
        (RESIDUAL | {"x_bias": torch.zeros(1)}, "x_bias must be .8,., x's last axis; got .1,."),
        (RESIDUAL | {"x_bias": torch.zeros(16)[::2]}, "x_bias must be contiguous"),
        (RESIDUAL | {"x_bias": torch.zeros(8, device="meta")}, "x_bias is on meta, x on cpu"),
    ],
    ids=[
        *("weight", "bias", "residual shape", "residual dtype", "x strides", "residual strides", "device"),
        *("x_bias alone", "x_bias wide", "x_bias narrow", "x_bias strides", "x_bias device"),
    ],
)
def test_refuses(change, says):
    arguments = {"x": torch.zeros(2, 8), "residual": None, "weight": torch.ones(8), "bias": torch.zeros(8)} | change
    with pytest.raises(ValueError, match=says):
        layer_norm(**arguments)


def test_refuses_what_no_kernel_takes(kernel_device):
    x = torch.zeros(2, 8, device=kernel_device)
    with pytest.raises(ValueError, match="x_bias must be bfloat16, float16 or float32 to run a kernel; got .*float64"):
        layer_norm(x, x, x[0], x[1], EPS, x[0].double())


def test_sums_keep_float32_whatever_the_weight_is(kernel_device):
    x = torch.zeros(2, 550, 4, device=kernel_device).half()
    residual = torch.randn(2, 550, 4, device=kernel_device).half()
    w = torch.ones(4, device=kernel_device).half().requires_grad_()
    b, x_bias = (torch.zeros(4, device=kernel_device).requires_grad_() for _ in range(2))
    y, _ = layer_norm(x, residual, w, b, EPS, x_bias)
    (db,) = torch.autograd.grad(y, b, torch.full_like(y, 64.0))
    assert (db == 64 * 1100).all()  # beyond float16's range
