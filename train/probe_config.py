"""What a probe of frozen features is asked to do."""

from dataclasses import dataclass, field
from typing import Literal

from kernels.launch import check
from train.evaluation import AskedSampling, Source, parse_views
from train.probing import NEIGHBOURS, TEMPERATURE
from videomae.data.augment import Augment
from videomae.data.loader import LoaderConfig

Method = Literal["knn", "linear", "linear-paper", "attentive", "all"]
METHODS: tuple[Method, ...] = ("knn", "linear", "linear-paper", "attentive")


@dataclass(frozen=True)
class Neighbours:
    """Of --method knn."""

    k: int = NEIGHBOURS  # neighbours that vote
    temperature: float = TEMPERATURE  # of the votes' weights

    def __post_init__(self) -> None:
        check(self.k >= 1, f"knn.k must be at least 1; got {self.k}")
        check(1e-6 <= self.temperature <= 1e6, f"knn.temperature must be in [1e-6, 1e6]; got {self.temperature}")


@dataclass(frozen=True)
class Penalty:
    """Of --method linear."""

    l2: float | None = (
        None  # on the weights of standardised features; chosen on a fifth of the training videos if not given
    )

    def __post_init__(self) -> None:
        check(self.l2 is None or 0 < self.l2 <= 1e6, f"linear.l2 must be in (0, 1e6]; got {self.l2}")


@dataclass(frozen=True)
class Paper:
    """Of --method linear-paper: SGD with momentum 0.9 and no weight decay, cosine."""

    # the rate itself, whatever the batch: the paper's other tables give a base rate for the linear rule, this one does
    # not
    lr: float = 0.1
    batch_size: int = 1024  # clips of a step; of fewer videos, all
    epochs: int = 100
    warmup_epochs: int = 10
    # bring every feature to mean 0 and deviation 1 over a batch, as MAE's linear probe does; of VideoMAE's nothing is
    # said. Without it features whose mean is large beside their deviation are learned slowly
    batch_norm: bool = False
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        check(self.lr > 0, f"paper.lr must be positive; got {self.lr}")
        check(self.batch_size >= 1, f"paper.batch-size must be at least 1; got {self.batch_size}")
        check(
            0 <= self.warmup_epochs < self.epochs,
            f"paper.warmup-epochs must be fewer than epochs; got {self.warmup_epochs} of {self.epochs}",
        )


@dataclass(frozen=True)
class Attentive:
    """Of --method attentive: AdamW, cosine, a tenth of warm-up."""

    lr: float = 3e-3  # at the end of the warm-up
    weight_decay: float = 0.05
    batch_size: int = 64  # videos of a step
    epochs: int = 30

    def __post_init__(self) -> None:
        check(self.lr > 0, f"attentive.lr must be positive; got {self.lr}")
        check(self.weight_decay >= 0, f"attentive.weight-decay must not be negative; got {self.weight_decay}")
        check(self.batch_size >= 1, f"attentive.batch-size must be at least 1; got {self.batch_size}")
        check(self.epochs >= 1, f"attentive.epochs must be at least 1; got {self.epochs}")


@dataclass(frozen=True)
class ProbeConfig:
    """A probe of frozen features."""

    weights: str  # a run folder, checkpoint, file, or hub id; also a Hugging Face folder
    method: tuple[Method, ...] = ("knn", "linear")  # knn, linear, linear-paper, attentive, or all
    test_data: str | None = None  # where the test split is, if not where --data is
    out: str | None = None  # folder for result.json; only the table if not given
    random: bool = False  # probe an untrained encoder of the same size
    views: str = "1x1"  # CLIPSxCROPS of each test video, averaged; training videos give their middle clip
    videos: int | None = None  # at most so many of each split, drawn evenly
    # a test video that cannot be read: error: no result; wrong: it counts as a wrong answer
    unreadable: Literal["error", "wrong"] = "error"
    seed: int = 0  # of what is drawn: orders, crops, --videos, --random
    workers: int | None = None  # decoding processes; by the number of cores if not given; 0 decodes in this one
    micro_batch: int | None = None  # clips on the device at a time; by its free memory if not given
    device: Literal["cpu", "cuda"] | None = None  # cuda where there is one, if not given
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoder
    attention: str = "auto"  # the back end, as in train.pretrain
    data: Source = field(default_factory=Source)
    sampling: AskedSampling = field(default_factory=AskedSampling)
    knn: Neighbours = field(default_factory=Neighbours)
    linear: Penalty = field(default_factory=Penalty)
    paper: Paper = field(default_factory=Paper)
    attentive: Attentive = field(default_factory=Attentive)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check(len(self.method) > 0, f"method must be one or more of {', '.join(METHODS)}, or all")
        check(self.videos is None or self.videos >= 1, f"videos must be at least 1; got {self.videos}")
        check(-(2**63) <= self.seed < 2**63, f"seed must fit 64 bits; got {self.seed}")
        check(self.out != "", "out must not be empty")
        check(self.workers is None or self.workers >= 0, f"workers must not be negative; got {self.workers}")
        check(
            self.micro_batch is None or self.micro_batch >= 1, f"micro-batch must be positive; got {self.micro_batch}"
        )
        parse_views(self.views)

    @property
    def chooses_l2(self) -> bool:
        """Whether the linear probe's penalty is chosen on a part of the training videos."""
        return "linear" in self.methods and self.linear.l2 is None

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(method for method in METHODS if method in self.method or "all" in self.method)
