"""How the device runs a step: kernel by kernel (eager), compiled by torch.compile, or as captured CUDA graphs.

All take the same calls, `micro_batch` for every part of a step and then `update`, and give the same losses within
rounding. Graphs replay the whole step, masks and optimiser included: one start from Python for every micro-batch and
one for the update, instead of hundreds; torch.compile fuses what PyTorch left apart.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import einops
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kernels.launch import check
from train.optim import Updater
from train.sharding import is_spread

# imported where it is needed, see train/sharding.py
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

EngineName = Literal["eager", "compile", "graph"]
ParallelName = Literal["ddp", "fsdp"]
# the first steps of a run, which a graph is not captured from: they compile kernels and make the optimiser's state
WARM_UP = 3

Objective = Callable[..., Tensor]  # (scale=, **inputs) -> scalar loss times scale


class Engine:
    """Kernel by kernel."""

    # whether every call must bring the same inputs, in the same shapes
    fixed = False

    def __init__(self, objective: Objective, updater: Updater) -> None:
        self._objective, self._updater = objective, updater
        self._loss = torch.zeros((), device=updater.device)
        self._begins = True  # whether the next micro-batch is a step's first

    def micro_batch(self, inputs: Mapping[str, Tensor], share: float, last: bool = True) -> None:
        """Add up gradients and loss of a part of the step: the objective of these inputs, times share. last: of this
        step."""
        self._forward_backward(inputs, share, first=self._begins)
        self._begins = False

    def update(self, step: int, *, real: int = 1, clips: int = 1) -> Tensor:
        """New weights by the schedule's rate for this step, gradients as if all its clips had been read, and not only
        the real ones; without a real one the weights stay.

        Returns [loss, gradient norm, 1.0 if one of them was not finite and the weights stayed], on the device.
        """
        self._updater.set_rate(step)
        values = self._step(*_correction(real, clips))
        self._updater.optimizer.zero_grad(set_to_none=True)
        self._begins = True
        return values

    def _forward_backward(self, inputs: Mapping[str, Tensor], share: float | Tensor, first: bool) -> None:
        scale = self._updater.loss_scale
        part = self._objective(**inputs, scale=scale * share)
        part.backward()
        if first:
            self._loss.zero_()
        self._loss += part.detach() / scale

    def _step(self, grad_factor: float, skip: bool) -> Tensor:
        stats = self._updater.step(self._loss, grad_factor=grad_factor, skip=skip)
        return torch.stack((self._loss * grad_factor, stats.grad_norm, stats.nonfinite))


def _correction(real: int, clips: int) -> tuple[float, bool]:
    """What a step's gradients are multiplied with, and whether it is none at all."""
    return clips / real if 0 < real < clips else 1.0, real == 0


def compiled(objective: Objective, backend: str = "inductor") -> Objective:
    """By torch.compile, in one piece. Once: einops finds out about tensors at its first use, and what was compiled
    before that would be compiled again."""
    einops.rearrange(torch.empty(0), "a -> a")
    return torch.compile(objective, fullgraph=True, dynamic=False, backend=backend)


class Compiled(Engine):
    """The objective, forward and backward, by torch.compile in one piece; the optimiser's fused kernel as it is."""

    fixed = True

    def __init__(self, objective: Objective, updater: Updater, backend: str = "inductor") -> None:
        super().__init__(compiled(objective, backend), updater)

    def micro_batch(self, inputs: Mapping[str, Tensor], share: float, last: bool = True) -> None:
        # a number would be compiled in, and every other share anew
        self._forward_backward(inputs, torch.full((), share, device=self._updater.device), first=self._begins)
        self._begins = False


class Parallel(Engine):
    """One of several processes that each compute a share of every step. Gradients are averaged once a step, during its
    last backward pass; the loss with what else all must know, after it."""

    def __init__(self, objective: Objective, updater: Updater, stop: Sequence[int]) -> None:
        """stop: the signals that this process got."""
        super().__init__(objective, updater)
        self._stop, self._processes = stop, distributed.get_world_size()

    def micro_batch(self, inputs: Mapping[str, Tensor], share: float, last: bool = True) -> None:
        # shares are of the whole step, and what is averaged is to be added up
        scale = torch.full((), share * self._processes, device=self._updater.device)
        with self._averaging(last):
            self._forward_backward(inputs, scale, first=self._begins)
        self._begins = False

    def update(self, step: int, *, real: int = 1, clips: int = 1) -> Tensor:
        """As every engine's; real: of this process, clips: of all. Returns two values more: the clips that were not
        read, and how many processes were asked to stop, of all of them."""
        self._updater.set_rate(step)
        numbers = (torch.full_like(self._loss, number) for number in (real, bool(self._stop)))
        told = torch.stack((self._loss / self._processes, *numbers))
        distributed.all_reduce(told)
        loss, read, asked = told.unbind()
        factor = clips / read.clamp_min(1)
        stats = self._updater.step(loss, grad_factor=factor, skip=read == 0)
        self._updater.optimizer.zero_grad(set_to_none=True)
        self._begins = True
        return torch.stack((loss * factor, stats.grad_norm, stats.nonfinite, clips - read, asked))

    def _averaging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Inside, backward averages gradients over the processes if last, and else leaves them."""
        raise NotImplementedError


class DataParallel(Parallel):
    """Every process has all weights, the first one's: PyTorch's DistributedDataParallel."""

    def __init__(self, objective: Objective, updater: Updater, model: nn.Module, stop: Sequence[int]) -> None:
        device = updater.device
        # no static_graph: with micro-batches under no_sync PyTorch 2.13 fails an assertion of its own (pytorch issue
        # 187732), and where every parameter is used it saves nothing
        self._module = DistributedDataParallel(
            _Part(objective, model),
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        super().__init__(self._module, updater, stop)

    def _averaging(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self._module.no_sync()


class Sharded(Parallel):
    """Weights, gradients and moments are spread over the processes: PyTorch's FSDP2, see train/sharding.py."""

    def __init__(self, objective: Objective, updater: Updater, model: "FSDPModule", stop: Sequence[int]) -> None:
        super().__init__(objective, updater, stop)
        self._model = model

    @contextlib.contextmanager
    def _averaging(self, last: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(last)
        yield


class _Part(nn.Module):
    """An objective as the module that DistributedDataParallel takes."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        # parameters alone: buffers are tables, which are everywhere the same
        self._objective, self.weights = objective, nn.ParameterList(model.parameters())

    def forward(self, **inputs: Any) -> Tensor:
        return self._objective(**inputs)


class Recorder(Protocol):
    """Where an engine's pieces are run to warm up, and captured. What it calls must find its inputs at one address."""

    def warm_up(self, function: Callable[[], Any]) -> None: ...

    def capture(self, function: Callable[[], Any]) -> Callable[[], None]: ...


class CudaRecorder:
    """Captures on a stream of its own, all graphs from one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Any]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, function: Callable[[], Any]) -> Callable[[], None]:
        gc.collect()  # torch.cuda.graph then empties the cache, so that its pool can have what warming up took
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may go on allocating; the stream by itself, as a capture that fails leaves its own
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()
        return graph.replay


class Graphs(Engine):
    """Three graphs: a step's first micro-batch, any further one, the update. They read inputs and share of the step
    from buffers, the learning rate from the optimiser's, and leave gradients and results where they were captured."""

    fixed = True

    def __init__(self, objective: Objective, updater: Updater, recorder: Recorder) -> None:
        super().__init__(objective, updater)
        self._recorder = recorder
        self._graphs: dict[str, Callable[[], None]] = {}
        self._inputs: dict[str, Tensor] = {}
        self._share = torch.zeros((), device=updater.device)
        self._values = torch.zeros(3, device=updater.device)
        self._steps = 0

    def micro_batch(self, inputs: Mapping[str, Tensor], share: float, last: bool = True) -> None:
        if not self._inputs:
            self._inputs = {name: torch.empty_like(x, device=self._share.device) for name, x in inputs.items()}
        for name, buffer in self._inputs.items():
            check(
                inputs[name].shape == buffer.shape,
                f"the graph was made for {name} {tuple(buffer.shape)}; got {tuple(inputs[name].shape)}",
            )
            buffer.copy_(inputs[name], non_blocking=True)
        self._share.fill_(share)
        if self._begins:
            self._play("first", self._first)
        else:
            self._play("further", lambda: self._forward_backward(self._inputs, self._share, first=False))
        self._begins = False

    def update(self, step: int, *, real: int = 1, clips: int = 1) -> Tensor:
        self._updater.set_rate(step)
        grad_factor, skip = _correction(real, clips)
        if grad_factor == 1.0 and not skip:
            self._play("update", lambda: self._values.copy_(self._step(1.0, False)))
        else:  # a clip could not be read: seldom enough to start kernel by kernel
            self._values.copy_(self._step(grad_factor, skip))
        self._begins = True
        self._steps += 1
        return self._values.clone()

    def _first(self) -> None:
        # captured without gradients, backward writes them where it would otherwise add
        self._updater.optimizer.zero_grad(set_to_none=True)
        self._forward_backward(self._inputs, self._share, first=True)

    def _play(self, name: str, function: Callable[[], Any]) -> None:
        if self._steps < WARM_UP:
            self._recorder.warm_up(function)
            return
        if name not in self._graphs:
            if name == "first":  # the last gradients from outside, whose memory no graph could use
                self._updater.optimizer.zero_grad(set_to_none=True)
            # from here on the parameters hold the gradients where they were captured
            self._graphs[name] = self._recorder.capture(function)
        self._graphs[name]()


def check_engine(
    engine: EngineName, device: torch.device, recompute: str, *, parallel: ParallelName | None = None
) -> None:
    """ValueError when that engine cannot run there, or not with that recomputation, or not in several processes."""
    check(engine != "graph" or device.type == "cuda", "--engine graph captures CUDA graphs and needs a GPU; use eager")
    check(
        engine != "graph" or parallel is None,
        "--engine graph captures a step whose gradients stay in one process; use eager or compile with torchrun",
    )
    check(
        engine != "compile" or parallel != "fsdp",
        "--parallel fsdp brings weights together between the pieces that compile would make one of; use eager, or ddp",
    )
    check(
        engine != "compile" or recompute != "norms",
        "--engine compile chooses by itself which elementwise results to compute anew; "
        "--model.recompute none, mlp or block",
    )


def make_engine(name: EngineName, objective: Objective, updater: Updater) -> Engine:
    """The engine of that name; see `check_engine` for what it needs."""
    if name == "compile":
        return Compiled(objective, updater)
    if name == "graph":
        return Graphs(objective, updater, CudaRecorder(updater.device))
    return Engine(objective, updater)


def make_parallel(
    name: EngineName, objective: Objective, updater: Updater, model: nn.Module, stop: Sequence[int]
) -> Parallel:
    """The engine of one of several processes; see `check_engine`. model: the one that is trained, maybe spread. stop:
    the signals that this process got."""
    if is_spread(model):
        return Sharded(objective, updater, model, stop)
    if name == "compile":
        objective = compiled(objective)
    engine = DataParallel(objective, updater, model, stop)
    engine.fixed = name == "compile"
    return engine
