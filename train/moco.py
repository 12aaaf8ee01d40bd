"""Pre-train by contrast, MoCo v3 for clips: `python -m train.moco [RECIPE] [--data PATH] [--section.field VALUE]`.

What it adds to the loop of train/loop.py: two views of every video, an encoder of keys that follows the trained one,
and a report on how the views are told apart, which shows a collapse.

Negatives are the other videos of a micro-batch, in all processes; batch norms are over the same clips. So a step is one
micro-batch unless --micro-batch makes it several, each with negatives of its own; a larger model may need
--model.recompute block in place of that.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.launch import check
from train.finetune_recipes import FINETUNE
from train.log import RunLog
from train.loop import command
from train.memory import Workload
from train.moco_recipes import MOCO, VIEWS, MocoConfig
from train.optim import PRECISIONS
from train.run import Run
from train.unlabelled import UnlabelledVerb
from train.verb import counts_of_tokens
from videomae.blocks import set_attention, set_recompute
from videomae.command_line import run_main
from videomae.data.augment import Augment
from videomae.data.contrast import ContrastReader
from videomae.data.dataset import VideoList
from videomae.data.feed import OnDevice
from videomae.data.sampling import Sampling
from videomae.masking import Counts
from videomae.moco import (
    Contrasted,
    MomentumEncoder,
    compare,
    everyones,
    follow,
    momentum_at,
    momentum_encoder_of,
    processes,
    spread,
)
from videomae.model import size_of
from videomae.weights import load_weights

_MOMENTUM = "momentum.safetensors"
# below, features point the same way in all but a thousandth of their length: nothing is left to tell clips apart
_COLLAPSED = 0.03


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `train.loop.command`."""
    about = "Pre-train an encoder by contrast (MoCo v3) on videos; with no argument, on the demo."
    return command(Contrasting, MOCO, arguments, prog="python -m train.moco", about=about)


@dataclass(frozen=True)
class ContrastObjective:
    """What a step minimises: each view, as a query, is to find its video's other view among those of all videos.

    A function of tensors only, as `train.objective.PretrainObjective`. seen: float32 [4], to which every finite
    micro-batch adds the share of its queries whose own key was the nearest, the `spread` of queries and of features,
    and 1.
    """

    model: Contrasted
    momentum: MomentumEncoder
    temperature: float
    seen: Tensor
    autocast: torch.dtype | None = None

    def __call__(self, frames: Tensor, weight: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
        """The loss, a float32 scalar, times scale: the mean over videos of both views' losses.

        frames: uint8 [B, T, H, W, C], the views of a video neighbours. weight: float32 [B], 0 for clips that do not
        count.
        """
        weight = torch.ones(len(frames), device=frames.device) if weight is None else weight
        counted = weight.unflatten(0, (-1, VIEWS)).amin(dim=1)
        with torch.autocast(frames.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            features = self.model.pooled(frames).unflatten(0, (-1, VIEWS))
            queries = [
                self.model.predictor(self.model.projector(view, counted), counted) for view in features.unbind(1)
            ]
            with torch.no_grad():
                theirs = self.momentum.pooled(frames).unflatten(0, (-1, VIEWS))
                keys = [everyones(self.momentum.projector(view, counted)) for view in theirs.unbind(1)]
        there, (rank, _) = everyones(counted), processes()
        own = torch.arange(len(counted), device=frames.device) + rank * len(counted)
        pairs = zip(queries, reversed(keys), strict=True)
        compared = [compare(query, key, own, self.temperature, there) for query, key in pairs]
        number = counted.sum().clamp_min(1)
        found = sum(counted @ one.found.float() for one in compared) / (VIEWS * number)
        spreads = spread(queries[0], counted), spread(features[:, 0], counted)
        values = torch.stack((found, *spreads, torch.ones_like(found))).detach()
        self.seen.add_(torch.where(values.isfinite().all(), values, 0))
        return scale * sum(counted @ one.loss for one in compared) / number


class Contrasting(UnlabelledVerb[MocoConfig]):
    """One run of contrastive pre-training."""

    name = "moco"

    def __init__(self, config: MocoConfig) -> None:
        super().__init__(config)
        _, count = processes()
        check(
            config.batch_size % count == 0,
            f"a step's {config.batch_size} videos cannot be shared equally by {count} processes: give another "
            "--batch-size",
        )
        # negatives, and what batch norms see, are not left to the memory that is free
        self.together = config.micro_batch or max(config.clips_per_step // count, VIEWS)
        self._momentum: MomentumEncoder | None = None
        self._seen = torch.zeros(4)
        self._collapsed = False

    @property
    def recipes(self) -> Mapping[str, Callable[[], MocoConfig]]:
        return MOCO

    @property
    def _contrasted(self) -> int:
        """Videos that are told apart at a time."""
        return self.together * processes()[1] // VIEWS

    # -- before the first step

    def find_videos(self) -> VideoList:
        config, (_, count) = self.config, processes()
        check(config.parallel == "ddp", "the encoder of keys follows whole weights: --parallel ddp")
        check(config.engine != "compile" or count == 1, "processes exchange keys within a step: --engine eager")
        videos = super().find_videos()
        check(len(videos) >= self._contrasted, f"{len(videos)} videos cannot be {self._contrasted} different ones")
        return videos

    def sequences(self) -> dict[str, tuple[int, int]]:
        size = size_of(self.config.model.size)
        return {"encoder": counts_of_tokens(self.input, size.width, size.heads)}

    def build(self) -> Contrasted:
        model = self.config.model
        # which frames the weights have seen, for whoever uses them
        input = replace(model.input, sampling=Sampling("dense", self.config.sampling.stride))
        made = Contrasted(size_of(model.size), input, hidden=model.hidden, width=model.width)
        made.patch_embed.requires_grad_(not model.frozen_cubes)
        set_recompute(made, model.recompute)
        return made

    def initialize(self, model: nn.Module) -> None: ...

    def workload(self, num_parameters: int, precision: str, device_type: str) -> Workload:
        """Every cube is visible, nothing is predicted; the heads' activations are small beside a block's."""
        waiting, graph = device_type != "cpu", self.config.engine == "graph"
        return Workload(
            size_of(self.config.model.size),
            self.input,
            Counts(visible=self.input.num_cubes, masked=0, decoded=0, predicted=0),
            0,
            num_parameters,
            self.config.model.recompute,
            bytes_each=4 if precision == "float32" else 2,
            inputs_held=1 + waiting + graph,
            averages=True,
        )

    def objective(self, model: nn.Module, precision: str) -> ContrastObjective:
        assert isinstance(model, Contrasted)
        momentum = self._momentum_of(model)
        self._seen = self._seen.to(model.positions.device)
        return ContrastObjective(model, momentum, self.config.contrast.temperature, self._seen, PRECISIONS[precision])

    def _momentum_of(self, model: Contrasted) -> MomentumEncoder:
        if self._momentum is None:
            self._momentum = momentum_encoder_of(model)
            set_attention(self._momentum, self.config.attention)
        return self._momentum

    def reader(self) -> ContrastReader:
        config = self.config
        return ContrastReader(
            config.model.frames,
            config.model.input.size,
            config.sampling.stride,
            Augment(),
            config.seed,
            views=VIEWS,
            windows=config.data.windows,
            decoder=config.data.decoder,
            contrast=config.augment,
        )

    def describe(self, run: Run) -> list[str]:
        config, model = self.config, self.config.model
        millions = sum(p.numel() for p in run.model.parameters()) / 1e6
        height, width = model.input.size
        windows = "frames of its own" if config.data.windows > 1 else "the same frames"
        return [
            f"model     {model.size}, heads {model.hidden} and {model.width} wide: {millions:.1f} M parameters, and a "
            "second one for the keys",
            f"clip      {model.frames} x {height} x {width}, stride {config.sampling.stride}; all "
            f"{model.input.num_cubes} cubes; each of a video's two views has {windows}",
            f"contrast  {self._contrasted} videos at a time, {self._contrasted - 1} negatives; temperature "
            f"{config.contrast.temperature:g}, momentum {config.contrast.momentum:g} to 1",
            *self.describe_probe(),
        ]

    # -- in the loop

    def inputs(self, run: Run, batch: OnDevice, step: int) -> dict[str, Tensor]:
        return {"frames": batch.frames}

    def after_update(self, run: Run, done: int) -> None:
        assert self._momentum is not None
        assert isinstance(run.model, Contrasted)
        follow(self._momentum, run.model, momentum_at(done - 1, run.schedule.steps, self.config.contrast.momentum))

    def after_step(self, run: Run, log: RunLog, done: int) -> None:
        if done % self.config.log.every == 0 or done == run.schedule.steps:
            self._report(log, done)
        super().after_step(run, log, done)

    def _report(self, log: RunLog, done: int) -> None:
        """How views were told apart since the last report, in the first process."""
        *sums, count = self._seen.tolist()
        self._seen.zero_()
        if count == 0:
            return
        found, queries, features = (value / count for value in sums)
        log.evaluated(done, {"contrast_top1": 100 * found, "query_spread": queries, "feature_spread": features})
        chance = 100 / self._contrasted
        log.say(
            f"contrast to step {done}: {100 * found:.1f} % of the views find their video (chance {chance:.1f} %), "
            f"spread of queries {queries:.2f}, of features {features:.2f}"
        )
        if features < _COLLAPSED and not self._collapsed:
            log.say("warning: all features point the same way: a collapse; try a lower --optim.base-lr")
        self._collapsed = features < _COLLAPSED

    def extra_state(self) -> dict[str, Any]:
        return {"contrasted": self._contrasted}

    def load_extra_state(self, checkpoint: Path, state: dict[str, Any], model: nn.Module) -> None:
        assert isinstance(model, Contrasted)
        before, now = state["contrasted"], self._contrasted
        if before != now:
            text = f"that run told {before} videos apart at a time, this one would {now}"
            check(self.config.resume != "auto", f"{text}: another --micro-batch, or another --out")
            print(f"note: {text}", file=sys.stderr)
        load_weights(self._momentum_of(model), checkpoint / _MOMENTUM)

    def extra_weights(self) -> dict[str, nn.Module]:
        assert self._momentum is not None
        return {_MOMENTUM: self._momentum}

    def results(self, run: Run, checkpoint: Path) -> list[str]:
        recipe = self.config.recipe if self.config.recipe in FINETUNE else "RECIPE"
        words = [recipe, *([] if recipe == "demo" else ["--data", "LABELLED"]), "--weights", str(run.out)]
        return [f"fine-tune       {shlex.join(['python', '-m', 'train.finetune', *words])}"]


if __name__ == "__main__":
    run_main(main)
