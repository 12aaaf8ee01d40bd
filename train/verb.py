"""What one kind of training adds to the machinery that all share: its videos, model, loss, and what it reports."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from train.config import RunConfig
from train.engine import Objective
from train.memory import Workload
from videomae.data.dataset import Sample, VideoList
from videomae.data.feed import OnDevice
from videomae.data.readers import Reader
from videomae.model import Input

if TYPE_CHECKING:
    from train.log import RunLog
    from train.run import Run

C = TypeVar("C", bound=RunConfig)


class Verb(ABC, Generic[C]):
    """One kind of training, with the configuration of one run of it."""

    name: ClassVar[str]  # of the command
    unit: ClassVar[str] = "videos"  # what a clip is read of
    together: int = 1  # clips that must be in one micro-batch

    def __init__(self, config: C) -> None:
        self.config = config

    # -- before the first step

    @property
    @abstractmethod
    def recipes(self) -> Mapping[str, Callable[[], C]]: ...

    @property
    @abstractmethod
    def input(self) -> Input:
        """What the model takes."""

    @property
    @abstractmethod
    def recompute(self) -> str:
        """What the backward pass makes anew."""

    @abstractmethod
    def find_videos(self) -> VideoList:
        """The videos to train on; ValueError when the recipe cannot use them. Called before anything is built."""

    @abstractmethod
    def sequences(self) -> dict[str, tuple[int, int]]:
        """Tokens that attend to each other, and the width of a head, for each part of the model."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh model."""

    @abstractmethod
    def initialize(self, model: nn.Module) -> None:
        """What a new run loads into it; a resumed one does not."""

    @abstractmethod
    def workload(self, num_parameters: int, precision: str, device_type: str) -> Workload: ...

    @abstractmethod
    def objective(self, model: nn.Module, precision: str) -> Objective: ...

    @abstractmethod
    def reader(self) -> Reader: ...

    def ready(self, run: "Run") -> None:
        """The last of what can be refused, with ValueError, once everything else is there."""

    def fingerprint(self, videos: VideoList) -> str:
        """What a resumed run must find again."""
        return videos.fingerprint

    @abstractmethod
    def describe(self, run: "Run") -> list[str]:
        """Lines of the plan that only this kind of training has."""

    def facts(self) -> dict[str, Any]:
        """What config.json notes beside what every run does."""
        return {}

    # -- in the loop

    def first(self, run: "Run") -> list[Sample]:
        """Clips to be read before the first step, at most a micro-batch or so."""
        return []

    def keep(self, batch: OnDevice) -> None:
        """Take those clips; their memory is used anew afterwards."""

    def is_incomplete(self, run: "Run") -> bool:
        """Whether something is left to do, in `begin`, for a run whose steps are all done."""
        return False

    def begin(self, run: "Run", log: "RunLog") -> None:
        """Before the first step of this part of the run."""

    @abstractmethod
    def inputs(self, run: "Run", batch: OnDevice, step: int) -> dict[str, Tensor]:
        """What the objective takes of a micro-batch; its weight is added by the loop."""

    def after_update(self, run: "Run", done: int) -> None:
        """After every update, done counted from 1."""

    def looks_after(self, run: "Run", done: int) -> bool:
        """Whether `after_step` looks at the weights then; the same in every process."""
        return False

    def after_step(self, run: "Run", log: "RunLog", done: int) -> None:
        """After every step's report and checkpoint, done counted from 1; the first process alone calls it."""

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds of this kind of training."""
        return {}

    def load_extra_state(self, checkpoint: Path, state: dict[str, Any], model: nn.Module) -> None:
        """Take that up again, model's weights being the checkpoint's."""

    def extra_weights(self) -> dict[str, nn.Module]:
        """Models that a checkpoint holds beside model.safetensors, by file name."""
        return {}

    def results(self, run: "Run", checkpoint: Path) -> list[str]:
        """What a finished run says of its results."""
        return []


def counts_of_tokens(input: Input, width: int, heads: int) -> tuple[int, int]:
    """Every cube is a token: their number, and the width of a head."""
    return input.num_cubes, width // heads


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Small host values on the device, without a wait where it is a GPU."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
