"""One fine-tuning step of both sides on a CPU: this project by the command's own parts, `transformers` by its users'
loop.

Ours begins with the loader's uint8 frames: what `Finetuning.inputs` makes of them, loss, backward and the updater, with
layer decay. Theirs begins with the same frames: image processor, model, backward, torch's fused AdamW.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.shapes import Shape
from bench.steps import RATE, clips_and_keys
from train.engine import make_engine
from train.finetune import Finetuning
from train.finetune_recipes import FINETUNE, FinetuneConfig, FinetuneData
from train.run import Run, prepare
from videomae.blocks import NORM_EPS
from videomae.classifier import Classifier
from videomae.data.dataset import Sample
from videomae.data.feed import OnDevice
from videomae.data.loader import Batch
from videomae.data.mix import Erasing, Mixing
from videomae.hugging_face import from_official, preprocessor_of

RECIPE = "k400-small-1600"
# past the warm-up, whose first rate is 0
_FIRST, _STEPS = 100, 1000


class Step(NamedTuple):
    """run(n) does the n-th step and gives its loss, detached; loss() gives that of the weights as they are."""

    run: Callable[[int], Tensor]
    loss: Callable[[], Tensor]
    model: Any


def recipe(shape: Shape, classes: int, folder: Path) -> FinetuneConfig:
    """The recipe for a batch of that shape, one view of each video: two would need groups of four clips. The head's
    first weights are not scaled down, so that losses depend on the clips."""
    config = FINETUNE[RECIPE]()
    folder.mkdir(parents=True, exist_ok=True)
    labels = _labels(shape, classes).tolist()
    (folder / "train.csv").write_text("".join(f"{i}.mp4 {label}\n" for i, label in enumerate(labels)))
    (folder / "classes.txt").write_text("".join(f"class {label}\n" for label in range(classes)))
    model = replace(config.model, size=shape.size, frames=shape.frames, image_size=shape.side, init_scale=1.0)
    return replace(
        config,
        data=FinetuneData(str(folder / "train.csv")),
        out=str(folder / "run"),
        model=model,
        batch_size=shape.clips,
        micro_batch=shape.clips,
        steps=_STEPS,
        validate_every=0,
        device="cpu",
        precision="float32",
        workers=0,
    )


def plain(config: FinetuneConfig) -> FinetuneConfig:
    """Without anything drawn, and the loss as `transformers` has it."""
    return replace(
        config,
        mix=Mixing(probability=0.0),
        erasing=Erasing(probability=0.0),
        model=replace(config.model, drop_path=0.0),
        smoothing=0.0,
    )


def our_step(config: FinetuneConfig, shape: Shape, weights: Classifier | None = None) -> Step:
    """What the command runs for every batch."""
    run = _prepared(config, weights)
    engine = make_engine(config.engine, run.objective, run.updater)
    frames = clips_and_keys(shape)[0]

    def step(n: int) -> Tensor:
        engine.micro_batch(run.verb.inputs(run, _fed(frames, n), n), 1.0)
        return engine.update(_FIRST + n)[0]

    def loss() -> Tensor:
        with torch.no_grad():
            return run.objective(**run.verb.inputs(run, _fed(frames, 0), 0))

    return Step(step, loss, run.model)


def our_step_on_tensors(config: FinetuneConfig, shape: Shape, weights: Classifier) -> Step:
    """Model and updater alone, on normalised float frames that are there: [B, T, H, W, 3]."""
    run = _prepared(config, weights)
    engine = make_engine(config.engine, run.objective, run.updater)
    frames = processor_of(shape)(clips_and_keys(shape)[0]).permute(0, 1, 3, 4, 2).contiguous()
    inputs = {"frames": frames, "labels": _labels(shape, len(run.verb.train_set.classes))}

    def step(n: int) -> Tensor:
        engine.micro_batch(inputs, 1.0)
        return engine.update(_FIRST + n)[0]

    def loss() -> Tensor:
        with torch.no_grad():
            return run.objective(**inputs)

    return Step(step, loss, run.model)


class TheirStep:
    """`transformers`' VideoMAEForVideoClassification with torch's scaled_dot_product_attention; needs transformers.

    processing: seconds that the image processor took in the last step, a part of it.
    """

    processing = 0.0

    def __init__(self, shape: Shape, weights: Classifier) -> None:
        self.model = _theirs(weights)
        self._frames = clips_and_keys(shape)[0]
        self._labels = _labels(shape, weights.head.out_features)
        self._processor = processor_of(shape)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.05, fused=True)

    def run(self, n: int) -> Tensor:
        begin = time.perf_counter()
        video = self._processor(self._frames)
        self.processing = time.perf_counter() - begin
        loss = self.model(pixel_values=video, labels=self._labels).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def loss(self) -> Tensor:
        with torch.no_grad():
            return self.model(pixel_values=self._processor(self._frames), labels=self._labels).loss


def processor_of(shape: Shape) -> Callable[[Tensor], Tensor]:
    """Their image processor, of frames that have the model's size: float32 [B, T, 3, H, W] of uint8 [B, T, H, W, 3]."""
    import transformers

    # the other one needs torchvision, which does not import beside a CPU build of torch
    own = preprocessor_of(FINETUNE[RECIPE]().model.input)
    kind = own.pop("image_processor_type") + "Pil"
    processor = getattr(transformers, kind)(**{**own, "do_resize": False, "do_center_crop": False})

    def process(frames: Tensor) -> Tensor:
        return processor([list(clip) for clip in frames.numpy()], return_tensors="pt")["pixel_values"]

    return process


def _prepared(config: FinetuneConfig, weights: Classifier | None) -> Run:
    run, _ = prepare(Finetuning(config))
    if weights is not None:
        run.model.load_state_dict(weights.state_dict())
    run.model.train()
    return run


def _fed(frames: Tensor, n: int) -> OnDevice:
    """The n-th step's batch: the same frames, with keys of its own, from which all is drawn."""
    clips = len(frames)
    keys, weight = torch.arange(clips) + n * clips, torch.ones(clips)
    samples = tuple(Sample(n, i, 0) for i in range(clips))
    return OnDevice(Batch(frames, weight, keys, samples, ()), frames, weight, keys, lambda: 0.0)


def _labels(shape: Shape, classes: int) -> Tensor:
    return torch.arange(shape.clips) * 7 % classes


def _theirs(ours: Classifier) -> Any:
    import transformers

    size, input = ours.size, ours.input
    config = transformers.VideoMAEConfig(
        image_size=input.size[0],
        num_frames=input.frames,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        use_mean_pooling=True,
        layer_norm_eps=NORM_EPS,
        num_labels=ours.head.out_features,
        attn_implementation="sdpa",
    )
    model = transformers.VideoMAEForVideoClassification(config)
    model.fc_norm.eps = NORM_EPS  # which the config does not reach
    model.load_state_dict(from_official(ours.state_dict()))
    return model.train()
