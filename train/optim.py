"""AdamW, its schedule, mixed precision, and what happens to a step whose gradients are not finite."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kernels.launch import check

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule (RECIPES D.1)."""

    base_lr: float = 1.5e-4  # for a batch of 256; the linear rule scales it to the batch
    min_lr: float = 1e-5  # where the cosine ends, scaled likewise
    warmup_epochs: float = 40.0  # of linear warm-up from 0; with --steps, the same share of the run, at most a tenth
    weight_decay: float = 0.05  # not on biases, norms and the mask token
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights with decay; biases, vectors and the mask token without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or name.endswith((".bias", "mask_token"))
        (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


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
        self._config, self._schedule, self.device = config, schedule, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = parameter_groups(model, config.weight_decay)
        # on the device, where a captured graph finds this step's
        self._rate = torch.zeros((), device=device)
        self._capturable = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, lr=self._rate, betas=config.betas, eps=config.eps, fused=True, capturable=self._capturable
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
        self._rate.fill_(self._schedule.at(step))

    def step(self, loss: Tensor, *, grad_factor: float = 1.0, skip: bool = False) -> StepStats:
        """Update the weights at the rate that was set, gradients times grad_factor. The gradients stay.

        Where the loss or a gradient is not finite, the device leaves weights and optimiser as they are, without asking
        the host; and so for skip, of a step without a single clip.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if grad_factor != 1.0:
            torch._foreach_mul_(gradients, grad_factor)
        norm = get_total_norm(gradients)
        nonfinite = (~(norm.isfinite() & loss.isfinite())).float()
        if self._config.clip_grad is not None:
            clip_grads_with_norm_(self.parameters, self._config.clip_grad, norm)
        # what GradScaler tells a fused optimiser, for every precision
        found_inf = torch.ones_like(nonfinite) if skip else nonfinite
        self.optimizer.found_inf, self.optimizer.grad_scale = found_inf, None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.scaler.update()
        return StepStats(norm, nonfinite)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        # moments and counts; the settings are this run's: of this device, and as they were asked for
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
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
