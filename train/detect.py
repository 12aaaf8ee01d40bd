"""Train a detector of actions, or test one: `python -m train.detect [RECIPE] --data PATH [--weights W] [--evaluate]`.

What detection adds to the loop of train/loop.py: key frames and their boxes, which follow the clip through crop and
flip, and frame mAP on the validation set.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from train.cli import parse
from train.detect_evaluation import evaluate, find_set, flags_of_test, said, source_of
from train.detect_recipes import DETECT, DetectConfig
from train.detection import Detections, NotFinite, inference_of, padded_boxes, score_boxes
from train.inference import Reading
from train.log import RunLog
from train.loop import command
from train.memory import Workload
from train.objective import DetectObjective
from train.optim import PRECISIONS
from train.plan import detect_workload
from train.run import Run
from train.tuned import TunedVerb
from train.verb import to_device
from videomae.command_line import run_main
from videomae.data.boxes import jittered
from videomae.data.dataset import AUGMENT, BOXES, NoSplit, Sample, VideoList
from videomae.data.feed import OnDevice
from videomae.data.key_frame_reader import KeyFrameReader, boxes_in_view, training_view
from videomae.data.key_frames import KeyFrames
from videomae.detector import Detector, detector
from videomae.keys import Draws, key
from videomae.model import Input
from videomae.wording import counted

PROG = "python -m train.detect"
_ABOUT = "Train a detector of actions in given boxes; with no argument, on the demo's scenes. --evaluate tests one."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `train.loop.command` and `train.detect_evaluation.evaluate`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(arguments, DETECT, "demo", prog=PROG, about=_ABOUT)
    if config.evaluate:
        return evaluate(config, PROG)
    return command(Detection, DETECT, arguments, prog=PROG, about=_ABOUT)


class Detection(TunedVerb[DetectConfig, KeyFrames]):
    """One detection run."""

    name = "detect"
    unit = "key frames"
    measure = "val_map"

    @property
    def recipes(self) -> Mapping[str, Callable[[], DetectConfig]]:
        return DETECT

    @property
    def input(self) -> Input:
        return self.config.model.input

    # -- before the first step

    def source(self) -> str:
        return source_of(self.config)

    def find(self, source: str, split: str, like: KeyFrames | None = None) -> KeyFrames:
        # a list is every split that it is asked for
        if like is not None and Path(source).expanduser().is_file() and _is_same(source, self.source()):
            raise NoSplit(f"{source} is one list, which is trained on")
        return find_set(self.config, source, split, like=like)

    def find_videos(self) -> VideoList:
        videos = super().find_videos()
        most = self.config.augment.max_boxes
        if left_out := np.maximum(np.diff(self.train_set.table.first) - most, 0).sum():
            print(f"note: {counted(left_out, 'box')} are left out: --augment.max-boxes {most}", file=sys.stderr)
        return videos

    def build(self) -> Detector:
        model = self.config.model
        made = detector(
            model.size,
            num_classes=len(self.train_set.classes),
            frames=model.frames,
            image_size=model.image_size,
            cube=model.cube,
            drop_path=model.drop_path,
            init_scale=model.init_scale,
            aligned=model.aligned,
        )
        made.classes, made.class_ids = self.train_set.classes, self.train_set.class_ids
        made.key_clip = self.config.clip
        made.blocks.recompute = model.recompute
        if model.frozen:
            made.requires_grad_(False)
            made.head.requires_grad_(True)
        return made

    def workload(self, num_parameters: int, precision: str, device_type: str) -> Workload:
        return detect_workload(self.config, num_parameters, precision, device_type)

    def objective(self, model: nn.Module, precision: str) -> DetectObjective:
        assert isinstance(model, Detector)
        return DetectObjective(model, self.config.sum_over, PRECISIONS[precision])

    def reader(self) -> KeyFrameReader:
        config = self.config
        return KeyFrameReader.for_training(
            self.train_set,
            config.clip,
            config.model.frames,
            self.input.size,
            config.seed,
            flip=config.augment.flip,
            colour=config.augment.colour,
            decoder=config.data.decoder,
        )

    def describe(self, run: Run) -> list[str]:
        val = counted(len(self._val), "key frame") if self._val else "none"
        classes = counted(len(self.train_set.classes), "class")
        return [
            f"boxes     {self.train_set.num_boxes:,}, {classes}; validation {val}",
            *self.describe_model(run.model, said(self.config.clip)),
        ]

    # -- in the loop

    def inputs(self, run: Run, batch: OnDevice, step: int) -> dict[str, Tensor]:
        config, host = self.config, batch.batch
        # drop path: the same whatever the run did before
        torch.manual_seed(key(config.seed, step, int(host.keys[0])))
        boxes = [self._boxes(sample) for sample in host.samples]
        # engines that were made for one shape see it always
        most = self._most_boxes if config.engine != "eager" else None
        padded = padded_boxes(boxes, most)
        labels = torch.zeros(*padded.shape[:2], len(self.train_set.classes), dtype=torch.uint8)
        valid = torch.zeros(padded.shape[:2], dtype=torch.bool)
        for row, (sample, own) in enumerate(zip(host.samples, boxes, strict=True)):
            labels[row, : len(own)] = torch.from_numpy(self.train_set.labels_of(sample.index)[: len(own)])
            valid[row, : len(own)] = True
        made = {"boxes": padded, "labels": labels, "valid": valid}
        return {"frames": batch.frames, **{name: to_device(value, run.device) for name, value in made.items()}}

    @property
    def _most_boxes(self) -> int:
        return min(self.config.augment.max_boxes, self.train_set.most_boxes)

    def _boxes(self, sample: Sample) -> np.ndarray:
        """[n, 4], in pixels of the clip as it was read."""
        config, index = self.config, sample.index
        height, width = self.train_set.size_of(index)
        view = training_view(
            *(height, width, config.clip.short_side, self.input.size, config.augment.flip),
            Draws(config.seed, *sample, AUGMENT),
        )
        fractions = self.train_set.boxes_of(index)[: config.augment.max_boxes]
        boxes = boxes_in_view(fractions, height, width, view, self.input.size)
        if not config.augment.jitter:
            return boxes
        return jittered(boxes, *self.input.size, Draws(config.seed, *sample, BOXES))

    def validate(self, run: Run, log: RunLog, done: int) -> dict[str, float]:
        assert self._val is not None
        assert isinstance(run.model, Detector)
        config, was_training = self.config, run.model.training
        inference = inference_of(
            *(run.model, self._val, config.clip.short_side),
            device=run.device.type,
            precision=run.precision,
            attention=config.attention,
        )
        reading = Reading(run.workers, config.loader, run.cache)
        reader = KeyFrameReader.for_test(self._val, config.clip, config.model.frames, decoder=config.data.decoder)
        found, lost = Detections(self._val), 0
        try:
            for scored, skips in score_boxes(inference, self._val, reader, reading=reading, say=log.say):
                found.add(scored)
                lost += len(skips)
                for skip in skips:
                    log.say(f"validation: its boxes count as missed: {skip.path}: {skip.reason}")
            value = 100 * found.measure(iou=config.iou, protocol=config.protocol)["mAP"]
        except NotFinite as error:
            log.say(f"validation: {error}: counted as 0")
            value = 0.0
        run.model.train(was_training)
        log.say(f"validation after step {done}: mAP@{config.iou:g} {value:.2f}")
        return {"val_map": value, "val_unreadable": lost}

    def results(self, run: Run, checkpoint: Path) -> list[str]:
        lines = []
        if found := self.last_and_best(run.out):
            last, best = found
            best_text = f"(best {best['val_map']:.2f}, step {best['step']})"
            lines.append(f"validation      mAP@{self.config.iou:g} {last['val_map']:.2f} {best_text}")
        words = ["python", "-m", "train.detect", self.config.recipe, "--evaluate", "--weights", str(run.out)]
        words += [*self.to_test(), *flags_of_test(self.config)]
        return [*lines, f"evaluate        {shlex.join(words)}"]


def _is_same(source: str, other: str) -> bool:
    return Path(source).expanduser().resolve() == Path(other).expanduser().resolve()


if __name__ == "__main__":
    run_main(main)
