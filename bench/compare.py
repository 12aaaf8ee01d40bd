"""One op at one shape, computed by several: the same inputs, the values checked first, then time and memory of each.

A contender takes the inputs by name and gives one or several tensors. "ours" is this project's op, "eager" what a user
of PyTorch writes, "compile" the same under torch.compile; a bench may add others. Who fails, or whose values differ,
gets no time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from bench.issue import issue_microseconds
from bench.timing import Timing, measure, num_sets, peak_memory

Inputs = dict[str, Tensor]
Contender = Callable[..., Tensor | tuple[Tensor, ...]]

# relative errors (2-norm) against the reference in float32; a wrong kernel is far beyond, rounding well within
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Setting:
    """Where and in which dtype; compile_backend is torch.compile's."""

    device: torch.device
    dtype: torch.dtype
    compile_backend: str

    @staticmethod
    def gpu() -> "Setting":
        return Setting(torch.device("cuda"), torch.bfloat16, "inductor")

    @staticmethod
    def cpu() -> "Setting":
        return Setting(torch.device("cpu"), torch.float32, "aot_eager")


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes in and out of memory, operations of its matrix products."""

    reads: int
    writes: int
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.reads + other.reads, self.writes + other.writes, self.flops + other.flops)


@dataclass(frozen=True)
class Contest:
    """An op at a shape. make gives fresh inputs for a seed; those that require a gradient get one."""

    op: str
    size: str
    shape: str
    make: Callable[[int], Inputs]
    contenders: dict[str, Contender]
    truth: Contender
    work: dict[str, Work]  # by part: forward, backward, forward+backward


@dataclass(frozen=True)
class Result:
    """One contender in one part of a contest. Without timing, failure says why."""

    op: str
    size: str
    shape: str
    part: str
    contender: str
    work: Work
    timing: Timing | None = None
    error: float | None = None
    peak_bytes: int | None = None
    returned_bytes: int = 0
    issue_us: float | None = None  # what starting the kernel's instructions takes at least
    failure: str = ""


def results(contest: Contest, setting: Setting, *, seconds: float = 0.2) -> list[Result]:
    """Every contender in every part; a contender's failure is its own."""
    torch.compiler.reset()
    contenders = dict(contest.contenders)
    contenders["compile"] = torch.compile(contenders["eager"], backend=setting.compile_backend, dynamic=False)
    sets = [contest.make(i) for i in range(num_sets(min(w.reads for w in contest.work.values()), setting.device))]
    truth = answers(contest.truth, _widened(sets[0]), setting.dtype)
    found = []
    # a backward pass that is run again may not reuse the memory of what it was given
    with functorch_config.patch(donated_buffer=False):
        for name, contender in contenders.items():
            blank = [Result(contest.op, contest.size, contest.shape, p, name, w) for p, w in contest.work.items()]
            try:
                error = checked(answers(contender, sets[0], setting.dtype), truth, TOLERANCE[setting.dtype])
                found += [_measured(b, contender, sets, error, setting, seconds) for b in blank]
            except Exception as failure:  # whatever a rival or a compiler raises: it goes into the report
                reason = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
                found += [replace(b, failure=reason) for b in blank]
    return found


def answers(contender: Contender, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then the gradients of all inputs that require one."""
    outputs = _tuple(contender(**inputs))
    leaves = [x for x in inputs.values() if x.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, _upstream(outputs, dtype))]


def checked(got: list[Tensor], truth: list[Tensor], tolerance: float) -> float:
    """The largest relative error, which is at most tolerance; ValueError with all of them when it is not."""
    errors = []
    for ours, true in zip(got, truth, strict=True):
        if ours.shape != true.shape:
            raise ValueError(f"values differ: shape {tuple(ours.shape)}, not {tuple(true.shape)}")
        wide = true.double()
        scale = torch.linalg.vector_norm(wide).clamp_min(torch.finfo(torch.float32).tiny)
        errors.append((torch.linalg.vector_norm(ours.double() - wide) / scale).item())
    if not all(e <= tolerance for e in errors):  # so that nan does not pass
        raise ValueError(f"values differ: relative errors {', '.join(f'{e:.1e}' for e in errors)}, allowed {tolerance}")
    return max(errors)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _widened(inputs: Inputs) -> Inputs:
    wide = {k: x.detach().float() if x.is_floating_point() else x for k, x in inputs.items()}
    return {k: x.requires_grad_(inputs[k].requires_grad) for k, x in wide.items()}


def _upstream(outputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Random, the same for every contender; 1 for a scalar, which is what a loss gets."""
    upstream = []
    for i, output in enumerate(outputs):
        if output.ndim == 0:
            upstream.append(torch.ones_like(output))
            continue
        generator = torch.Generator(output.device).manual_seed(1000 + i)
        random = torch.randn(output.shape, generator=generator, device=output.device).to(dtype)
        upstream.append(random.to(output.dtype))
    return upstream


def part_of(part: str, contender: Contender, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """How a part of the work is prepared from a set of inputs, and run on what was prepared."""

    def prepare(inputs: Inputs) -> Any:
        leaves = [x for x in inputs.values() if x.requires_grad]
        if part == "forward":
            return inputs, leaves, None
        outputs = _tuple(contender(**inputs))
        upstream = _upstream(outputs, dtype)
        return (outputs if part == "backward" else inputs), leaves, upstream

    def run(prepared: Any) -> Any:
        given, leaves, upstream = prepared
        if part == "forward":
            return _tuple(contender(**given))
        if part == "backward":
            return torch.autograd.grad(given, leaves, upstream, retain_graph=True)
        outputs = _tuple(contender(**given))
        return [o.detach() for o in outputs], torch.autograd.grad(outputs, leaves, upstream)

    return prepare, run


def _measured(
    blank: Result, contender: Contender, sets: list[Inputs], error: float, setting: Setting, seconds: float
) -> Result:
    prepare, run = part_of(blank.part, contender, setting.dtype)
    blank = _with_memory(replace(blank, error=error), prepare(sets[0]), run, setting)
    return replace(blank, timing=measure(sets, run, device=setting.device, prepare=prepare, seconds=seconds))


def _with_memory(blank: Result, prepared: Any, run: Callable[[Any], Any], setting: Setting) -> Result:
    """With the peak above what is prepared, how much of it comes back, and the time to start the instructions."""
    back = {x.data_ptr(): x.numel() * x.element_size() for x in _flat(run(prepared))}
    peak = peak_memory(lambda: run(prepared), setting.device)
    issue = None
    if blank.contender == "ours" and not blank.work.flops and setting.device.type == "cuda":
        try:
            issue = issue_microseconds(lambda: run(prepared), setting.device)
        except Exception as error:  # a disassembler that fails must not cost the measurement
            print(f"no limit from instructions for {blank.op} {blank.part}: {error!r}")
    return replace(blank, peak_bytes=peak, returned_bytes=sum(back.values()), issue_us=issue)


def _flat(results: Any) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    else:
        for one in results:
            yield from _flat(one)
