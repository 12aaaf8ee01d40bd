"""split_heads: views out, joined gradients and the bias' sums back, whatever the strides of what comes in."""

import pytest
import torch

from kernels import tiles
from kernels.split_heads import join_heads_ref, join_op, split_heads
from tests.kernels.harness import assert_matches, assert_works_captured, assert_works_compiled, sweep

# clips, tokens, heads, head width: smallest; odd; a head width that is no power of two; past a tile of rows
SHAPES = [(1, 1, 1, 2), (3, 5, 3, 7), (2, 9, 2, 80), (2, 21, 4, 16)]
NAMES = {"x".join(map(str, shape)): shape for shape in SHAPES}


def make(shape, last=None, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    clips, tokens, heads, width = shape
    qkv = torch.randn(clips, tokens, 3, heads, width)
    bias = torch.randn(3 * heads * width)
    upstreams = [torch.randn(clips, n, heads, width) for n in (last or tokens, tokens, tokens)]
    return [x.to(device, dtype) for x in (qkv, bias, *upstreams)]


def added(last=None):
    """As the model uses it: the bias is added detached, and gets its gradient from the op."""

    def op(qkv, bias):
        return tuple(x.clone() for x in split_heads(qkv + bias.detach().view(qkv.shape[2:]), bias, last))

    return op


def plain(last=None):
    def op(qkv, bias):
        q, k, v = (qkv + bias.view(qkv.shape[2:])).unbind(2)
        return (q if last is None else q[:, -last:]).clone(), k.clone(), v.clone()

    return op


@pytest.mark.parametrize(("name", "dtype"), sweep(NAMES, half=["3x5x3x7"]))
def test_matches_autograd_in_float64(name, dtype, kernel_device):
    qkv, bias, *ups = make(NAMES[name], dtype=dtype, device=kernel_device)
    assert_matches(added(), plain(), plain(), (qkv, bias), ups)


@pytest.mark.parametrize("last", [1, 4, 5])
def test_gives_no_gradient_to_queries_that_do_not_ask(last, kernel_device):
    qkv, bias, *ups = make((3, 5, 3, 7), last, device=kernel_device)
    assert_matches(added(last), plain(last), plain(last), (qkv, bias), ups)


def test_adds_up_over_every_block_of_rows(kernel_device):
    qkv, bias, *ups = make((5, 9, 2, 16), device=kernel_device)
    with tiles.trying("split_heads.backward", {"ROWS": 4, "PROGRAMS": 3, "num_warps": 4}):
        assert_matches(added(), plain(), plain(), (qkv, bias), ups)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)], ids=str)
def test_joins_gradients_of_any_strides(order, kernel_device):
    """As attention's backward passes lay them out; all three otherwise."""
    _, _, *ups = make((2, 9, 4, 16), 3, device=kernel_device)
    back = [order.index(i) for i in range(4)]
    strided = [x.permute(order).contiguous().permute(back) for x in ups]
    assert all(x.stride() != y.stride() for x, y in zip(strided, ups, strict=True)) or order == (0, 1, 2, 3)
    mixed = [strided[0], ups[1], strided[2]]
    wanted, sums = join_heads_ref(*ups)
    for parts in (strided, mixed):
        got, got_sums = join_op(*parts)
        assert torch.equal(got, wanted)
        torch.testing.assert_close(got_sums, sums, rtol=1e-5, atol=1e-5)


def test_takes_a_gradient_whose_heads_are_no_rows_in_memory():
    qkv, bias, *ups = make((2, 3, 2, 4))
    leaves = [qkv.requires_grad_(), bias.requires_grad_()]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in ups]
    assert turned[0].stride(3) != 1
    for got, wanted in zip(*(torch.autograd.grad(split_heads(*leaves), leaves, u) for u in (turned, ups)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_gives_views():
    qkv, bias, *_ = make((2, 5, 2, 4))
    q, k, v = split_heads(qkv, bias, last=2)
    assert {x.untyped_storage().data_ptr() for x in (q, k, v)} == {qkv.untyped_storage().data_ptr()}
    assert torch.equal(q, qkv[:, 3:, 0])
    assert torch.equal(v, qkv[:, :, 2])


@pytest.mark.long
def test_sums_half_gradients_in_float32(kernel_device):
    ones = torch.ones(3, 700, 1, 16, dtype=torch.float16, device=kernel_device)
    _, sums = join_op(ones, ones, ones)
    assert sums.dtype == torch.float32
    assert (sums == 2100).all()  # in float16, 2048 + 1 is 2048


@pytest.mark.parametrize("last", [None, 2])
def test_works_compiled(last, kernel_device):
    qkv, bias, *ups = make((2, 5, 2, 16), last, device=kernel_device)
    assert_works_compiled(added(last), (qkv, bias), ups)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_works_captured():
    qkv, bias, *ups = make((2, 160, 12, 64), dtype=torch.bfloat16, device="cuda")
    assert_works_captured(added(), (qkv, bias), ups)


def test_is_registered_properly(bare_kernel_device):
    _, _, *ups = make((2, 5, 2, 16), 3, device=bare_kernel_device)
    torch.library.opcheck(join_op, tuple(ups))
    torch.library.opcheck(join_op, tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in ups))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda qkv, bias: (qkv[:, :, :2], bias), r"qkv must be \[B, L, 3, A, d\]; got shape \(2, 5, 2, 2, 4\)"),
        (lambda qkv, bias: (qkv, bias[1:]), r"bias must be \(24,\); got \(23,\)"),
        (lambda qkv, bias: (qkv.transpose(0, 1), bias), "qkv must be contiguous"),
        (lambda qkv, bias: (qkv, bias, 6), r"last must be 1 to \(5,\) tokens; got 6"),
        (lambda qkv, bias: (qkv, bias, 0), r"last must be 1 to \(5,\) tokens; got 0"),
    ],
    ids=["shape", "bias", "strides", "too many", "none"],
)
def test_refuses(change, says):
    qkv, bias, *_ = make((2, 5, 2, 4))
    with pytest.raises(ValueError, match=says):
        split_heads(*change(qkv, bias))
