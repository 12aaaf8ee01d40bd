"""Pre-train a VideoMAE: `python -m train.pretrain [RECIPE] [--data PATH] [--section.field VALUE]`.

What pre-training adds to the loop of train/loop.py: masks, the pixel loss, reconstruction pictures, and the probe that
tells whether something is learned.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.launch import check
from train.finetune_recipes import FINETUNE
from train.inference import Reading
from train.log import RunLog
from train.loop import command
from train.memory import Workload
from train.objective import PretrainObjective
from train.optim import PRECISIONS
from train.picture import draw_reconstruction, reconstruct
from train.plan import workload
from train.probing import OnlineProbe
from train.recipes import PRETRAIN, PretrainConfig, build
from train.run import Run, check_reader, demo_list, demo_scenes, warn_of
from train.verb import Verb
from videomae.data import storage
from videomae.data.dataset import Order, Sample, VideoList, find_videos
from videomae.data.feed import OnDevice
from videomae.data.readers import ClipReader
from videomae.data.sampling import Sampling
from videomae.model import Input, VideoMAE, size_of

_PREVIEWS = 3  # clips in the reconstruction picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `train.loop.command`."""
    about = "Pre-train a VideoMAE on videos; with no argument, the demo."
    return command(Pretraining, PRETRAIN, arguments, prog="python -m train.pretrain", about=about)


class Pretraining(Verb[PretrainConfig]):
    """One pre-training run."""

    name = "pretrain"
    _probe: OnlineProbe | None = None
    _preview: tuple[Tensor, Tensor] | None = None  # frames and mask keys of the picture's clips, on the host

    @property
    def recipes(self) -> Mapping[str, Callable[[], PretrainConfig]]:
        return PRETRAIN

    @property
    def input(self) -> Input:
        return self.config.model.input

    @property
    def recompute(self) -> str:
        return self.config.model.recompute

    def find_videos(self) -> VideoList:
        data, stride = self.config.data, self.config.sampling.stride
        if data.path is None:
            rendered = {"demo": demo_list, "demo-scenes": lambda: demo_scenes() / "train"}
            recipe = self.config.recipe
            check(recipe in rendered, f"recipe {recipe} needs --data: a folder of videos, or a list file")
            return find_videos(rendered[recipe]())
        storage.configure(data.cache_of(data.path))
        videos = find_videos(data.path)
        warn_of(videos)
        check(
            stride % videos.step == 0,
            f"{data.path} holds frames 0, {videos.step}, {2 * videos.step}, ... only: --sampling.stride must be a "
            f"multiple of {videos.step}, not {stride}",
        )
        check_reader(data, videos)
        return videos

    def sequences(self) -> dict[str, tuple[int, int]]:
        size, counts = size_of(self.config.model.size), self.config.counts
        return {
            "encoder": (counts.visible, size.width // size.heads),
            "decoder": (counts.visible + counts.decoded, size.decoder_width // size.decoder_heads),
        }

    def build(self) -> VideoMAE:
        model = build(self.config.model)
        # which frames the weights have seen, for whoever uses them
        model.input = replace(model.input, sampling=Sampling("dense", self.config.sampling.stride))
        model.encoder.input = model.input
        return model

    def initialize(self, model: nn.Module) -> None: ...

    def workload(self, num_parameters: int, precision: str, device_type: str) -> Workload:
        return workload(self.config, num_parameters, precision, device_type)

    def objective(self, model: nn.Module, precision: str) -> PretrainObjective:
        config = self.config
        assert isinstance(model, VideoMAE)
        return PretrainObjective(
            model,
            mask_kind=config.mask.kind,
            mask_ratio=config.mask.ratio,
            decoder_mask=config.decoder_mask,
            decoder_ratio=config.decoder_ratio,
            normalize=config.target.normalize,
            autocast=PRECISIONS[precision],
        )

    def reader(self) -> ClipReader:
        config = self.config
        return ClipReader(
            config.model.frames,
            config.model.input.size,
            config.sampling.stride,
            config.augment,
            config.seed,
            views=config.data.views_per_decode,
            windows=config.data.windows,
            decoder=config.data.decoder,
        )

    def ready(self, run: Run) -> None:
        config = self.config
        if config.probe.data is None:
            return
        storage.configure(config.data.cache_of(config.probe.data))
        self._probe = OnlineProbe(
            config.probe,
            self.input,
            Sampling("dense", config.sampling.stride),
            seed=config.seed,
            reading=Reading(run.workers, config.loader, config.data.cache_of(config.probe.data)),
            decoder=config.data.decoder,
            say=lambda text: print(text, file=sys.stderr),
        )

    def describe(self, run: Run) -> list[str]:
        config, model = self.config, self.config.model
        millions = sum(p.numel() for p in run.model.parameters()) / 1e6
        height, width = model.input.size
        counts = config.counts
        hides = f"{config.mask.kind} mask hides {counts.masked} of {model.input.num_cubes} cubes"
        if config.decoder_mask != "none":
            hides += f"; {config.decoder_mask} leaves {counts.predicted} of them to predict"
        return [
            f"model     {model.size}, decoder depth {model.decoder_depth}: {millions:.1f} M parameters",
            f"clip      {model.frames} x {height} x {width}, stride {config.sampling.stride}; {hides}",
            *self._describe_probe(),
        ]

    def _describe_probe(self) -> list[str]:
        if self._probe is None:
            return []
        train, test = self._probe.counts
        return [f"probe     every {self.config.probe.every} steps, {train:,} labelled clips tell {test:,} others apart"]

    def first(self, run: Run) -> list[Sample]:
        views = self.config.data.views_per_decode
        order = Order(len(run.videos), self.config.seed, views)
        return [order.samples(i * views, 1)[0] for i in range(min(_PREVIEWS, len(run.videos)))]

    def keep(self, batch: OnDevice) -> None:
        readable = batch.weight > 0
        self._preview = batch.frames[readable].cpu(), batch.keys[readable].cpu()

    def begin(self, run: Run, log: RunLog) -> None:
        if run.start == 0:
            self._look(run, log, 0)

    def inputs(self, run: Run, batch: OnDevice, step: int) -> dict[str, Tensor]:
        return {"frames": batch.frames, "keys": batch.keys}

    def looks_after(self, run: Run, done: int) -> bool:
        return self._pictures_after(run, done) or self._probes_after(run, done)

    def _pictures_after(self, run: Run, done: int) -> bool:
        return done % self.config.log.picture_every == 0 or done == run.schedule.steps

    def _probes_after(self, run: Run, done: int) -> bool:
        return done % self.config.probe.every == 0 or done == run.schedule.steps

    def after_step(self, run: Run, log: RunLog, done: int) -> None:
        if self._pictures_after(run, done):
            with log.pause():
                self._picture(run, done)
        if self._probes_after(run, done):
            self._look(run, log, done)

    def _look(self, run: Run, log: RunLog, done: int) -> None:
        """What the features are worth after so many steps, where the user wants to know."""
        if self._probe is None:
            return
        assert isinstance(run.model, VideoMAE)
        with log.pause():
            found = self._probe.probe(run.model, PRECISIONS[run.precision])
            log.evaluated(done, found)
        text = ", ".join(f"{name.removeprefix('probe_')} {value:.1f} %" for name, value in found.items())
        log.say(f"probe after step {done}: {text}")

    @torch.no_grad()
    def _picture(self, run: Run, done: int) -> None:
        assert self._preview is not None
        frames, keys = self._preview
        if len(frames) == 0:
            return
        config, objective = self.config, run.objective
        assert isinstance(objective, PretrainObjective)
        mask = objective.mask(keys)
        run.model.eval()
        pred = objective.predict(frames.to(run.device), mask.to(run.device)).cpu()
        run.model.train()
        made = reconstruct(pred, frames, mask, self.input, normalized=config.target.normalize)
        ratio = mask.masked.shape[1] / mask.num_cubes
        title = f"{config.recipe}, step {done}: clips of the training set, {config.mask.kind} mask"
        sheet = draw_reconstruction(made, self.input, ratio, normalized=config.target.normalize, title=title)
        (run.out / "samples").mkdir(exist_ok=True)
        sheet.save(run.out / "samples" / f"step_{done:07d}.png")

    def results(self, run: Run, checkpoint: Path) -> list[str]:
        pictures = sorted((run.out / "samples").glob("*.png"))
        lines = [f"reconstruction  {pictures[-1]}"] if pictures else []
        if self.config.recipe == "demo-scenes":
            return [
                *lines,
                f"detect          {shlex.join(['python', '-m', 'train.detect', '--weights', str(run.out)])}",
            ]
        recipe = self.config.recipe if self.config.recipe in FINETUNE else "RECIPE"
        words = [recipe, *([] if recipe == "demo" else ["--data", "LABELLED"]), "--weights", str(run.out)]
        return [*lines, f"fine-tune       {shlex.join(['python', '-m', 'train.finetune', *words])}"]


if __name__ == "__main__":
    raise SystemExit(main())
