"""AdamW, its schedule, mixed precision, and what happens to a step whose gradients are not finite."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kernels.launch import check
from train.moments import load_moments, moments_of
from train.sharding import whole

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule (RECIPES D.1)."""

    base_lr: float = 1.5e-4  # learning rate for a batch of 256; the linear rule scales it to the batch
    min_lr: float = 1e-5  # where the cosine ends, scaled likewise
    warmup_epochs: float = 40.0  # of linear warm-up from 0; with --steps, the same share of the run, at most a tenth
    weight_decay: float = 0.05  # not on biases, norms and the mask token
    betas: tuple[float, float] = (0.9, 0.95)  # of the averages of the gradient and of its square
    eps: float = 1e-8  # added to the root of the latter
    clip_grad: float | None = None  # largest gradient norm
    max_nonfinite: int = 20  # steps in a row with a loss or gradient that is not finite before the run stops

    def __post_init__(self) -> None:
        check(0 < self.base_lr < math.inf, f"optim.base-lr must be positive and finite; got {self.base_lr}")
        check(0 <= self.min_lr < math.inf, f"optim.min-lr must not be negative, nor infinite; got {self.min_lr}")
        check(self.warmup_epochs >= 0, f"optim.warmup-epochs must not be negative; got {self.warmup_epochs}")
        check(self.weight_decay >= 0, f"optim.weight-decay must not be negative; got {self.weight_decay}")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1); got {self.betas}")
        check(self.eps > 0, f"optim.eps must be positive; got {self.eps}")
        check(self.clip_grad is None or self.clip_grad > 0, f"optim.clip-grad must be positive; got {self.clip_grad}")
        check(self.max_nonfinite >= 1, f"optim.max-nonfinite must be at least 1; got {self.max_nonfinite}")


@dataclass(frozen=True)
class FinetuneOptim(Optim):
    """AdamW for fine-tuning (RECIPES E.1)."""

    base_lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: float = 5.0
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.75  # factor on the learning rate from each block to the one before it; 1: the same for all

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.layer_decay <= 1, f"optim.layer-decay must be in (0, 1]; got {self.layer_decay}")


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a straight line from 0 to peak, both included, then half a cosine towards floor, which it
    never reaches."""

    peak: float
    floor: float
    warmup_steps: int
    steps: int

    def at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / max(self.warmup_steps - 1, 1)
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.floor + 0.5 * (self.peak - self.floor) * (1 + math.cos(math.pi * progress))


def schedule(config: Optim, *, batch_size: int, steps: int, warmup_steps: int) -> Schedule:
    """The schedule of a run, by the linear rule: rates for a batch of 256, times batch_size / 256."""
    check(steps >= 1, f"the run must have at least one step; got {steps}")
    check(warmup_steps < steps, f"the warm-up ({warmup_steps} steps) must be shorter than the run ({steps} steps)")
    scale = batch_size / 256
    return Schedule(config.base_lr * scale, config.min_lr * scale, warmup_steps, steps)


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Weights with decay; biases, vectors and the mask token without; apart by `rate`, what the layer's learning rate
    is multiplied with (RECIPES E.1): 1 for the head, layer_decay for the last block, and so on down to the embedding.
    """
    depth = 1 + max((_block(name) for name, _ in model.named_parameters()), default=-1)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.endswith((".bias", "mask_token"))
        rate = 1.0 if layer_decay == 1 else layer_decay ** (depth + 1 - _layer(name, depth))
        groups.setdefault((rate, exempt), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if exempt else weight_decay, "rate": rate}
        for (rate, exempt), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _block(name: str) -> int:
    """The number of the encoder's block that a parameter belongs to; -1 of any other."""
    found = re.match(r"(?:encoder\.)?blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _layer(name: str, depth: int) -> int:
    """0 for the embedding, i + 1 for block i, depth + 1 for everything else."""
    if name.startswith("patch_embed."):
        return 0
    block = _block(name)
    return depth + 1 if block < 0 else block + 1


class StepStats(NamedTuple):
    """Scalars on the device: reading them waits for it."""

    grad_norm: Tensor
    nonfinite: Tensor  # 1.0 when the step was skipped


class Updater:
    """Turns losses into updates: the backward pass of each micro-batch's loss times `loss_scale`, then `set_rate` and
    `step`."""

    def __init__(
        self, model: nn.Module, config: Optim, schedule: Schedule, precision: str, device: torch.device
    ) -> None:
        self._config, self._schedule, self._model, self.device = config, schedule, model, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        layer_decay = config.layer_decay if isinstance(config, FinetuneOptim) else 1.0
        groups = parameter_groups(model, config.weight_decay, layer_decay)
        # on the device, where a captured graph finds this step's
        self._rates = {group["rate"]: torch.zeros((), device=device) for group in groups}
        for group in groups:
            group["lr"] = self._rates[group["rate"]]
        self._capturable = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, betas=config.betas, eps=config.eps, fused=True, capturable=self._capturable
        )
        # only float16's gradients underflow
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")

    @property
    def loss_scale(self) -> Tensor | float:
        """What a loss is to be multiplied with before its backward pass: 1, or a scalar on the device for float16."""
        if not self.scaler.is_enabled():
            return 1.0
        return self.scaler.scale(torch.ones((), device=self.device))

    def set_rate(self, step: int) -> None:
        """The schedule's learning rate for this step, counted from 0, from now on."""
        for factor, rate in self._rates.items():
            rate.fill_(factor * self._schedule.at(step))

    def step(self, loss: Tensor, *, grad_factor: float | Tensor = 1.0, skip: bool | Tensor = False) -> StepStats:
        """Update the weights at the rate that was set, gradients times grad_factor. The gradients stay. Both may be
        scalars on the device.

        Where the loss or a gradient is not finite, the device leaves weights and optimiser as they are, without asking
        the host; and so for skip, of a step without a single clip.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if isinstance(grad_factor, Tensor) or grad_factor != 1.0:
            torch._foreach_mul_(gradients, grad_factor)
        norm = whole(get_total_norm(gradients))
        nonfinite = (~(norm.isfinite() & loss.isfinite())).float()
        if self._config.clip_grad is not None:
            clip_grads_with_norm_(self.parameters, self._config.clip_grad, norm)
        # what GradScaler tells a fused optimiser, for every precision
        if isinstance(skip, Tensor):
            found_inf = nonfinite.logical_or(skip).float()
        else:
            found_inf = torch.ones_like(nonfinite) if skip else nonfinite
        self.optimizer.found_inf, self.optimizer.grad_scale = found_inf, None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        return StepStats(norm, nonfinite)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimiser remembers, by parameter; see `train.moments.moments_of`."""
        return moments_of(self._model, self.optimizer)

    def state_dict(self) -> dict:
        """All else that a later run must know."""
        return {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """state: that of `state_dict`, and `moments` as optimizer."""
        load_moments(self._model, self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty from a run that did not scale
            self.scaler.load_state_dict(state["scaler"])


def resolve_precision(wanted: str, device: torch.device) -> str:
    """auto: bfloat16 on a GPU that has it, float16 on one that has not, float32 elsewhere. ValueError for float16 off a
    GPU."""
    if wanted != "auto":
        check(wanted != "float16" or device.type == "cuda", "float16 needs a GPU; use float32 or bfloat16")
        return wanted
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
