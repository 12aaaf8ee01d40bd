"""Pre-train a VideoMAE: `python -m train.pretrain [RECIPE] [--data PATH] [--section.field VALUE]`.

What it adds to the loop of train/loop.py, and to train/unlabelled.py: masks, the pixel loss, reconstruction pictures.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from train.finetune_recipes import FINETUNE
from train.inference import find_weights
from train.log import RunLog, goes_on
from train.loop import command
from train.memory import Workload
from train.objective import PretrainObjective
from train.optim import PRECISIONS
from train.picture import draw_reconstruction, reconstruct
from train.plan import workload
from train.recipes import PRETRAIN, PretrainConfig, build
from train.run import Run
from train.unlabelled import UnlabelledVerb
from videomae.command_line import run_main
from videomae.data.dataset import Order, Sample
from videomae.data.feed import OnDevice
from videomae.data.readers import ClipReader
from videomae.data.sampling import Sampling
from videomae.model import VideoMAE, size_of
from videomae.weight_files import write_atomically
from videomae.weights import load_weights

_PREVIEWS = 3  # clips in the reconstruction picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `train.loop.command`."""
    about = "Pre-train a VideoMAE on videos; with no argument, the demo."
    return command(Pretraining, PRETRAIN, arguments, prog="python -m train.pretrain", about=about)


class Pretraining(UnlabelledVerb[PretrainConfig]):
    """One pre-training run."""

    name = "pretrain"
    _preview: tuple[Tensor, Tensor] | None = None  # frames and mask keys of the picture's clips, on the host
    _report: Sequence[str] = ()  # of the weights that it starts from

    @property
    def recipes(self) -> Mapping[str, Callable[[], PretrainConfig]]:
        return PRETRAIN

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
        model.normalized = self.config.target.normalize
        return model

    def initialize(self, model: nn.Module) -> None:
        if self.config.weights is not None:
            self._report = str(load_weights(model, find_weights(self.config.weights))).splitlines()

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
            error=config.target.loss,
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
            *(f"weights   {line.strip()}" for line in self._report),
            f"clip      {model.frames} x {height} x {width}, stride {config.sampling.stride}; {hides}",
            *self.describe_probe(),
        ]

    def first(self, run: Run) -> list[Sample]:
        views = self.config.data.views_per_decode
        order = Order(len(run.videos), self.config.seed, views)
        return [order.samples(i * views, 1)[0] for i in range(min(_PREVIEWS, len(run.videos)))]

    def keep(self, batch: OnDevice) -> None:
        readable = batch.weight > 0
        self._preview = batch.frames[readable].cpu(), batch.keys[readable].cpu()

    def inputs(self, run: Run, batch: OnDevice, step: int) -> dict[str, Tensor]:
        return {"frames": batch.frames, "keys": batch.keys}

    def looks_after(self, run: Run, done: int) -> bool:
        return self._pictures_after(run, done) or super().looks_after(run, done)

    def _pictures_after(self, run: Run, done: int) -> bool:
        return done % self.config.log.picture_every == 0 or done == run.schedule.steps

    def after_step(self, run: Run, log: RunLog, done: int) -> None:
        if self._pictures_after(run, done):
            with log.pause():
                self._picture(run, done)
        super().after_step(run, log, done)

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
        with goes_on("a picture in samples/"):
            write_atomically(run.out / "samples" / f"step_{done:07d}.png", lambda file: sheet.save(file, "PNG"))

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
    run_main(main)
