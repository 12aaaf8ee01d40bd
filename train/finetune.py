"""Fine-tune a classifier: `python -m train.finetune [RECIPE] --data PATH [--weights W] [--section.field VALUE]`.

What fine-tuning adds to the loop of train/loop.py: labels, where the weights come from, augmentation on the device
(mixup, CutMix, erasing), an average of the weights, and validation.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kernels.launch import check
from train.finetune_recipes import FINETUNE, FinetuneConfig
from train.inference import find_weights
from train.log import RunLog
from train.loop import command
from train.memory import Workload
from train.objective import ClassifyObjective
from train.optim import PRECISIONS
from train.plan import finetune_workload
from train.run import Run, check_reader, demo_list, warn_of, warn_of_flips
from train.validated import ValidatedVerb
from train.validation import validate
from train.verb import counts_of_tokens, to_device
from videomae.classifier import Classifier, classifier
from videomae.data import storage
from videomae.data.dataset import VideoList
from videomae.data.feed import OnDevice
from videomae.data.labelled import LabelledVideos, find_labelled
from videomae.data.mix import cut, draw_erasing, draw_mix, erase, normalize
from videomae.data.readers import LabelledClipReader, ViewReader
from videomae.keys import key
from videomae.model import Input, size_of
from videomae.weights import load_weights

_EMA = "ema.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `train.loop.command`."""
    about = "Fine-tune a video classifier, from pre-trained weights or from nothing; with no argument, on the demo."
    return command(Finetuning, FINETUNE, arguments, prog="python -m train.finetune", about=about)


class Finetuning(ValidatedVerb[FinetuneConfig]):
    """One fine-tuning run."""

    name = "finetune"
    measure = "val_top1"

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.together = config.mix.group_of(config.data.views_per_decode) if config.mix.mixes else 1
        self._train: LabelledVideos | None = None
        self._val: LabelledVideos | None = None
        self._labels = torch.empty(0, dtype=torch.int64)
        self._report: list[str] = []  # on where the weights came from
        self._average: AveragedModel | None = None

    @property
    def recipes(self) -> Mapping[str, Callable[[], FinetuneConfig]]:
        return FINETUNE

    @property
    def input(self) -> Input:
        return replace(self.config.model.input, sampling=self.config.sampling)

    @property
    def recompute(self) -> str:
        return self.config.model.recompute

    @property
    def train_set(self) -> LabelledVideos:
        assert self._train is not None
        return self._train

    # -- before the first step

    def find_videos(self) -> VideoList:
        data, is_demo = self.config.data, self.config.data.path is None
        check(not is_demo or self.config.recipe == "demo", f"recipe {self.config.recipe} needs --data: labelled videos")
        source = str(demo_list().parent) if data.path is None else data.path
        storage.configure(data.cache_of(source))
        self._train = find_labelled(source, "train")
        warn_of(self._train.videos)
        check_reader(data, self._train.videos)
        self._check_step(self._train.videos, source)
        if self.config.validate_every:
            self._val = self._find_val(source)
        self._labels = torch.tensor(self._train.labels)
        warn_of_flips(self._train.classes, self.config.augment.flip)
        return self._train.videos

    def _check_step(self, videos: VideoList, source: str) -> None:
        check(
            videos.step == 1 or self.config.data.allow_nearest,
            f"{source} holds frames 0, {videos.step}, {2 * videos.step}, ... only, and fine-tuning takes others: "
            "prepare it with all phases, or give --allow-nearest, which is noted with every result",
        )

    def _find_val(self, source: str) -> LabelledVideos | None:
        """The validation set; None, and a note, where there is none beside the training set."""
        if self.config.data.val is not None:
            found = find_labelled(self.config.data.val, "val", like=self.train_set)
        else:
            try:
                found = find_labelled(source, "val", like=self.train_set)
            except ValueError as error:
                print(f"note: no validation, which --data.val may give: {error}", file=sys.stderr)
                return None
        warn_of(found.videos)
        self._check_step(found.videos, self.config.data.val or source)
        return found

    def sequences(self) -> dict[str, tuple[int, int]]:
        size = size_of(self.config.model.size)
        return {"encoder": counts_of_tokens(self.input, size.width, size.heads)}

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

    def initialize(self, model: nn.Module) -> None:
        if self.config.weights is None:
            self._report = ["from nothing: --weights W starts from pre-training"]
            return
        report = load_weights(model, find_weights(self.config.weights), positions=self.config.positions)
        self._report = str(report).splitlines()

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

    def fingerprint(self, videos: VideoList) -> str:
        return self.train_set.fingerprint

    def describe(self, run: Run) -> list[str]:
        config, model = self.config, self.config.model
        height, width = self.input.size
        millions = sum(p.numel() for p in run.model.parameters()) / 1e6
        sampling = (
            f"stride {config.sampling.stride}" if config.sampling.kind == "dense" else "one of each part of the video"
        )
        val = f"{len(self._val):,} videos" if self._val else "none"
        flip = "half of the clips mirrored" if config.augment.flip else "no flip"
        return [
            f"classes   {len(self.train_set.classes)}; validation {val}",
            f"model     {model.size}: {millions:.1f} M parameters",
            *(f"weights   {line.strip()}" for line in self._report),
            f"clip      {model.frames} x {height} x {width}, {sampling}; {flip}",
        ]

    def facts(self) -> dict[str, Any]:
        return {"classes": list(self.train_set.classes), "weights": self._report}

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
        if self._average is not None:
            self._average.update_parameters(run.model)

    @property
    def validate_every(self) -> float:
        return self.config.validate_every if self._val is not None else 0

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
        config, data = self.config, self.config.data
        # the demo's protocol has the demo's stride
        as_demo = config.recipe == "demo" and config.sampling == FINETUNE["demo"]().sampling
        words = ["demo"] if as_demo else []
        words += ["--weights", str(out if self._average is None else checkpoint / _EMA)]
        if data.path is not None:
            beside = self._val is not None or (not config.validate_every and Path(data.path).expanduser().is_dir())
            words += ["--data", data.val or (data.path if beside else "TEST")]
        words += ["--allow-nearest"] if data.allow_nearest else []
        return shlex.join(["python", "-m", "train.evaluate", *words])


if __name__ == "__main__":
    raise SystemExit(main())
