"""How every kernel is tested: values and every gradient against the float64 reference, as good as PyTorch, twice the
same, registered properly, compiled and captured."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

from tests.tolerance import assert_as_good_as_torch

Op = Callable[..., Tensor | tuple[Tensor, ...]]
# the interpreter's bfloat16 is of no use: its stores truncate
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def sweep(names: Iterable[str], *, half: Sequence[str] = (), long: Sequence[str] = ()) -> list:
    """Parameters (name, dtype). The quick tier takes float32, and half precision for those in half; the rest, and all
    of long, which are slow in the interpreter, wait for the long tier."""
    cases = []
    for name in names:
        for dtype in DTYPES:
            late = name in long or (dtype != torch.float32 and name not in half)
            cases.append(pytest.param(name, dtype, marks=[pytest.mark.long] if late else [], id=f"{name}-{dtype}"))
    return cases


def values_and_gradients(op: Op, inputs: Sequence[Tensor], upstreams: Sequence[Tensor]) -> list[Tensor]:
    """What op gives, then the gradient of each input."""
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ups = [u.to(o) for u, o in zip(upstreams, outputs, strict=True)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, ups)]


def assert_matches(op: Op, reference: Op, plain: Op, inputs: Sequence[Tensor], upstreams: Sequence[Tensor]) -> None:
    """op may err at most twice as far as plain (PyTorch at the same dtype) from reference (in float64), in every value
    and every gradient; a second run gives the same bits."""
    fresh = [x.detach().requires_grad_() for x in inputs]
    got = values_and_gradients(op, fresh, upstreams)
    again = values_and_gradients(op, fresh, upstreams)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = values_and_gradients(reference, wide, [u.double() for u in upstreams])
    same = values_and_gradients(plain, [x.detach().requires_grad_() for x in inputs], upstreams)
    for g, a, t, s in zip(got, again, truth, same, strict=True):
        assert torch.equal(g, a)
        assert_as_good_as_torch(g, t, s)


def assert_works_compiled(op: Op, inputs: Sequence[Tensor], upstreams: Sequence[Tensor]) -> None:
    """The same under torch.compile without a graph break, forward and backward."""
    backend = "inductor" if inputs[0].is_cuda else "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    eager = values_and_gradients(op, [x.detach().requires_grad_() for x in inputs], upstreams)
    again = values_and_gradients(compiled, [x.detach().requires_grad_() for x in inputs], upstreams)
    for e, c in zip(eager, again, strict=True):
        # the op gives the same bits; Inductor may round what stands around it differently
        torch.testing.assert_close(c, e, rtol=1e-5, atol=1e-6 * e.abs().max().item())


def assert_works_captured(op: Op, inputs: Sequence[Tensor], upstreams: Sequence[Tensor]) -> None:
    """The same bits from a replayed CUDA graph of forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    eager = values_and_gradients(op, leaves, upstreams)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values_and_gradients(op, leaves, upstreams)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    for e, c in zip(eager, captured, strict=True):
        assert torch.equal(e, c)
