"""Contrastive pre-training, MoCo v3 for clips: settings and recipes.

The numbers are those of the MoCo v3 paper (arXiv 2104.02057); the VideoMAE paper gives only the length of its baseline
(RECIPES I). Batches are videos per step, of which each gives two clips; the learning rate is 256ths of that, by the
linear rule.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from kernels.launch import check
from train.checkpoint import Checkpointing
from train.config import Model, RunConfig
from train.log import Logging
from train.optim import Optim
from train.probing import Probing
from train.recipes import PretrainData, Sampling
from videomae.data.contrast import ContrastAugment

VIEWS = 2


@dataclass(frozen=True)
class MocoModel(Model):
    """Which encoder is trained, and the heads on it."""

    hidden: int = 4096  # width of the heads' hidden layers
    width: int = 256  # of what is compared
    frozen_cubes: bool = True  # the cube embedding stays as it is drawn: the paper's remedy for unstable training

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.hidden >= 1, f"model.hidden must be at least 1; got {self.hidden}")
        check(self.width >= 2, f"model.width must be at least 2; got {self.width}")


@dataclass(frozen=True)
class MocoData(PretrainData):
    """Where clips come from. Each video gives two views."""

    views_per_decode: int = VIEWS
    windows: int = VIEWS  # 2: each view has frames of its own; 1: both have the same

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.views_per_decode == VIEWS, f"data.views-per-decode must be 2 here; got {self.views_per_decode}")


@dataclass(frozen=True)
class Contrast:
    """How views are compared."""

    temperature: float = 0.2
    momentum: float = 0.99  # of the encoder of keys, at first; it rises to 1 along half a cosine

    def __post_init__(self) -> None:
        check(0 < self.temperature <= 100, f"contrast.temperature must be in (0, 100]; got {self.temperature}")
        check(0 <= self.momentum < 1, f"contrast.momentum must be in [0, 1); got {self.momentum}")


@dataclass(frozen=True)
class MocoConfig(RunConfig):
    """A contrastive pre-training run."""

    data: MocoData = field(default_factory=MocoData)
    model: MocoModel = field(default_factory=MocoModel)
    contrast: Contrast = field(default_factory=Contrast)
    sampling: Sampling = field(default_factory=Sampling)
    augment: ContrastAugment = field(default_factory=ContrastAugment)
    probe: Probing = field(default_factory=Probing)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.batch_size >= 2, f"batch-size must be at least 2, as other videos are negatives; got {self.batch_size}"
        )
        micro = self.micro_batch
        check(
            micro is None or (micro >= 2 * VIEWS and micro % VIEWS == 0),
            f"micro-batch must be even, and at least 4: both views of a video are compared in it; got {micro}",
        )
        clips = self.clips_per_step
        check(micro is None or clips % micro == 0, f"micro-batch {micro} does not divide a step's {clips} clips")


def demo() -> MocoConfig:
    """The model of pre-training's demo on the same clips: minutes on a CPU.

    python -m train.moco
    After --steps 200, fine-tuned on 504 clips as in results/learns, it has 71.7 top-1 (one seed; from scratch 12.4).
    """
    return MocoConfig(
        recipe="demo",
        steps=1800,
        batch_size=64,
        model=MocoModel("vit_mini", frames=8, image_size=32, cube=(2, 8, 8), hidden=512, width=128),
        # the paper's 0.2 learns less from so few negatives
        contrast=Contrast(temperature=0.1),
        sampling=Sampling(stride=1),
        # by colours alone its discs would be told apart: with the paper's jitter, motion is not learned
        augment=ContrastAugment(area=(0.4, 1.0), hue=0.5, saturation=0.8, grey=0.4, blur=0.0),
        optim=Optim(base_lr=4e-3, min_lr=4e-5, weight_decay=0.1, betas=(0.9, 0.999)),
        log=Logging(every=50),
        checkpoint=Checkpointing(every=300),
    )


def k400_base() -> MocoConfig:
    """ViT-B on Kinetics-400, 300 epochs.

    python -m train.moco k400-base --data k400/train.csv
    Never run here, nor published with these settings: those of MoCo v3's ViT-B on images (4096 of them a step), with
    clips as VideoMAE has them, mirrored. 1024 videos a step have to be in the GPUs' memory at once, as negatives are
    taken from what is: see --micro-batch. The VideoMAE paper's own baseline has 74.2 top-1 fine-tuned;
    it gives that baseline's epochs, 300, for Something-Something V2 alone.
    """
    return MocoConfig(
        recipe="k400-base",
        epochs=300,
        batch_size=1024,
        augment=ContrastAugment(flip=True),
        optim=Optim(base_lr=1.5e-4, min_lr=0.0, weight_decay=0.1, betas=(0.9, 0.999)),
    )


MOCO: dict[str, Callable[[], MocoConfig]] = {f.__name__.replace("_", "-"): f for f in (demo, k400_base)}
