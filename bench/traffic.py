"""What a training step moves, computes and keeps: bytes, operations, kernel starts and memory of every op, counted on
fake tensors, which have shapes and no data. No GPU is needed; a step of ViT-L takes seconds.

Rules, the same for every side:
- Views and allocations count nothing. Any other op is one kernel start, reads each tensor it is given once (of a view
  its elements, of an expanded dimension one) and writes its outputs once; in place, it reads and writes. Caches help
  nobody between two ops. An op that fills ignores what was there.
- A gather reads what it gives, and the index; a scatter likewise, and what was there where it adds. A boolean index is
  a `nonzero` that writes int64 indices, then the gather; its backward the same again.
- scaled_dot_product_attention is one op that stores the logarithms of its sums, and computes the weights again in
  backward: two matrix products forward, five backward.
- fused AdamW reads weights, gradients and both moments, and writes all but the gradients (these too where it unscales
  them). An op over a list of tensors is one start.
- Our own ops count by the Triton kernels they start, which their bodies tell without starting them: what each reads
  and writes is in `_TOUCHES`, of a clip only the pixels of the cubes that it is given; with the partial sums and small
  ops around them. An op or kernel without a rule is an error. `pixel_loss_rescale` counts for an upstream of 1, which
  is what `loss.backward()` gives: it then leaves the gradient alone.
- Operations are those of matrix products, 2 for a multiply-add, by torch.utils.flop_counter.
- What PyTorch makes of several kernels (mse_loss, slice_backward, a norm over a list) is one start and is read once.
- Peak memory is the largest sum of living storages; weights, optimiser state and batch are in it, and also stated as
  resting. Workspaces of libraries and an allocator's rounding are not. Where two gradients of one tensor meet, PyTorch
  may add in place; here the sum is a tensor of its own.

CUDA's autocast is emulated (`CudaAutocast`), since fake CUDA tensors need a CUDA build and the CPU's autocast has other
lists of ops.
"""

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakTensorKeyDictionary

from bench.compare import Work
from bench.steps import Parts, Step
from kernels import launch
from kernels.launch import Launch, channel_values, check, recording

aten = torch.ops.aten

# allocations and questions
_FREE = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.empty_permuted}
_FREE |= {aten._unsafe_view, aten.is_same_size, aten.resize_}
_FREE_NAMESPACES = ("prim", "profiler")
# ops that do not read the tensor they write over, or are to be like
_BLIND = {aten.zero_, aten.fill_, aten.copy_, aten.uniform_, aten.normal_, aten.random_, aten._foreach_zero_}
_BLIND |= {aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full}
_GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding}
_PUTS = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
_ATTENTION, _ATTENTION_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
_PLAIN_NAMES = {_ATTENTION: "scaled_dot_product_attention"}
_PLAIN_NAMES[_ATTENTION_BACKWARD] = "scaled_dot_product_attention_backward"

# kernel -> the tensors it reads, those it writes, those it leaves alone; of frames, the cubes that its index names
_TOUCHES = {
    "attention._forward_kernel": ("qkv", "out lse"),
    "attention._whole_backward_kernel": ("qkv out dout lse", "dqkv"),
    "attention._blocked_backward_kernel": ("qkv out dout lse", "dqkv"),
    "bias_gelu._forward_kernel": ("x b", "y"),
    "bias_gelu._backward_kernel": ("dy x b", "dx db_part"),
    "cube_embed._fold_kernel": ("weight bias values", "folded offset"),
    "cube_embed._forward_kernel": ("frames index folded offset positions", "out"),
    "cube_embed._backward_kernel": ("frames index dy", "part bias_part"),
    "cube_embed._unfold_kernel": ("part bias_part values", "dweight dbias"),
    "decoder_input._forward_kernel": ("visible mask_token positions visible_index masked_index", "out"),
    "decoder_input._backward_kernel": ("dout", "dvisible part"),
    "layer_norm._forward_kernel": ("x residual weight bias x_bias", "s y means rstds"),
    "layer_norm._backward_kernel": ("dy ds s weight means rstds", "dx dw db dx_bias"),
    "pixel_loss._loss_kernel": ("frames masked pred factor scale values", "grad part"),
    "pixel_loss._rescale_kernel": ("upstream", "", "grad"),
    "split_heads._join_kernel": ("dq dk dv", "dqkv part"),
}


@dataclass(frozen=True)
class Call:
    """One op, or several kernels of one of ours. rate: which ceiling its operations run against."""

    name: str
    part: str
    backward: bool
    work: Work
    launches: int
    rate: str  # matmul, attention or memory

    @property
    def bytes(self) -> int:
        return self.work.reads + self.work.writes


@dataclass(frozen=True)
class Total:
    """A sum of calls."""

    bytes: int = 0
    flops: int = 0
    launches: int = 0


@dataclass(frozen=True)
class Traffic:
    """One step."""

    calls: tuple[Call, ...]
    peak_bytes: int
    resting_bytes: int

    @property
    def total(self) -> Total:
        return _total(self.calls)

    def by(self, key: Callable[[Call], Any]) -> dict[Any, Total]:
        """Totals of the calls that share a key, most bytes first."""
        groups = defaultdict(list)
        for call in self.calls:
            groups[key(call)].append(call)
        totals = {name: _total(calls) for name, calls in groups.items()}
        return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))


def _total(calls: Iterable[Call]) -> Total:
    calls = list(calls)
    return Total(sum(c.bytes for c in calls), sum(c.work.flops for c in calls), sum(c.launches for c in calls))


def count(build: Callable[[], Step], *, with_kernels: bool = True) -> Traffic:
    """The traffic of one step on fake tensors, the second: the first makes the optimiser's state.

    build makes the step, on the CPU. The batch's arrival counts as one write of it, in the part `batch`.
    with_kernels: whether our ops start their kernels, as on a GPU, or run their references.
    """
    with fakes(with_kernels), Counter() as counter:
        step = build()
        with CudaAutocast():
            return measured(step, counter)


def measured(step: Step, counter: "Counter") -> Traffic:
    """The traffic of the step's second run, of fake tensors or real ones, under a counter that is switched on."""
    with ExitStack() as hooks:
        for module, inside, after in step.parts:
            hooks.enter_context(counter.parts.during(module, inside, after))
        if step.hidden is not None:
            counter.know(step.hidden, step.num_hidden)
        step.run()
        gc.collect()
        counter.begin(step.batch)
        resting = counter.live
        step.run()
    return Traffic(tuple(counter.calls), counter.peak, resting)


@contextmanager
def fakes(with_kernels: bool = True) -> Iterator[None]:
    """Inside, tensors are fake; our ops take the way to their kernels, and lists of fake tensors that of real ones."""
    types = _foreach_utils._foreach_supported_types
    channel_values.cache_clear()  # it keeps tensors: fake ones must not get out, nor real ones in
    try:
        with (
            FakeTensorMode(),
            patch.object(launch, "_interpret", with_kernels),
            patch.object(torch.nn.init, "trunc_normal_", lambda x, *_, **__: x),  # it looks at what it draws
            patch.object(_foreach_utils, "_foreach_supported_types", [*types, FakeTensor, torch.nn.Parameter]),
        ):
            yield
    finally:
        channel_values.cache_clear()


def size_of(x: Tensor) -> int:
    """Bytes of the elements that a view has, those of an expanded dimension once."""
    return prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size) * x.itemsize


def _sizes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all, the same view once."""
    views = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in tensors}
    return sum(map(size_of, views.values()))


def _tensors(*trees: Any) -> list[Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, Tensor)]


def works_of(func: Any, args: tuple, kwargs: dict, out: Any) -> list[tuple[str, Work]]:
    """The work of an op of PyTorch by the rules above: its name and work; two of them where it begins with a nonzero,
    none for a view."""
    packet = func.overloadpacket
    name = _PLAIN_NAMES.get(packet, packet.__name__)
    if func.namespace in _FREE_NAMESPACES or packet in _FREE or func.is_view:
        return []
    if packet in _GATHERS:
        moved = size_of(out)
        before, index = _indices(args[1:], len(out) if name == "index" else 0)
        return [*before, (name, Work(moved + index, moved))]
    if packet in _PUTS:
        moved = size_of(args[2])
        before, index = _indices(args[1], len(args[2]) if args[2].ndim else 0)
        adds = len(args) > 3 and args[3] or kwargs.get("accumulate", False)
        return [*before, (name, Work(moved * (2 if adds else 1) + index, moved))]
    if packet is aten.scatter_:
        moved = args[2].numel() * args[0].itemsize
        return [(name, Work(_sizes(_tensors(args[2:], kwargs)), moved))]
    written = _mutated(func, args, kwargs)
    if packet is aten._fused_adamw_ and kwargs.get("grad_scale") is None:
        written = [x for x in written if all(x is not g for g in args[1])]
    blind = {id(x) for x in written} if written else {id(args[0])} if args else set()
    reads = [x for x in _tensors(args, kwargs) if packet not in _BLIND or id(x) not in blind]
    returns = func._schema.returns
    results = out if len(returns) > 1 else (out,)
    made = _tensors([x for x, kind in zip(results, returns, strict=True) if kind.alias_info is None]) if returns else []
    return [(name, Work(_sizes(reads), _sizes(written) + _sizes(made), _flops(packet, args, kwargs, out)))]


def _indices(indices: Any, count: int) -> tuple[list[tuple[str, Work]], int]:
    """A nonzero for a boolean index that names count places, and the bytes of the index that is then read."""
    tensors = _tensors(indices)
    if not tensors or tensors[0].dtype != torch.bool:
        return [], _sizes(tensors)
    places = count * tensors[0].ndim * 8
    return [("nonzero", Work(size_of(tensors[0]), places))], places


def _mutated(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _flops(packet: Any, args: tuple, kwargs: dict, out: Any) -> int:
    if packet is _ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if packet is _ATTENTION_BACKWARD:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _rate_of(name: str, flops: int) -> str:
    if "scaled_dot_product" in name or name.startswith("videomae::attention"):
        return "attention"
    return "matmul" if flops else "memory"


def kernel_work(one: Launch) -> Work:
    """What a kernel of ours reads, writes and computes in one start; ValueError without a rule for it."""
    name = f"{one.kernel.fn.__module__.rpartition('.')[2]}.{one.kernel.fn.__name__}"
    given = dict(zip(one.kernel.arg_names, one.arguments, strict=False)) | one.options
    touched = [arguments.split() for arguments in _TOUCHES.get(name, ())]
    unknown = {a for a, x in given.items() if isinstance(x, Tensor)} - {a for some in touched for a in some}
    check(not unknown, f"no rule for what kernel {name} does with {sorted(unknown)}: see _TOUCHES in bench/traffic.py")
    reads, writes = (sum(_moved(given, a) for a in some) for some in touched[:2])
    return Work(reads, writes, _kernel_flops(name, given))


def _moved(given: dict[str, Any], name: str) -> int:
    """Bytes of a kernel's argument that it moves."""
    x, index = given[name], given["masked"] if "masked" in given else given.get("index")
    if name == "frames" and index is not None:
        return index.numel() * given["DT"] * given["DY"] * given["DX"] * given["C"] * x.itemsize
    return 0 if x is None else size_of(x)


def _kernel_flops(name: str, given: dict[str, Any]) -> int:
    if name == "cube_embed._forward_kernel":
        return 2 * given["out"].numel() * given["folded"].shape[1]
    if name == "cube_embed._backward_kernel":
        return 2 * given["dy"].numel() * given["part"].shape[2]
    if name.startswith("attention."):
        B, V, _, A, d = given["qkv"].shape
        return (4 if "forward" in name else 10) * B * A * V * V * d
    return 0


class Counter(TorchDispatchMode):
    """Counts every op that is run inside, on fake tensors or real ones, and the storages that live."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.parts = Parts()
        self.live = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._num_true = WeakTensorKeyDictionary()
        self._building = True
        self._own: str | None = None  # the op of ours whose body is looked into

    def know(self, mask: Tensor, num_true: int) -> None:
        """How many elements of a boolean mask are True, which a fake one cannot tell: the length of what it indexes."""
        self._num_true[mask] = num_true

    def begin(self, batch: tuple[Tensor, ...]) -> None:
        """Forget what was counted; the batch arrives."""
        self._building = False
        self.calls, self.peak = [], self.live
        self.parts.restart()
        self._add("batch", Work(0, _sizes(batch)), len(batch))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in _FREE_NAMESPACES:
            self.parts.see(func, args)
            return func(*args, **kwargs)
        if self._own is None:
            self._see(args, kwargs)
        if func.namespace == "videomae":
            return self._ours(func, args, kwargs)
        with self:  # inside an op of ours autograd has not taken composite ones apart
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = self._run(func, args, kwargs)
        self._see(out)
        for name, work in works_of(func, args, kwargs, out):
            self._add(name, work)
        return out

    def _run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func is aten._local_scalar_dense.default and self._building and isinstance(args[0], FakeTensor):
            return True  # a check of settings that are tensors, such as the learning rate
        if func is aten.bitwise_not.default and args[0] in self._num_true:
            out = func(*args, **kwargs)
            self.know(out, args[0].numel() - self._num_true[args[0]])
            return out
        mask = args[1][0] if func is aten.index.Tensor else None
        if isinstance(mask, FakeTensor) and mask.dtype == torch.bool:
            return args[0].new_empty(self._num_true[mask], *args[0].shape[mask.ndim :])
        if func is aten.index_put.default and torch._C._current_autograd_node() is not None:
            # a gather's backward: into its zeros, were there no mode like this one
            return args[0] if isinstance(args[0], FakeTensor) else aten.index_put_(*args, **kwargs)
        return func(*args, **kwargs)

    def _ours(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An op of ours: its body is run on shapes alone, its kernels are listed and not started."""
        fake = any(isinstance(x, FakeTensor) for x in _tensors(args))
        shapes = args if fake else tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), args)
        self._own = func.overloadpacket._qualified_op_name
        check(self._own in OPDEFS, f"no rule for {self._own}: it is no custom_op whose kernels could be listed")
        try:
            with recording() as launches, self:
                out = OPDEFS[self._own]._init_fn(*shapes, **kwargs)
            if launches:
                self._add(self._own, sum(map(kernel_work, launches), Work(0, 0)), len(launches))
            launches.clear()  # they hold what lived only inside
        finally:
            self._own = None
        if not fake:
            out = func(*args, **kwargs)
        self._see(out)
        return out

    def _add(self, name: str, work: Work, launches: int = 1) -> None:
        name = self._own or name
        part, backward = self.parts.now()
        self.calls.append(Call(name, part, backward, work, launches, _rate_of(name, work.flops)))

    def _see(self, *trees: Any) -> None:
        for x in _tensors(*trees):
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                num_bytes = storage.nbytes()
                self._alive[key] = weakref.ref(storage, lambda _, key=key, size=num_bytes: self._free(key, size))
                self.live += num_bytes
                self.peak = max(self.peak, self.live)

    def _free(self, key: int, num_bytes: int) -> None:
        del self._alive[key]
        self.live -= num_bytes


# functions that CUDA's autocast runs in its dtype, in float32, in float32 by their own dtype argument, and in the
# widest of their arguments'; of its lists (docs/source/amp.rst of PyTorch, "CUDA Ops") those that a model may call
_LOWER = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "einsum"}
_LOWER |= {"conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"}
_WIDER = {"layer_norm", "group_norm", "rms_norm", "mse_loss", "l1_loss", "smooth_l1_loss", "pow", "__pow__", "exp"}
_WIDER |= {"log", "reciprocal", "rsqrt", "softplus", "logsumexp", "cosine_similarity"}
_WIDE_RESULT = {"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"}
_WIDEST = {"cat", "stack", "addcmul", "addcdiv", "dot", "tensordot", "index_put", "scatter_add"}


class CudaAutocast(TorchFunctionMode):
    """Inside, torch.autocast("cpu") does on CPU tensors what torch.autocast("cuda") does on CUDA tensors.

    A weight's copy in the autocast dtype is kept until autocast is left, any other tensor is cast every time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            self._kept.clear()
            return func(*args, **kwargs)
        dtype, name = torch.get_autocast_dtype("cpu"), getattr(func, "__name__", "")
        with torch._C._DisableAutocast():
            if name in _WIDE_RESULT and args[0].dtype in (torch.float16, torch.bfloat16) and not kwargs.get("dtype"):
                if name == "softmax" and args[0].dtype == torch.float16:  # which CUDA has a kernel for
                    return aten._softmax(args[0], args[1] if len(args) > 1 else kwargs["dim"], True)
                return func(*args, **kwargs | {"dtype": torch.float32})
            cast = self._rule(name, dtype, args, kwargs)
            if cast is not None:
                args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return func(*args, **kwargs)

    def _rule(self, name: str, dtype: torch.dtype, args: tuple, kwargs: dict) -> Callable[[Tensor], Tensor] | None:
        if name in _LOWER:
            return lambda x: self._lowered(x, dtype)
        if name in _WIDER:
            return lambda x: _cast(x, torch.float32)
        if name in _WIDEST:
            wide = any(x.dtype == torch.float32 for x in _tensors(args, kwargs))
            return lambda x: _cast(x, torch.float32 if wide else dtype)
        return None

    def _lowered(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not (x.is_leaf and x.requires_grad and x.dtype == torch.float32):
            return _cast(x, dtype)
        if id(x) not in self._kept:
            self._kept[id(x)] = x, x.to(dtype)
        return self._kept[id(x)][1]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
