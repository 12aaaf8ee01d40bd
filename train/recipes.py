"""VideoMAE's published pre-training recipes as values (RECIPES D.1 to D.3, not version 2's), and the demo's.

A recipe's docstring gives its command, the hardware it was published with, and the result to expect after fine-tuning.
All follow the official scripts, not the paper where the two differ: no flip (--augment.flip for the paper's Kinetics),
decoder depth 12 for L and H. Batches are videos per step; the learning rate is 256ths of that, by the linear rule.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from kernels.launch import check
from kernels.pixel_loss import Error
from train.checkpoint import Checkpointing
from train.config import Data, Model, RunConfig
from train.log import Logging
from train.optim import Optim
from train.probing import Probing
from videomae import masking
from videomae.blocks import Recompute, set_recompute
from videomae.data.augment import Augment
from videomae.model import VideoMAE, pretrain_model


@dataclass(frozen=True)
class PretrainModel(Model):
    """Which model is trained."""

    decoder_depth: int = 4  # blocks
    # the decoder's last layer works for the cubes it predicts only; off: for all, to compare
    short_last_layer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.decoder_depth >= 1, f"model.decoder-depth must be at least 1; got {self.decoder_depth}")


def build(config: PretrainModel) -> VideoMAE:
    """A fresh model, set as the configuration says."""
    model = pretrain_model(
        config.size,
        frames=config.frames,
        image_size=config.image_size,
        cube=config.cube,
        decoder_depth=config.decoder_depth,
    )
    model.decoder.short_last_layer = config.short_last_layer
    set_recompute(model, config.recompute)
    return model


@dataclass(frozen=True)
class Masking:
    """What is hidden."""

    kind: Literal["tube", "random", "frame"] = "tube"  # tube: a place through all time
    ratio: float = 0.9  # share of the cubes


@dataclass(frozen=True)
class Sampling:
    """Which frames make a clip."""

    stride: int = 4  # frames of the video from one of the clip to the next

    def __post_init__(self) -> None:
        check(self.stride >= 1, f"sampling.stride must be at least 1; got {self.stride}")


@dataclass(frozen=True)
class PretrainData(Data):
    """Where clips come from, and what is made of each decoded one."""

    windows: int = 1  # temporal windows that the views of a video are spread over

    def __post_init__(self) -> None:
        super().__post_init__()
        views, windows = self.views_per_decode, self.windows
        check(
            1 <= windows <= views and views % windows == 0,
            f"data.windows must divide data.views-per-decode, {views}; got {windows}",
        )


@dataclass(frozen=True)
class Target:
    """What the decoder predicts."""

    normalize: bool = True  # pixels of each cube and channel to mean 0, deviation 1; else pixels in [0, 1]
    # of a pixel d off: d^2; |d|; or smooth-l1, d^2 / 2 up to 1 and |d| - 1/2 from there. Published models have mse
    loss: Error = "mse"


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pre-training run."""

    # pre-training to go on from, with a schedule of its own: a run folder, a file, a Hugging Face folder or hub id
    weights: str | None = None
    # V2's dual masking: the decoder too leaves cubes out, decoder-ratio of them
    decoder_mask: Literal["none", "running-cell"] = "none"
    decoder_ratio: float = 0.5  # of the cubes, with a decoder-mask
    data: PretrainData = field(default_factory=PretrainData)
    model: PretrainModel = field(default_factory=PretrainModel)
    mask: Masking = field(default_factory=Masking)
    sampling: Sampling = field(default_factory=Sampling)
    augment: Augment = field(default_factory=Augment)
    target: Target = field(default_factory=Target)
    probe: Probing = field(default_factory=Probing)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.counts

    @property
    def counts(self) -> masking.Counts:
        """How many cubes a mask leaves visible, hides, and so on; ValueError when there is no such mask."""
        grid = self.model.input.grid
        return masking.counts(self.mask.kind, grid, self.mask.ratio, self.decoder_mask, self.decoder_ratio)


def demo() -> PretrainConfig:
    """Tiny model on rendered clips: minutes on a CPU, to see everything work.

    python -m train.pretrain
    Fine-tuned on 504 of the clips, with their labels, it tells their 12 motions apart (results/learns).
    """
    return PretrainConfig(
        recipe="demo",
        steps=1800,
        batch_size=64,
        data=PretrainData(views_per_decode=2),
        model=PretrainModel("vit_mini", frames=8, image_size=32, cube=(2, 8, 8), decoder_depth=2),
        mask=Masking(ratio=0.75),
        sampling=Sampling(stride=1),
        optim=Optim(base_lr=8e-3, min_lr=8e-5),
        log=Logging(every=50, picture_every=600),
        checkpoint=Checkpointing(every=300),
    )


def demo_scenes() -> PretrainConfig:
    """The demo's model on scenes of two objects, 40 x 40 pixels: what `python -m train.detect` starts from.

    python -m train.pretrain demo-scenes
    With a detector's head it tells the motions of 1,200 labelled scenes' objects apart (results/detects).
    """
    whole = demo()
    return replace(
        whole,
        recipe="demo-scenes",
        steps=3000,
        batch_size=32,
        model=replace(whole.model, image_size=40),
        optim=replace(whole.optim, base_lr=1.6e-2, min_lr=1.6e-4),
    )


def tiny() -> PretrainConfig:
    """Tiny model on a handful of real videos: a quarter of an hour on two CPU cores.

    python -m train.pretrain tiny --data FOLDER
    On seven Kinetics-like clips the loss falls below 0.8 (a prediction of zero everywhere scores 1.0).
    """
    return PretrainConfig(
        recipe="tiny",
        steps=2000,
        batch_size=4,
        model=PretrainModel("vit_tiny", image_size=112, decoder_depth=3),
        mask=Masking(ratio=0.75),
        data=PretrainData(views_per_decode=4),
        sampling=Sampling(stride=4),
        augment=Augment(scales=(1,)),
        optim=Optim(base_lr=0.25, min_lr=1e-3),
        log=Logging(every=25, picture_every=500),
        checkpoint=Checkpointing(every=500),
    )


def _published(
    recipe: str,
    size: str,
    epochs: int,
    batch_size: int,
    *,
    stride: int = 4,
    ratio: float = 0.9,
    base_lr: float = 1.5e-4,
    decoder_depth: int = 4,
    recompute: Recompute = "none",
) -> PretrainConfig:
    return PretrainConfig(
        recipe=recipe,
        epochs=epochs,
        batch_size=batch_size,
        model=PretrainModel(size, decoder_depth=decoder_depth, recompute=recompute),
        mask=Masking(ratio=ratio),
        sampling=Sampling(stride=stride),
        optim=Optim(base_lr=base_lr),
    )


def k400_small_1600() -> PretrainConfig:
    """ViT-S on Kinetics-400, 1600 epochs.

    python -m train.pretrain k400-small-1600 --data k400/train.csv
    Published on 32 GPUs of 32 clips; fine-tuned 79.0 top-1, 93.8 top-5.
    """
    return _published("k400-small-1600", "vit_small", 1600, 1024)


def k400_base_800() -> PretrainConfig:
    """ViT-B on Kinetics-400, 800 epochs.

    python -m train.pretrain k400-base-800 --data k400/train.csv
    Published on 64 GPUs of 32 clips, about 27 hours on V100s; fine-tuned 80.0 top-1, 94.4 top-5 (81.0 with repeated
    augmentation).
    """
    return _published("k400-base-800", "vit_base", 800, 2048)


def k400_base_1600() -> PretrainConfig:
    """ViT-B on Kinetics-400, 1600 epochs.

    python -m train.pretrain k400-base-1600 --data k400/train.csv
    Published on 64 GPUs of 32 clips; fine-tuned 81.5 top-1, 95.1 top-5.
    """
    return replace(k400_base_800(), recipe="k400-base-1600", epochs=1600)


def k400_large_1600() -> PretrainConfig:
    """ViT-L on Kinetics-400, 1600 epochs.

    python -m train.pretrain k400-large-1600 --data k400/train.csv
    Published on 64 GPUs of 8 clips; fine-tuned 85.2 top-1, 96.8 top-5.
    """
    return _published("k400-large-1600", "vit_large", 1600, 512, decoder_depth=12)


def k400_huge_1600() -> PretrainConfig:
    """ViT-H on Kinetics-400, 1600 epochs, blocks recomputed.

    python -m train.pretrain k400-huge-1600 --data k400/train.csv
    Published on 64 GPUs of 16 clips; fine-tuned 86.6 top-1, 97.1 top-5.
    """
    return _published("k400-huge-1600", "vit_huge", 1600, 1024, decoder_depth=12, recompute="block")


def ssv2_small_2400() -> PretrainConfig:
    """ViT-S on Something-Something V2, 2400 epochs, stride 2.

    python -m train.pretrain ssv2-small-2400 --data ssv2/train.csv
    Published on 64 GPUs of 32 clips; fine-tuned 66.8 top-1, 90.3 top-5.
    """
    return _published("ssv2-small-2400", "vit_small", 2400, 2048, stride=2)


def ssv2_base_800() -> PretrainConfig:
    """ViT-B on Something-Something V2, 800 epochs, stride 2.

    python -m train.pretrain ssv2-base-800 --data ssv2/train.csv
    Published on 64 GPUs of 32 clips (the paper: 19.5 hours); fine-tuned 69.6 top-1, 92.0 top-5.
    """
    return _published("ssv2-base-800", "vit_base", 800, 2048, stride=2)


def ssv2_base_2400() -> PretrainConfig:
    """ViT-B on Something-Something V2, 2400 epochs, stride 2.

    python -m train.pretrain ssv2-base-2400 --data ssv2/train.csv
    Published on 64 GPUs of 32 clips; fine-tuned 70.8 top-1, 92.4 top-5.
    """
    return replace(ssv2_base_800(), recipe="ssv2-base-2400", epochs=2400)


def ucf101_base_3200() -> PretrainConfig:
    """ViT-B on UCF101, 3200 epochs, 75 % hidden.

    python -m train.pretrain ucf101-base-3200 --data ucf101/train.csv
    Published on 8 GPUs of 24 clips, about 30 hours; fine-tuned 91.3 top-1, 98.5 top-5.
    """
    return _published("ucf101-base-3200", "vit_base", 3200, 192, ratio=0.75, base_lr=3e-4)


def hmdb51_base_4800() -> PretrainConfig:
    """ViT-B on HMDB51, 4800 epochs, 75 % hidden, stride 2 (in the paper only).

    python -m train.pretrain hmdb51-base-4800 --data hmdb51/train.csv
    Published on 8 GPUs, 192 clips in all; fine-tuned 62.6 top-1.
    """
    return _published("hmdb51-base-4800", "vit_base", 4800, 192, stride=2, ratio=0.75, base_lr=3e-4)


_ALL = (
    *(demo, demo_scenes, tiny, k400_small_1600, k400_base_800, k400_base_1600, k400_large_1600, k400_huge_1600),
    *(ssv2_small_2400, ssv2_base_800, ssv2_base_2400, ucf101_base_3200, hmdb51_base_4800),
)
PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {f.__name__.replace("_", "-"): f for f in _ALL}
