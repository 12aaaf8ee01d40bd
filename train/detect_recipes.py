"""VideoMAE's published detection recipes as values (RECIPES H.5), and the demo's.

A recipe's docstring gives its command, the hardware it was published with, and the result to expect. Batches are key
frames per step; the learning rate is 256ths of that, by the linear rule. The results are of detected boxes: a test
needs --boxes ava_val_det_person_bbox.json, and gives more with the annotated ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from kernels.launch import check
from train.checkpoint import Checkpointing
from train.config import TunedAugment, TunedConfig, TunedData, TunedModel
from train.log import Logging
from train.optim import FinetuneOptim
from videomae.blocks import Recompute
from videomae.data.sampling import KeyFrameClip
from videomae.frame_map import PROTOCOLS, Protocol


@dataclass(frozen=True)
class DetectData(TunedData):
    """Where key frames, boxes and videos are."""

    # folder of AVA's files, csv of boxes, or folder of such; the demo renders its own. A csv's columns are
    # path,second,x1,y1,x2,y2,label; a folder has train.csv and val.csv
    path: Annotated[str | None, tyro.conf.arg(aliases=["--data"])] = None
    # folder of AVA's movies: MOVIE.mp4, MOVIE/SECOND.mp4 or MOVIE/*.jpg; looked for beside its files if not given
    videos: str | None = None
    # boxes to be classified in a test: AVA's json, or a csv with scores; the annotated boxes if not given
    boxes: Annotated[str | None, tyro.conf.arg(aliases=["--boxes"])] = None
    least_score: float = 0.8  # of those boxes
    starts_at: float = 0.0  # the second that a movie's file, or folder of frames, begins at; 900 for the usual cuts
    frames_rate: float = 30.0  # of folders of frames
    # leave out videos that are not there or cannot be read, and seconds that they do not have; in a test their boxes
    # count as missed
    allow_missing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.root is None, "the folder that boxes' videos may not leave is data.videos, not data.root")
        check(0 <= self.least_score <= 1, f"data.least-score must be in [0, 1]; got {self.least_score}")
        check(0 < self.frames_rate <= 1000, f"data.frames-rate must be in (0, 1000]; got {self.frames_rate}")
        check(-1e9 < self.starts_at < 1e9, f"data.starts-at must be finite; got {self.starts_at}")
        for name in ("videos", "boxes"):
            check(getattr(self, name) != "", f"data.{name} must not be empty")


@dataclass(frozen=True)
class DetectModel(TunedModel):
    """Which model is trained, on crops of image-size; it is tested on whole frames."""

    drop_path: float = 0.2  # of the last block; less in proportion in those before it
    aligned: bool = False  # RoIAlign's half-pixel offset, which the published models do without
    frozen: bool = False  # train the head alone


@dataclass(frozen=True)
class DetectAugment(TunedAugment):
    """What training does to a clip and its boxes (RECIPES H.3, H.4)."""

    colour: bool = True  # shift hue, saturation and value
    jitter: bool = True  # move every side of every box
    max_boxes: int = 100  # of a clip; those after them are left out

    def __post_init__(self) -> None:
        check(1 <= self.max_boxes <= 10_000, f"augment.max-boxes must be in [1, 10000]; got {self.max_boxes}")


@dataclass(frozen=True)
class DetectConfig(TunedConfig):
    """A detection run."""

    validate_every: float = 10.0  # epochs; also at the end; 0: never
    # no training: a test of --weights on the validation set, with tables and pictures in --out
    evaluate: bool = False
    pictures: int = 16  # key frames that a test draws
    unreadable: Literal["error", "missed"] = "error"  # of a test, key frames whose video cannot be read
    protocol: Protocol = "official"  # of frame mAP
    iou: float = 0.5  # overlap from which a box is found
    sum_over: int = 1  # clips over which boxes' losses are added up, as on a published run's GPU; Adam does not see it
    data: DetectData = field(default_factory=DetectData)
    model: DetectModel = field(default_factory=DetectModel)
    clip: KeyFrameClip = field(default_factory=KeyFrameClip)
    augment: DetectAugment = field(default_factory=DetectAugment)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.protocol in PROTOCOLS, f"protocol must be {' or '.join(PROTOCOLS)}; got {self.protocol!r}")
        check(0 < self.iou <= 1, f"iou must be in (0, 1]; got {self.iou}")
        check(self.sum_over >= 1, f"sum-over must be at least 1; got {self.sum_over}")
        check(self.pictures >= 0, f"pictures must not be negative; got {self.pictures}")
        check(min(self.model.input.size) <= self.clip.short_side, self._too_large())

    def _too_large(self) -> str:
        side, short = min(self.model.input.size), self.clip.short_side
        return f"crops of {side} pixels do not fit in frames whose short side is {short}: --clip.short-side"


def demo() -> DetectConfig:
    """Tiny model on the demo's scenes, each of two discs that move: minutes on a CPU.

    python -m train.detect --weights runs/pretrain-demo-scenes
    """
    return DetectConfig(
        recipe="demo",
        epochs=10,
        batch_size=32,
        validate_every=5,
        model=DetectModel("vit_mini", frames=8, image_size=40, cube=(2, 8, 8), drop_path=0.0),
        clip=KeyFrameClip(stride=1, rate=None, short_side=40),
        # classes are directions and turns, and colours tell nothing
        augment=DetectAugment(flip=False, colour=False),
        optim=FinetuneOptim(base_lr=2.4e-2, min_lr=2.4e-4, warmup_epochs=1, layer_decay=1.0),
        log=Logging(every=20),
        checkpoint=Checkpointing(every=500),
    )


def _published(
    recipe: str,
    size: str,
    base_lr: float,
    layer_decay: float,
    *,
    gpu_batch: int,
    epochs: int = 30,
    recompute: Recompute = "none",
) -> DetectConfig:
    return DetectConfig(
        recipe=recipe,
        epochs=epochs,
        batch_size=128,
        sum_over=gpu_batch,
        model=DetectModel(size, recompute=recompute),
        optim=FinetuneOptim(base_lr=base_lr, min_lr=1e-6, warmup_epochs=5, layer_decay=layer_decay),
    )


def ava_small() -> DetectConfig:
    """ViT-S on AVA, 30 epochs, from pre-training alone.

    python -m train.detect ava-small --data ava --weights W
    Published on 16 GPUs of 8 clips; 22.5 mAP.
    """
    return _published("ava-small", "vit_small", 1e-3, 0.6, gpu_batch=8)


def ava_base() -> DetectConfig:
    """ViT-B on AVA, 30 epochs, from pre-training alone.

    python -m train.detect ava-base --data ava --weights W
    Published on 32 GPUs of 4 clips; 26.7 mAP.
    """
    return _published("ava-base", "vit_base", 2.5e-4, 0.75, gpu_batch=4)


def ava_large() -> DetectConfig:
    """ViT-L on AVA, 30 epochs, from pre-training alone, blocks recomputed.

    python -m train.detect ava-large --data ava --weights W
    Published on 32 GPUs of 4 clips; 34.3 mAP (36.1 from Kinetics-700).
    """
    return _published("ava-large", "vit_large", 2.5e-4, 0.75, gpu_batch=4, recompute="block")


def ava_huge() -> DetectConfig:
    """ViT-H on AVA, 20 epochs, from pre-training alone, blocks recomputed.

    python -m train.detect ava-huge --data ava --weights W
    Published on 64 GPUs of 2 clips; 36.5 mAP.
    """
    return _published("ava-huge", "vit_huge", 5e-4, 0.8, gpu_batch=2, epochs=20, recompute="block")


def ava_small_k400() -> DetectConfig:
    """ViT-S on AVA, 30 epochs, from fine-tuning on Kinetics-400.

    python -m train.detect ava-small-k400 --data ava --weights W
    Published on 16 GPUs of 8 clips; 28.4 mAP.
    """
    return _published("ava-small-k400", "vit_small", 5e-4, 0.6, gpu_batch=8)


def ava_base_k400() -> DetectConfig:
    """ViT-B on AVA, 30 epochs, from fine-tuning on Kinetics-400.

    python -m train.detect ava-base-k400 --data ava --weights W
    Published on 32 GPUs of 4 clips; 31.8 mAP.
    """
    return _published("ava-base-k400", "vit_base", 5e-4, 0.75, gpu_batch=4)


def ava_large_k400() -> DetectConfig:
    """ViT-L on AVA, 20 epochs, from fine-tuning on Kinetics-400, blocks recomputed.

    python -m train.detect ava-large-k400 --data ava --weights W
    Published on 32 GPUs of 4 clips; 37.0 mAP (39.3 from Kinetics-700).
    """
    return _published("ava-large-k400", "vit_large", 5e-4, 0.8, gpu_batch=4, epochs=20, recompute="block")


def ava_huge_k400() -> DetectConfig:
    """ViT-H on AVA, 20 epochs, from fine-tuning on Kinetics-400, blocks recomputed.

    python -m train.detect ava-huge-k400 --data ava --weights W
    Published on 64 GPUs of 2 clips; 39.5 mAP.
    """
    return _published("ava-huge-k400", "vit_huge", 5e-4, 0.8, gpu_batch=2, epochs=20, recompute="block")


_ALL = (
    demo,
    *(ava_small, ava_base, ava_large, ava_huge),
    *(ava_small_k400, ava_base_k400, ava_large_k400, ava_huge_k400),
)
# by name, as given on the command line
DETECT: dict[str, Callable[[], DetectConfig]] = {make.__name__.replace("_", "-"): make for make in _ALL}
