"""What every kind of training run is told: where its data is, how it computes, when it reports and saves."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from kernels.launch import check
from train.checkpoint import Checkpointing
from train.engine import EngineName, ParallelName
from train.log import Logging
from train.optim import FinetuneOptim, Optim
from videomae.blocks import RECOMPUTE, Recompute
from videomae.data import storage
from videomae.data.decode import Decoder, ReaderName
from videomae.data.loader import LoaderConfig
from videomae.model import Input, size_of


@dataclass(frozen=True)
class Data:
    """Where clips come from, and how often each decoded one is used."""

    # folder of videos, list file, or prepared set; the demo renders its own. A list's lines are `path label`, `path` or
    # `path 0 -1`; a prepared set may be a URL (s3://...)
    path: Annotated[str | None, tyro.conf.arg(aliases=["--data"])] = None
    # of lists: the folder that their paths start from and may not leave; without it a list may name any file
    root: str | None = None
    # views of each decoded video (repeated augmentation); a step then has batch-size * views clips, and the learning
    # rate ignores that
    views_per_decode: int = 1
    reader: ReaderName = "auto"  # PyAV; decord and torchcodec (untested on a GPU) must be asked for
    device: Literal["cpu", "cuda"] = "cpu"  # where torchcodec decodes; cuda: by the GPU's decoder
    cache: str = "~/.cache/videomae"  # folder that keeps what was read from a URL
    cache_gb: float = 50.0  # the most it may hold

    def __post_init__(self) -> None:
        check(self.path != "", "data must not be empty")
        check(self.root != "", "data.root must not be empty")
        check(self.views_per_decode >= 1, f"data.views-per-decode must be at least 1; got {self.views_per_decode}")
        check(self.device == "cpu" or self.reader == "torchcodec", "--data.device cuda needs --data.reader torchcodec")
        check(0 < self.cache_gb < 1e9, f"data.cache-gb must be positive; got {self.cache_gb}")

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.reader, self.device)

    def cache_of(self, path: str | None) -> storage.CacheConfig | None:
        """Where what is read from that URL is kept; None for data on disk."""
        if path is None or not storage.is_url(path):
            return None
        return storage.CacheConfig(self.cache, self.cache_gb)


@dataclass(frozen=True)
class Model:
    """Which transformer is trained, on what clips."""

    size: str = "vit_base"  # vit_tiny, _mini, _small, _base, _large or _huge
    frames: int = 16  # of a clip
    image_size: int | tuple[int, int] = 224  # pixels: the side of a square, or height and width
    cube: tuple[int, int, int] = (2, 16, 16)  # frames, height, width of a token
    # what the backward pass computes anew instead of keeping; norms: the outputs of LayerNorm and GELU; mlp: every
    # MLP; block: all but the blocks' inputs, for a third more time
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        size_of(self.size)
        check(
            self.recompute in RECOMPUTE,
            f"model.recompute must be one of {', '.join(RECOMPUTE)}; got {self.recompute!r}",
        )
        _ = self.input

    @property
    def input(self) -> Input:
        return Input(self.frames, self.image_size, self.cube)


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    recipe: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress]
    out: str | None = None  # run folder; runs/VERB-RECIPE if not given
    epochs: float | None = None  # length of the run in passes over the videos
    steps: int | None = None  # length of the run in steps: the whole schedule is fitted into it
    batch_size: int = 1024  # videos per step, over all micro-batches
    micro_batch: int | None = None  # clips on the device at a time; planned from its memory if not given
    seed: int = 0  # of every random choice
    # decoding processes; by the number of cores if not given; 0 decodes in the training process
    workers: int | None = None
    device: Literal["cpu", "cuda"] | None = None  # cuda where there is one, if not given
    # auto: bfloat16, else float16 with a scaler, on a GPU; float32 on a CPU
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    engine: EngineName = "eager"  # kernel by kernel; compile: by torch.compile; graph: as captured CUDA graphs
    # of several processes: ddp, each has all weights; fsdp, they are spread over all of them (ViT-H and larger)
    parallel: ParallelName = "ddp"
    # the back end: auto, sdpa, sdpa-flash, sdpa-cudnn, triton, flash-attn, flash-attn-4, xformers
    attention: str = "auto"
    patience: float = 30.0  # minutes that the processes of a run wait for each other, while one validates or saves
    # auto goes on where the run folder stopped; never: move the old run aside; PATH: from that checkpoint, or
    # that run's newest
    resume: str = "auto"
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    log: Logging = field(default_factory=Logging)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, f"batch-size must be at least 1; got {self.batch_size}")
        check(self.steps is None or self.steps >= 1, f"steps must be at least 1; got {self.steps}")
        check(self.epochs is None or 0 < self.epochs < 1e9, f"epochs must be positive and finite; got {self.epochs}")
        check(
            self.micro_batch is None or self.micro_batch >= 1, f"micro-batch must be at least 1; got {self.micro_batch}"
        )
        check(-(2**63) <= self.seed < 2**63, f"seed must fit 64 bits; got {self.seed}")
        check(0 < self.patience < 1e6, f"patience must be positive, in minutes; got {self.patience}")
        check(self.resume != "", "resume must be auto, never, or the path of a checkpoint")
        check(self.workers is None or self.workers >= 0, f"workers must not be negative; got {self.workers}")

    @property
    def clips_per_step(self) -> int:
        """Samples of a step: every video's views."""
        return self.batch_size * self.data.views_per_decode


@dataclass(frozen=True)
class TunedData(Data):
    """Where labelled data is."""

    val: str | None = None  # validation set, if it is not beside the training set; a path like that of --data

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.val != "", "data.val must not be empty")


@dataclass(frozen=True)
class TunedModel(Model):
    """Which transformer is trained, with a head of its own."""

    drop_path: float = 0.1  # of the last block; less in proportion in those before it
    init_scale: float = 0.001  # of the head's first weights

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.drop_path < 1, f"model.drop-path must be in [0, 1); got {self.drop_path}")
        check(0 <= self.init_scale <= 1e6, f"model.init-scale must be in [0, 1e6]; got {self.init_scale}")


@dataclass(frozen=True)
class TunedAugment:
    """What training does to a clip's frames."""

    flip: bool = True  # mirror half of the clips; never where classes tell left from right


@dataclass(frozen=True)
class TunedConfig(RunConfig):
    """A training run that starts from weights, on labelled data."""

    # where to start: a run, checkpoint, file or hub id; from scratch if not given. Pre-trained or fine-tuned, official
    # or Hugging Face's; where videos are classified, of an image ViT as well
    weights: str | None = None
    # of another frame count or size than the weights': fresh, a table of their own; interpolate, the weights' resized
    positions: Literal["fresh", "interpolate"] = "fresh"
    validate_every: float = 1.0  # epochs; also at the end; 0: never
    data: TunedData = field(default_factory=TunedData)
    model: TunedModel = field(default_factory=TunedModel)
    augment: TunedAugment = field(default_factory=TunedAugment)
    optim: FinetuneOptim = field(default_factory=FinetuneOptim)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.validate_every >= 0, f"validate-every must not be negative; got {self.validate_every}")
        check(self.weights != "", "weights must not be empty")
