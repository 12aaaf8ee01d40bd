"""Fine-tune a classifier: `python -m train.finetune [RECIPE] --data PATH [--weights W] [--section.field VALUE]`.

What fine-tuning adds to the loop of train/loop.py: labels, where the weights come from, augmentation on the device
(mixup, CutMix, erasing), an average of the weights, and validation.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kernels.launch import check
from train.finetune_recipes import FINETUNE, FinetuneConfig
from train.log import RunLog
from train.loop import command
from train.memory import Workload
from train.objective import ClassifyObjective
from train.optim import PRECISIONS
from train.plan import finetune_workload
from train.run import Run, demo_list
from train.tuned import TunedVerb
from train.validation import validate
from train.verb import to_device
from videomae.classifier import Classifier, classifier
from videomae.command_line import run_main
from videomae.data.dataset import VideoList
from videomae.data.feed import OnDevice
from videomae.data.labelled import LabelledVideos, find_labelled
from videomae.data.mix import cut, draw_erasing, draw_mix, erase, normalize
from videomae.data.readers import LabelledClipReader, ViewReader
from videomae.keys import key
from videomae.model import Input
from videomae.weights import load_weights
from videomae.wording import counted

_EMA = "ema.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `train.loop.command`."""
    about = "Fine-tune a video classifier, from pre-trained weights or from nothing; with no argument, on the demo."
    return command(Finetuning, FINETUNE, arguments, prog="python -m train.finetune", about=about)


class Finetuning(TunedVerb[FinetuneConfig, LabelledVideos]):
    """One fine-tuning run."""

    name = "finetune"
    measure = "val_top1"

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.together = config.mix.group_of(config.data.views_per_decode) if config.mix.mixes else 1
        self._labels = torch.empty(0, dtype=torch.int64)
        self._average: AveragedModel | None = None

    @property
    def recipes(self) -> Mapping[str, Callable[[], FinetuneConfig]]:
        return FINETUNE

    @property
    def input(self) -> Input:
        return replace(self.config.model.input, sampling=self.config.sampling)

    # -- before the first step

    def source(self) -> str:
        data, is_demo = self.config.data, self.config.data.path is None
        check(not is_demo or self.config.recipe == "demo", f"recipe {self.config.recipe} needs --data: labelled videos")
        return str(demo_list().parent) if data.path is None else data.path

    def find(self, source: str, split: str, like: LabelledVideos | None = None) -> LabelledVideos:
        return find_labelled(source, split, like=like, root=self.config.data.root)

    def check_set(self, found: LabelledVideos, source: str) -> None:
        step = found.videos.step
        check(
            step == 1 or self.config.data.allow_nearest,
            f"{source} holds frames 0, {step}, {2 * step}, ... only, and fine-tuning takes others: "
            "prepare it with all phases, or give --allow-nearest, which is noted with every result",
        )

    def find_videos(self) -> VideoList:
        config = self.config
        check(config.ema is None or config.parallel == "ddp", "--ema averages whole weights: --parallel ddp")
        videos = super().find_videos()
        self._labels = torch.tensor(self.train_set.labels)
        return videos

    def build(self) -> Classifier:
        model = self.config.model
        made = classifier(
            model.size,
            num_classes=len(self.train_set.classes),
            frames=model.frames,
            image_size=model.image_size,
            cube=model.cube,
            drop_path=model.drop_path,
            head_dropout=model.head_dropout,
            init_scale=model.init_scale,
        )
        made.input, made.classes = self.input, self.train_set.classes
        made.blocks.recompute = model.recompute
        return made

    def workload(self, num_parameters: int, precision: str, device_type: str) -> Workload:
        return finetune_workload(self.config, num_parameters, precision, device_type)

    def objective(self, model: nn.Module, precision: str) -> ClassifyObjective:
        assert isinstance(model, Classifier)
        self._begin_average(model)
        return ClassifyObjective(model, self.config.smoothing, PRECISIONS[precision])

    def reader(self) -> LabelledClipReader:
        config = self.config
        return LabelledClipReader(
            config.model.frames,
            self.input.size,
            config.sampling,
            config.seed,
            config.rand_augment if config.rand_augment.ops else None,
            area=config.augment.area,
            aspect=config.augment.aspect,
            flip=config.augment.flip,
            nearest=config.data.allow_nearest,
            decoder=config.data.decoder,
        )

    def describe(self, run: Run) -> list[str]:
        config = self.config
        sampling = (
            f"stride {config.sampling.stride}" if config.sampling.kind == "dense" else "one of each part of the video"
        )
        val = counted(len(self._val), "video") if self._val else "none"
        return [
            f"classes   {len(self.train_set.classes)}; validation {val}",
            *self.describe_model(run.model, sampling),
        ]

    # -- in the loop

    def inputs(self, run: Run, batch: OnDevice, step: int) -> dict[str, Tensor]:
        config, host = self.config, batch.batch
        # drop path and dropout: the same whatever the run did before
        torch.manual_seed(key(config.seed, step, int(host.keys[0])))
        labels = to_device(self._labels[[sample.index for sample in host.samples]], run.device)
        keys = host.keys.tolist()
        frames = batch.frames
        if config.erasing.probability > 0:
            # the model's own constants, which may be the weights'
            assert isinstance(run.model, Classifier)
            frames = normalize(frames, run.model.input.mean, run.model.input.std)
            boxes = [draw_erasing(config.erasing, each, self.input.size) for each in keys]
            erase(frames, boxes, keys)
        inputs = {"frames": frames, "labels": labels}
        if self.together > 1:
            present = (host.weight > 0).tolist()
            mix, boxes = draw_mix(config.mix, self.together, keys, self.input.size, present)
            mix = mix.to(run.device)
            inputs["frames"] = cut(frames, mix, boxes)
            inputs |= {"lam": mix.lam, "partner": mix.partner, "blend": mix.blend}
        return inputs

    def after_update(self, run: Run, done: int) -> None:
        if self._average is not None and run.world.is_first:
            self._average.update_parameters(run.model)

    def validate(self, run: Run, log: RunLog, done: int) -> dict[str, float]:
        assert self._val is not None
        config = self.config
        views = ViewReader(
            config.model.frames,
            self.input.size,
            config.sampling,
            nearest=config.data.allow_nearest,
            decoder=config.data.decoder,
        )
        model = run.model if self._average is None else self._average.module
        source = config.data.val or config.data.path or ""
        values = validate(model, self._val, views, run, source=source, say=log.say)
        log.say(f"validation after step {done}: top-1 {values['val_top1']:.2f}, top-5 {values['val_top5']:.2f}")
        return values

    def _begin_average(self, model: nn.Module) -> None:
        if self.config.ema is not None and self._average is None:
            self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema))

    def extra_state(self) -> dict[str, Any]:
        return {} if self._average is None else {"averaged": int(self._average.n_averaged)}

    def load_extra_state(self, checkpoint: Path, state: dict[str, Any], model: nn.Module) -> None:
        self._begin_average(model)
        if self._average is not None and "averaged" in state:
            load_weights(self._average.module, checkpoint / _EMA)
            self._average.n_averaged.fill_(state["averaged"])

    def extra_weights(self) -> dict[str, nn.Module]:
        return {} if self._average is None else {_EMA: self._average.module}

    def results(self, run: Run, checkpoint: Path) -> list[str]:
        lines = []
        if found := self.last_and_best(run.out):
            last, best = found
            scores = f"top-1 {last['val_top1']:.2f}, top-5 {last['val_top5']:.2f}"
            lines.append(f"validation      {scores} (best top-1 {best['val_top1']:.2f}, step {best['step']})")
        return [*lines, f"evaluate        {self._test_command(run.out, checkpoint)}"]

    def _test_command(self, out: Path, checkpoint: Path) -> str:
        """What tests the weights that were validated, on videos that they were not trained on."""
        config = self.config
        # the demo's protocol has the demo's stride
        as_demo = config.recipe == "demo" and config.sampling == FINETUNE["demo"]().sampling
        words = ["demo"] if as_demo else []
        words += ["--weights", str(out if self._average is None else checkpoint / _EMA)]
        words += self.to_test()
        words += ["--allow-nearest"] if config.data.allow_nearest else []
        return shlex.join(["python", "-m", "train.evaluate", *words])


if __name__ == "__main__":
    run_main(main)
