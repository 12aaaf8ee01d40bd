"""Which attention runs, and nothing else decides it: `choose` says which and why, `attend` runs it.

softmax(q k^T * d^-0.5) v over packed qkv [B, L, 3, A, d], neither causal nor with dropout. Back ends:

    flash-attn     flash_attn 2: `flash_attn_qkvpacked_func`, which writes packed gradients; optional package
    flash-attn-4   flash_attn.cute, a beta: the two kernels that PyTorch too calls in it; optional package
    xformers       `memory_efficient_attention`; optional package, an extra of that name like the other two
    sdpa-cudnn     PyTorch's scaled_dot_product_attention, pinned to cuDNN's
    sdpa-flash     the same, pinned to its flash attention
    sdpa           the same, PyTorch decides
    triton         this project's `kernels.attention`; without a GPU its reference

On GPUs all but sdpa are untested here, that is, never run on one of this project's, until `attention.json`, which
ships, has their times. What is untested runs when it is asked for by name, never by "auto": that goes by the table, and
where the table has no entry it takes sdpa, which takes everything. Without a GPU there are only sdpa and triton.
`python -m bench.gpu --only attention --keep-attention` times every back end that is usable and puts it into the table:

    {"<GPU> sm_90": {"160x64": {"choice": "triton", "us": {"triton": <microseconds>, "sdpa": <microseconds>}}}}

that is: for 160 tokens with heads 64 wide, forward and backward in bfloat16. An entry serves lengths from half to twice
its own.
Signatures and limits were read from flash_attn 2.8.3.post2, flash_attn_4 4.0.0b36, xformers 0.0.35, and PyTorch's
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module, metadata
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention import attention as triton_attention
from kernels.launch import KERNEL_DTYPES
from kernels.split_heads import split_heads
from kernels.tiles import target_of

TABLE = Path(__file__).with_name("attention.json")
HALF = (torch.bfloat16, torch.float16)
# how many times shorter or longer than a measured sequence another may be, to go by its times
NEAR = 2.0
# what "auto" takes where nothing was measured; takes every device, dtype and shape
FALLBACK = "sdpa"


@dataclass(frozen=True)
class Choice:
    """A back end's name, and why it is that one: a short phrase for the user."""

    name: str
    why: str


@dataclass(frozen=True)
class Backend:
    """How to compute attention of qkv for the last so many tokens (None: all), and what that takes."""

    run: Callable[[Tensor, int | None, Tensor | None], Tensor]
    dtypes: tuple[torch.dtype, ...] = HALF  # on a GPU
    widest: int = 256  # head
    step: int = 1  # what head widths are a multiple of
    oldest: int = 80  # compute capability
    needs_gpu: bool = True
    obstacle: Callable[[int], str] = lambda length: ""  # what else is missing, for sequences of that length

    def refusal(self, device: torch.device, dtype: torch.dtype, length: int, head_width: int) -> str:
        """Why it cannot run these there, as a phrase that follows its name; "" when it can.

        Imports the back end's package when nothing else stands against it.
        """
        if self.needs_gpu and device.type != "cuda":
            return f"needs a CUDA GPU; the tensors are on {device.type}"
        if not 1 <= head_width <= self.widest or head_width % self.step:
            steps = f" in steps of {self.step}" if self.step > 1 else ""
            return f"takes heads up to {self.widest} wide{steps}, not {head_width}"
        if device.type != "cuda":
            return ""
        capability = target_of(device).capability
        if capability < self.oldest:
            return f"needs sm_{self.oldest} or newer; this GPU is sm_{capability}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {' and '.join(map(_name_of, self.dtypes))}, not {_name_of(dtype)}"
        return self.obstacle(length)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _split(qkv: Tensor, last: int | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, last or L, A, d], k and v [B, L, A, d]: views."""
    if bias is not None:
        return split_heads(qkv, bias, last)
    q, k, v = qkv.unbind(2)
    return (q if last is None else q[:, -last:]), k, v


class _BiasGradient(torch.autograd.Function):
    """qkv as it is, for those who take it packed; bias gets the gradient that `split_heads` would give it."""

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_dtype = bias.dtype  # type: ignore[attr-defined]
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx: FunctionCtx, dqkv: Tensor) -> tuple[Tensor, Tensor]:
        sums = dqkv.flatten(2).sum(dim=(0, 1), dtype=torch.promote_types(dqkv.dtype, torch.float32))
        return dqkv, sums.to(ctx.bias_dtype)  # type: ignore[attr-defined]


def _packed(qkv: Tensor, bias: Tensor | None) -> Tensor:
    return qkv if bias is None else _BiasGradient.apply(qkv, bias)


def _sdpa(qkv: Tensor, last: int | None, bias: Tensor | None) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in _split(qkv, last, bias))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _pinned(kind: SDPBackend, qkv: Tensor, last: int | None, bias: Tensor | None) -> Tensor:
    with sdpa_kernel(kind):
        return _sdpa(qkv, last, bias)


def _triton(qkv: Tensor, last: int | None, bias: Tensor | None) -> Tensor:
    mixed = triton_attention(_packed(qkv, bias))
    return mixed if last is None else mixed[:, -last:]


def _flash_attn(qkv: Tensor, last: int | None, bias: Tensor | None) -> Tensor:
    """Its functions are made of registered ops, so that torch.compile takes them whole."""
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

    deterministic = torch.are_deterministic_algorithms_enabled()
    if last is None:
        return flash_attn_qkvpacked_func(_packed(qkv, bias), deterministic=deterministic).flatten(2)
    return flash_attn_func(*_split(qkv, last, bias), deterministic=deterministic).flatten(2)


def _xformers(qkv: Tensor, last: int | None, bias: Tensor | None) -> Tensor:
    """Its function is made of registered ops, so that torch.compile takes it whole."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*_split(qkv, last, bias)).flatten(2)


def _cute_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, M, A, d], and the logarithms of the sums, float32 [B, A, M], of q [B, M, A, d], k and v [B, L, A, d]."""
    from flash_attn.cute import interface

    out, lse = interface._flash_attn_fwd(q, k, v, return_lse=True)[:2]
    return out, lse


def _cute_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute import interface

    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv = interface._flash_attn_bwd(q, k, v, out, dout, lse, deterministic=deterministic)
    return dq, dk, dv


def _cute_setup(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


# the package's own function cannot be traced by torch.compile (github.com/Dao-AILab/flash-attention/issues/2154):
# registered here, its kernels can
_cute_forward_op = torch.library.custom_op("videomae::flash_attn_4", _cute_forward, mutates_args=())
_cute_backward_op = torch.library.custom_op("videomae::flash_attn_4_backward", _cute_backward, mutates_args=())
_cute_forward_op.register_fake(
    lambda q, k, v: (q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32))
)
_cute_backward_op.register_fake(lambda dout, q, k, v, out, lse: tuple(torch.empty_like(x) for x in (q, k, v)))
_cute_forward_op.register_autograd(
    lambda ctx, dout, _: _cute_backward_op(dout.contiguous(), *ctx.saved_tensors), setup_context=_cute_setup
)


def _flash_attn_4(qkv: Tensor, last: int | None, bias: Tensor | None) -> Tensor:
    return _cute_forward_op(*_split(qkv, last, bias))[0].flatten(2)


def _package(name: str, module: str, length: int) -> str:
    """Why that package cannot be used, or "". Asked by its distribution's name: flash_attn 2 and 4 share the module
    `flash_attn`, and 2 brings an old `flash_attn.cute` along."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"
    try:
        import_module(module)
    # built for another PyTorch or CUDA, or for another release of a package that it needs
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        return f"is installed but does not import: {type(error).__name__}: {lines[0] if lines else ''}"
    return ""


def _without_cudnn(length: int) -> str:
    version = torch.backends.cudnn.version()
    if version is None:
        return "needs cuDNN, which this PyTorch lacks"
    if torch.are_deterministic_algorithms_enabled():
        return "is not deterministic, which torch.use_deterministic_algorithms asks for"
    # the release that mended such lengths (PyTorch's sdp_utils.cpp, github.com/pytorch/pytorch/issues/169849)
    if length % 128 and version < 91501:
        return f"needs cuDNN 9.15.1 for lengths that are no multiple of 128; this is {version}"
    return ""


def _without_flash(length: int) -> str:
    return "" if torch.backends.cuda.is_flash_attention_available() else "is not part of this build of PyTorch"


BACKENDS: dict[str, Backend] = {
    "flash-attn": Backend(_flash_attn, obstacle=partial(_package, "flash-attn", "flash_attn")),
    # backward: Hopper and Blackwell only
    "flash-attn-4": Backend(
        _flash_attn_4, widest=128, step=8, oldest=90,
        obstacle=partial(_package, "flash-attn-4", "flash_attn.cute.interface"),
    ),
    "xformers": Backend(_xformers, step=8, obstacle=partial(_package, "xformers", "xformers.ops")),
    "sdpa-cudnn": Backend(
        partial(_pinned, SDPBackend.CUDNN_ATTENTION), widest=128, step=8, obstacle=_without_cudnn
    ),
    "sdpa-flash": Backend(partial(_pinned, SDPBackend.FLASH_ATTENTION), obstacle=_without_flash),
    "sdpa": Backend(_sdpa, dtypes=(), widest=2**31, oldest=0, needs_gpu=False),
    "triton": Backend(_triton, dtypes=KERNEL_DTYPES, widest=128, needs_gpu=False),
}  # fmt: skip


@cache
def table() -> dict[str, Any]:
    """GPU -> shape -> choice and times."""
    return json.loads(TABLE.read_text())


def _nearest(shapes: dict[str, Any], length: int, head_width: int) -> dict[str, Any] | None:
    """The entry of the measured length that is nearest by ratio, with heads of just that width; None beyond NEAR."""
    near = []
    for shape, entry in shapes.items():
        tokens, width = map(int, shape.split("x"))
        ratio = max(length, tokens) / max(1, min(length, tokens))
        if width == head_width and ratio <= NEAR:
            near.append((ratio, tokens, entry))
    return min(near, key=lambda found: found[:2])[2] if near else None


def _automatic(device: torch.device, dtype: torch.dtype, length: int, head_width: int) -> Choice:
    if device.type != "cuda":
        return Choice(FALLBACK, "no GPU: torch chooses")
    gpu = target_of(device)
    shapes = table().get(gpu.key)
    if not shapes:
        return Choice(FALLBACK, "no measurement for this GPU: torch chooses")
    if dtype not in HALF:
        return Choice(FALLBACK, f"no measurement in {_name_of(dtype)}: torch chooses")
    entry = _nearest(shapes, length, head_width)
    if entry is None:
        return Choice(FALLBACK, f"no measurement near {length} tokens with heads of {head_width}: torch chooses")
    instead = ""
    for name in dict.fromkeys((entry["choice"], *sorted(entry["us"], key=entry["us"].__getitem__))):
        backend = BACKENDS.get(name)
        refusal = backend.refusal(device, dtype, length, head_width) if backend else "is unknown here"
        if not refusal:
            why = f"measured on {gpu.name}"
            return Choice(name, f"next fastest {why}: {instead}" if instead else why)
        instead = instead or f"{name} {refusal}"
    return Choice(FALLBACK, f"nothing measured on {gpu.name} can run: torch chooses")


def _measured_on(device: torch.device, name: str) -> str:
    """The GPU, where the table has a time of that back end on it, else ""."""
    gpu = target_of(device)
    return gpu.name if any(name in entry["us"] for entry in table().get(gpu.key, {}).values()) else ""


@cache
def _decide(
    wanted: str, device: torch.device, dtype: torch.dtype, length: int, head_width: int, deterministic: bool
) -> Choice | str:
    """The choice, or the refusal. deterministic: torch's setting, which back ends ask for themselves."""
    if wanted == "auto":
        return _automatic(device, dtype, length, head_width)
    if wanted not in BACKENDS:
        return f"attention must be auto, {', '.join(BACKENDS)}; got {wanted!r}"
    refusal = BACKENDS[wanted].refusal(device, dtype, length, head_width)
    if refusal:
        return f"attention by {wanted}: it {refusal}"
    if device.type != "cuda" or wanted == "sdpa":
        return Choice(wanted, "asked for")
    gpu = _measured_on(device, wanted)
    return Choice(wanted, f"asked for, measured on {gpu}" if gpu else "asked for, untested here")


def choose(wanted: str, *, device: torch.device, dtype: torch.dtype, length: int, head_width: int) -> Choice:
    """The back end that `attend` runs for such qkv, and why.

    wanted: "auto", or a name in BACKENDS. "auto" never fails: it takes the measured pick of the nearest measured length
    (same GPU, same head width, at most NEAR times as long or as short, 16-bit dtypes), or the next fastest that is
    installed, or sdpa. Asked twice, it answers from memory.

    ValueError for an unknown name, and when the back end cannot take the device, dtype or head width, or its package
    is missing: with the reason.
    """
    decided = _decide(wanted, device, dtype, length, head_width, torch.are_deterministic_algorithms_enabled())
    if isinstance(decided, str):
        raise ValueError(decided)
    return decided


def _decided(wanted: str, device: torch.device, dtype: torch.dtype, length: int, head_width: int) -> tuple[str, str]:
    """Name and refusal, one of them "". torch.compile asks when it traces and compiles the answer in."""
    decided = _decide(wanted, device, dtype, length, head_width, torch.are_deterministic_algorithms_enabled())
    return ("", decided) if isinstance(decided, str) else (decided.name, "")


# what torch.compiler.assume_constant_result does, without its import of the whole compiler: a second for every user
_decided._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(qkv: Tensor, backend: str = "auto", last: int | None = None, bias: Tensor | None = None) -> Tensor:
    """Self-attention [B, L, A * d] of packed qkv [B, L, 3, A, d]; differentiable. Scores times d^-0.5.

    backend: see `choose`. last: only the last so many tokens ask, [B, last, A * d]; keys and values are all L tokens.
    bias: [3 * A * d], which qkv holds already, detached, and whose gradient is to come from here: see
    `kernels.split_heads`.
    Runs compiled, without a break, and captured in a CUDA graph once it ran before: it never waits for the device.

    Raises ValueError for another shape, when last is not 1 to L, and as `choose` does.
    """
    # no call for the checks: their messages would be made every time
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, L, 3, A, d]; got shape {tuple(qkv.shape)}")
    length = qkv.shape[1]
    if last is not None and not 1 <= last <= length:
        raise ValueError(f"last must be 1 to {length} tokens; got {last}")
    # index: where torch.compile has a symbol for the length, it compiles anew for another one
    name, refusal = _decided(backend, qkv.device, qkv.dtype, index(length), index(qkv.shape[4]))
    if refusal:
        raise ValueError(refusal)
    return BACKENDS[name].run(qkv, last, bias)
