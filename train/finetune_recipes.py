"""VideoMAE's published fine-tuning recipes as values (RECIPES E.2, E.3), and the demo's.

A recipe's docstring gives its command, the hardware it was published with, and the result to expect. Names without
`paper` follow the official scripts; those with it the paper's tables, where these differ from the scripts. Batches are
videos per step; the learning rate is 256ths of that, by the linear rule, and ignores repeated augmentation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from kernels.launch import check
from train.checkpoint import Checkpointing
from train.config import TunedAugment, TunedConfig, TunedData, TunedModel
from train.log import Logging
from train.optim import FinetuneOptim
from videomae.blocks import Recompute
from videomae.data.mix import Erasing, Mixing
from videomae.data.rand_augment import RandAugment
from videomae.data.sampling import Sampling


@dataclass(frozen=True)
class FinetuneData(TunedData):
    """Where labelled clips come from: a list (`path label`), a folder of train.csv, val.csv and test.csv, a folder with
    one folder for each class, or a prepared set."""

    # read the nearest frame that a prepared set holds in place of one that it does not; noted with every result
    allow_nearest: Annotated[bool, tyro.conf.arg(aliases=["--allow-nearest"])] = False


@dataclass(frozen=True)
class FinetuneModel(TunedModel):
    """Which model is trained; its clips are square."""

    head_dropout: float = 0.0  # on the pooled feature

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.input.size
        check(height == width, f"model.image-size must be that of a square; got {height} x {width}")
        check(0 <= self.head_dropout < 1, f"model.head-dropout must be in [0, 1); got {self.head_dropout}")


@dataclass(frozen=True)
class FinetuneAugment(TunedAugment):
    """What fine-tuning does to a clip's frames after RandAugment: random resized crop, and a flip."""

    area: tuple[float, float] = (0.08, 1.0)  # of the crop, as a share of the frame
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # of the crop, width by height

    def __post_init__(self) -> None:
        check(0 < self.area[0] <= self.area[1] <= 1, f"augment.area must rise within (0, 1]; got {self.area}")
        check(0 < self.aspect[0] <= self.aspect[1], f"augment.aspect must rise from above 0; got {self.aspect}")


@dataclass(frozen=True)
class FinetuneConfig(TunedConfig):
    """A fine-tuning run."""

    smoothing: float = 0.1  # of labels
    ema: float | None = None  # decay of an average of the weights, validated and saved beside them
    data: FinetuneData = field(default_factory=FinetuneData)
    model: FinetuneModel = field(default_factory=FinetuneModel)
    sampling: Sampling = field(default_factory=Sampling)
    rand_augment: RandAugment = field(default_factory=RandAugment)
    augment: FinetuneAugment = field(default_factory=FinetuneAugment)
    erasing: Erasing = field(default_factory=Erasing)
    mix: Mixing = field(default_factory=Mixing)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.smoothing < 1, f"smoothing must be in [0, 1); got {self.smoothing}")
        check(self.ema is None or 0 < self.ema < 1, f"ema must be in (0, 1); got {self.ema}")
        check(
            not (self.augment.flip and self.recipe.startswith("ssv2")),
            "Something-Something's classes tell left from right: no flip with an ssv2 recipe",
        )
        _ = self.mix.group_of(self.data.views_per_decode)


def demo() -> FinetuneConfig:
    """Tiny model on the demo's clips, 12 classes of motion: minutes on a CPU.

    python -m train.finetune --weights runs/pretrain-demo
    """
    return FinetuneConfig(
        recipe="demo",
        epochs=10,
        batch_size=64,
        model=FinetuneModel("vit_mini", frames=8, image_size=32, cube=(2, 8, 8), drop_path=0.0),
        sampling=Sampling(stride=1),
        # classes are directions and turns: no flip, nothing that moves or turns frames
        rand_augment=RandAugment(ops=0),
        augment=FinetuneAugment(area=(0.5, 1.0), flip=False),
        erasing=Erasing(probability=0.0),
        mix=Mixing(probability=0.0),
        optim=FinetuneOptim(base_lr=4e-3, min_lr=4e-5, warmup_epochs=1, layer_decay=1.0),
        log=Logging(every=20),
        checkpoint=Checkpointing(every=500),
    )


def tiny() -> FinetuneConfig:
    """Tiny model on a handful of labelled videos: minutes on a CPU.

    python -m train.finetune tiny --data FOLDER --weights runs/pretrain-tiny
    Seven clips as seven classes, the first part of each to learn from, are told apart by the rest.
    """
    return FinetuneConfig(
        recipe="tiny",
        epochs=100,
        batch_size=8,
        data=FinetuneData(views_per_decode=4),
        model=FinetuneModel("vit_tiny", image_size=112, drop_path=0.0),
        sampling=Sampling(stride=4),
        rand_augment=RandAugment(ops=0),
        erasing=Erasing(probability=0.0),
        mix=Mixing(probability=0.0),
        validate_every=0,
        optim=FinetuneOptim(base_lr=0.07, min_lr=7e-4, warmup_epochs=5, layer_decay=1.0),
        log=Logging(every=20),
        checkpoint=Checkpointing(every=500),
    )


_DENSE, _UNIFORM = Sampling("dense", 4), Sampling("uniform")


def _published(
    recipe: str,
    size: str,
    epochs: int,
    batch_size: int,
    base_lr: float,
    *,
    views: int = 2,
    layer_decay: float = 0.75,
    drop_path: float = 0.1,
    head_dropout: float = 0.0,
    min_lr: float = 1e-6,
    magnitude: float = 7,
    recompute: Recompute = "none",
    sampling: Sampling = _DENSE,
) -> FinetuneConfig:
    return FinetuneConfig(
        recipe=recipe,
        epochs=epochs,
        batch_size=batch_size,
        data=FinetuneData(views_per_decode=views),
        model=FinetuneModel(size, drop_path=drop_path, head_dropout=head_dropout, recompute=recompute),
        sampling=sampling,
        rand_augment=RandAugment(magnitude=magnitude),
        augment=FinetuneAugment(flip=sampling.kind == "dense"),
        optim=FinetuneOptim(base_lr=base_lr, min_lr=min_lr, layer_decay=layer_decay),
    )


def k400_small_1600() -> FinetuneConfig:
    """ViT-S on Kinetics-400, 150 epochs, from 1600 of pre-training.

    python -m train.finetune k400-small-1600 --data k400 --weights W
    Published on 32 GPUs of 12 clips x 2 views; 79.0 top-1, 93.8 top-5 with 5x3 views.
    """
    return _published("k400-small-1600", "vit_small", 150, 384, 5e-4)


def k400_base_800() -> FinetuneConfig:
    """ViT-B on Kinetics-400, 100 epochs, from 800 of pre-training, one view of each video.

    python -m train.finetune k400-base-800 --data k400 --weights W
    Published on 64 GPUs of 8 clips; 80.0 top-1, 94.4 top-5 with 5x3 views.
    """
    return _published("k400-base-800", "vit_base", 100, 512, 1e-3, views=1)


def k400_base_1600() -> FinetuneConfig:
    """ViT-B on Kinetics-400, 75 epochs, from 1600 of pre-training.

    python -m train.finetune k400-base-1600 --data k400 --weights W
    Published on 64 GPUs of 6 clips x 2 views; 81.5 top-1, 95.1 top-5 with 5x3 views.
    """
    return _published("k400-base-1600", "vit_base", 75, 384, 5e-4)


def k400_large_1600() -> FinetuneConfig:
    """ViT-L on Kinetics-400, 35 epochs, from 1600 of pre-training.

    python -m train.finetune k400-large-1600 --data k400 --weights W
    Published on 64 GPUs of 2 clips x 2 views; 85.2 top-1, 96.8 top-5 with 5x3 views.
    """
    return _published("k400-large-1600", "vit_large", 35, 128, 2e-3)


def k400_huge_1600() -> FinetuneConfig:
    """ViT-H on Kinetics-400, 50 epochs, from 1600 of pre-training, blocks recomputed.

    python -m train.finetune k400-huge-1600 --data k400 --weights W
    Published on 64 GPUs of 8 clips x 2 views; 86.6 top-1, 97.1 top-5 with 5x3 views.
    """
    return _published(
        *("k400-huge-1600", "vit_huge", 50, 512, 1e-3),
        drop_path=0.2,
        head_dropout=0.5,
        min_lr=1e-5,
        recompute="block",
    )


def ssv2_small_2400() -> FinetuneConfig:
    """ViT-S on Something-Something V2, 40 epochs, from 2400 of pre-training.

    python -m train.finetune ssv2-small-2400 --data ssv2 --weights W
    Published on 32 GPUs of 12 clips x 2 views; 66.8 top-1, 90.3 top-5 with 2x3 views.
    """
    return _published("ssv2-small-2400", "vit_small", 40, 384, 1e-3, layer_decay=0.7, sampling=_UNIFORM)


def ssv2_base_800() -> FinetuneConfig:
    """ViT-B on Something-Something V2, 50 epochs, from 800 of pre-training, one view of each video.

    python -m train.finetune ssv2-base-800 --data ssv2 --weights W
    Published on 64 GPUs of 8 clips; 69.6 top-1, 92.0 top-5 with 2x3 views.
    """
    return _published("ssv2-base-800", "vit_base", 50, 512, 5e-4, views=1, sampling=_UNIFORM)


def ssv2_base_2400() -> FinetuneConfig:
    """ViT-B on Something-Something V2, 30 epochs, from 2400 of pre-training.

    python -m train.finetune ssv2-base-2400 --data ssv2 --weights W
    Published on 64 GPUs of 6 clips x 2 views; 70.8 top-1, 92.4 top-5 with 2x3 views.
    """
    return _published("ssv2-base-2400", "vit_base", 30, 384, 5e-4, sampling=_UNIFORM)


def ucf101_base_3200() -> FinetuneConfig:
    """ViT-B on UCF101, 100 epochs, from 3200 of pre-training, blocks recomputed.

    python -m train.finetune ucf101-base-3200 --data ucf101 --weights W
    Published on 8 GPUs of 16 clips x 2 views; 91.3 top-1, 98.5 top-5 with 5x3 views.
    """
    return _published(
        *("ucf101-base-3200", "vit_base", 100, 128, 5e-4),
        layer_decay=0.7,
        drop_path=0.2,
        head_dropout=0.5,
        min_lr=1e-5,
        recompute="block",
    )


def hmdb51_base_4800() -> FinetuneConfig:
    """ViT-B on HMDB51, 50 epochs, from 4800 of pre-training, stride 2 (in the paper only).

    python -m train.finetune hmdb51-base-4800 --data hmdb51 --weights W
    Published on 8 GPUs, 128 videos in all; 62.6 top-1 with 10x3 views.
    """
    return _published(
        *("hmdb51-base-4800", "vit_base", 50, 128, 1e-3), layer_decay=0.7, drop_path=0.2, sampling=Sampling(stride=2)
    )


def _paper(recipe: str, size: str, epochs: int, base_lr: float, **changes: object) -> FinetuneConfig:
    return _published(recipe, size, epochs, 512, base_lr, magnitude=9, **changes)  # type: ignore[arg-type]


def k400_small_paper() -> FinetuneConfig:
    """ViT-S on Kinetics-400 by the paper's table: batch 512, 150 epochs, RandAugment of magnitude 9.

    python -m train.finetune k400-small-paper --data k400 --weights W
    79.0 top-1, 93.8 top-5 with 5x3 views.
    """
    return _paper("k400-small-paper", "vit_small", 150, 1e-3, layer_decay=0.7)


def k400_base_paper() -> FinetuneConfig:
    """ViT-B on Kinetics-400 by the paper's table: batch 512, 75 epochs, RandAugment of magnitude 9.

    python -m train.finetune k400-base-paper --data k400 --weights W
    81.5 top-1, 95.1 top-5 with 5x3 views.
    """
    return _paper("k400-base-paper", "vit_base", 75, 1e-3)


def k400_large_paper() -> FinetuneConfig:
    """ViT-L on Kinetics-400 by the paper's table: batch 512, 50 epochs, drop path 0.2, dropout 0.5.

    python -m train.finetune k400-large-paper --data k400 --weights W
    85.2 top-1, 96.8 top-5 with 5x3 views.
    """
    return _paper("k400-large-paper", "vit_large", 50, 1e-3, drop_path=0.2, head_dropout=0.5)


def k400_huge_paper() -> FinetuneConfig:
    """ViT-H on Kinetics-400 by the paper's table: batch 512, 50 epochs, RandAugment of magnitude 9.

    python -m train.finetune k400-huge-paper --data k400 --weights W
    86.6 top-1, 97.1 top-5 with 5x3 views.
    """
    return _paper("k400-huge-paper", "vit_huge", 50, 1e-3, drop_path=0.2, head_dropout=0.5, recompute="block")


def ssv2_small_paper() -> FinetuneConfig:
    """ViT-S on Something-Something V2 by the paper's table: batch 512, RandAugment of magnitude 9.

    python -m train.finetune ssv2-small-paper --data ssv2 --weights W
    66.8 top-1, 90.3 top-5 with 2x3 views.
    """
    return _paper("ssv2-small-paper", "vit_small", 40, 1e-3, layer_decay=0.7, sampling=_UNIFORM)


def ssv2_base_paper() -> FinetuneConfig:
    """ViT-B on Something-Something V2 by the paper's table: batch 512, 40 epochs, RandAugment of magnitude 9.

    python -m train.finetune ssv2-base-paper --data ssv2 --weights W
    70.8 top-1, 92.4 top-5 with 2x3 views.
    """
    return _paper("ssv2-base-paper", "vit_base", 40, 5e-4, sampling=_UNIFORM)


def ssv2_large_paper() -> FinetuneConfig:
    """ViT-L on Something-Something V2 by the paper's table (there is no script): 30 epochs, drop path 0.2, dropout 0.5.

    python -m train.finetune ssv2-large-paper --data ssv2 --weights W
    74.3 top-1, 94.6 top-5 with 2x3 views.
    """
    return _paper("ssv2-large-paper", "vit_large", 30, 5e-4, drop_path=0.2, head_dropout=0.5, sampling=_UNIFORM)


def k400_base_scratch() -> FinetuneConfig:
    """ViT-B on Kinetics-400 from nothing: 200 epochs, as the paper's baseline; the rest is k400-base-paper's.

    python -m train.finetune k400-base-scratch --data k400
    68.8 top-1.
    """
    return _paper("k400-base-scratch", "vit_base", 200, 1e-3, layer_decay=1.0)


def ssv2_base_scratch() -> FinetuneConfig:
    """ViT-B on Something-Something V2 from nothing: 100 epochs, as the paper's baseline; the rest is ssv2-base-paper's.

    python -m train.finetune ssv2-base-scratch --data ssv2
    32.6 top-1.
    """
    return _paper("ssv2-base-scratch", "vit_base", 100, 5e-4, layer_decay=1.0, sampling=_UNIFORM)


def ssv2_base_from_k400() -> FinetuneConfig:
    """ViT-B on Something-Something V2 from Kinetics-400 pre-training, by the paper's table.

    python -m train.finetune ssv2-base-from-k400 --data ssv2 --weights K400_WEIGHTS
    68.5 top-1 in the table of transfers; 69.7, and 92.3 top-5, in that of results.
    """
    return replace(ssv2_base_paper(), recipe="ssv2-base-from-k400")


def ucf101_base_from_k400() -> FinetuneConfig:
    """ViT-B on UCF101 from Kinetics-400 pre-training, as from its own.

    python -m train.finetune ucf101-base-from-k400 --data ucf101 --weights K400_WEIGHTS
    96.1 top-1.
    """
    return replace(ucf101_base_3200(), recipe="ucf101-base-from-k400")


def hmdb51_base_from_k400() -> FinetuneConfig:
    """ViT-B on HMDB51 from Kinetics-400 pre-training, as from its own.

    python -m train.finetune hmdb51-base-from-k400 --data hmdb51 --weights K400_WEIGHTS
    73.3 top-1.
    """
    return replace(hmdb51_base_4800(), recipe="hmdb51-base-from-k400")


_ALL = (
    *(demo, tiny, k400_small_1600, k400_base_800, k400_base_1600, k400_large_1600, k400_huge_1600),
    *(ssv2_small_2400, ssv2_base_800, ssv2_base_2400, ucf101_base_3200, hmdb51_base_4800),
    *(k400_small_paper, k400_base_paper, k400_large_paper, k400_huge_paper),
    *(ssv2_small_paper, ssv2_base_paper, ssv2_large_paper, k400_base_scratch, ssv2_base_scratch),
    *(ssv2_base_from_k400, ucf101_base_from_k400, hmdb51_base_from_k400),
)
FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {f.__name__.replace("_", "-"): f for f in _ALL}
