"""What an evaluation is asked to do, and the protocol that it follows: what its numbers depend on, beside the weights.

Shared with `train.predict`, which takes the same views of videos without labels.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import tyro

from kernels.launch import check
from train.inference import read_model
from videomae.classifier import Classifier
from videomae.data.labelled import LabelledVideos, find_labelled
from videomae.data.loader import LoaderConfig
from videomae.data.readers import ViewReader
from videomae.data.sampling import Sampling
from videomae.data.storage import CacheConfig, is_url
from videomae.detector import Detector
from videomae.metrics import Average
from videomae.model import Encoder, Input

AS_TRAINED = "as-trained"


@dataclass(frozen=True)
class Source:
    """Where the videos are."""

    # labelled videos: folder, list file (`path label`), or prepared set. A folder has SPLIT.csv, SPLIT/ or class
    # folders; a prepared set may be a URL (s3://...)
    path: Annotated[str | None, tyro.conf.arg(aliases=["--data"])] = None
    # of lists: the folder that their paths start from and may not leave; without it a list may name any file
    root: str | None = None
    # of a folder; test and val stand in for each other
    split: Annotated[Literal["test", "val"], tyro.conf.arg(aliases=["--split"])] = "test"
    # of a prepared set that holds every s-th frame only: take the nearest ones where the views need others
    allow_nearest: Annotated[bool, tyro.conf.arg(aliases=["--allow-nearest"])] = False
    cache: str = "~/.cache/videomae"  # folder that keeps what was read from a URL
    cache_gb: float = 50.0  # the most it may hold

    def __post_init__(self) -> None:
        check(self.path != "", "data must not be empty")
        check(self.root != "", "data.root must not be empty")
        check(0 < self.cache_gb < 1e9, f"data.cache-gb must be positive; got {self.cache_gb}")

    @property
    def kept(self) -> CacheConfig | None:
        """Where what is read from a URL is kept; None for data on disk."""
        if self.path is None or not is_url(self.path):
            return None
        return CacheConfig(self.cache, self.cache_gb)


@dataclass(frozen=True)
class AskedSampling:
    """Which frames make a clip; what is not given is as the weights say that they were trained."""

    kind: Literal["dense", "uniform"] | None = None  # as the weights say, if not given
    stride: int | None = None  # of dense; as the weights say, if not given

    def __post_init__(self) -> None:
        check(self.stride is None or self.stride >= 1, f"sampling.stride must be at least 1; got {self.stride}")
        check(self.kind != "uniform" or self.stride is None, "uniform sampling has no stride")

    def resolve(self, stated: Sampling | None) -> Sampling:
        """With what the weights state; ValueError where neither says enough."""
        known = stated.kind if stated else None
        kind = self.kind or known or ("dense" if self.stride else None)
        check(
            kind is not None,
            "the weights do not say how frames were sampled in training: give --sampling.kind uniform "
            "(Something-Something), or --sampling.kind dense --sampling.stride 4 (Kinetics), or a recipe",
        )
        if kind == "uniform":
            check(
                self.stride is None,
                "the weights are of uniform sampling, which has no stride; or --sampling.kind dense",
            )
            return Sampling("uniform")
        stride = self.stride or (stated.stride if stated and known == "dense" else None)
        check(stride is not None, "dense sampling needs --sampling.stride: the weights do not say it")
        assert stride is not None
        return Sampling("dense", stride)


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation."""

    recipe: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress]
    # a run folder, checkpoint, file, or hub id; of a run, its newest checkpoint; also a Hugging Face folder
    weights: str | None = None
    out: str | None = None  # folder of the results; runs/evaluate-RECIPE, or after the weights, if not given
    views: str | None = None  # CLIPSxCROPS of each video; 5x3 of dense sampling, 2x3 of uniform, if not given
    average: Average = "prob"  # over a video's views: probabilities, or score: logits
    # a video that cannot be read: error: no result without it; wrong: it counts as a wrong prediction
    unreadable: Literal["error", "wrong"] = "error"
    shard: str = "0/1"  # i/n: the i-th of n processes, counted from 0, that share the work in one OUT
    workers: int | None = None  # decoding processes; by the number of cores if not given; 0 decodes in this process
    micro_batch: int | None = None  # clips on the device at a time; by its free memory if not given
    device: Literal["cpu", "cuda"] | None = None  # cuda where there is one, if not given
    # auto: bfloat16, else float16, on a GPU; float32 on a CPU
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attention: str = "auto"  # the back end, as in train.pretrain
    data: Source = field(default_factory=Source)
    sampling: AskedSampling = field(default_factory=AskedSampling)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check(self.weights != "", "weights must not be empty")
        check(self.workers is None or self.workers >= 0, f"workers must not be negative; got {self.workers}")
        check(
            self.micro_batch is None or self.micro_batch >= 1, f"micro-batch must be positive; got {self.micro_batch}"
        )
        _ = self.part
        if self.views is not None:
            parse_views(self.views)

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many shares."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        check(found is not None and int(found[1]) < int(found[2]), f"shard must be i/n, i below n; got {self.shard!r}")
        assert found is not None
        return int(found[1]), int(found[2])


def parse_views(text: str) -> tuple[int, int]:
    """Clips and crops of "5x3"; ValueError."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    check(found is not None, f"views must be CLIPSxCROPS, as 5x3; got {text!r}")
    assert found is not None
    clips, crops = int(found[1]), int(found[2])
    check(1 <= clips <= 1000 and 1 <= crops <= 1000, f"views must be 1 to 1000 clips x 1 to 1000 crops; got {text}")
    return clips, crops


def view_reader(input: Input, sampling: Sampling, views: str | None, *, step: int, allow_nearest: bool) -> ViewReader:
    """What reads the views; step: only frames 0, step, 2 step, ... are stored. ValueError when they do not do."""
    clips, crops = parse_views(views or ("5x3" if sampling.kind == "dense" else "2x3"))
    # the views of a dense test are of every stride-th frame; all others are spread over the video
    suits = sampling.kind == "dense" and sampling.stride % step == 0 and clips * crops > 1
    check(
        step == 1 or suits or allow_nearest,
        f"these views need frames that the set does not hold: it has 0, {step}, {2 * step}, ... only; "
        "--allow-nearest takes the nearest",
    )
    nearest = step > 1 and not suits
    return ViewReader(input.frames, input.size, sampling, clips, crops, nearest)


def said(sampling: Sampling) -> str:
    """In words."""
    return f"dense, stride {sampling.stride}" if sampling.kind == "dense" else "uniform"


def read_classifier(source: str) -> tuple[Classifier, tuple[str, ...]]:
    """The classifier in these weights, and what is to be said of loading it. ValueError where they are of none."""
    model, report = read_model(source)
    if isinstance(model, Detector):
        raise ValueError(f"{source} holds a detector, which classifies boxes around key frames, not videos")
    if not isinstance(model, Classifier):
        kind = "an encoder" if isinstance(model, Encoder) else "pre-training weights"
        raise ValueError(
            f"{source} holds {kind}, without a head for classes: fine-tune first (python -m train.finetune)"
        )
    return model, report.messages


def names_of(model: Classifier) -> tuple[str, ...] | None:
    """The classes' names that the weights state; None where they are only numbers."""
    return None if _are_numbers(model.classes) else model.classes


def find_tested(path: str, split: str, model: Classifier, root: str | None = None) -> LabelledVideos:
    """The videos of the split, labelled as the model counts its classes. ValueError where they cannot be."""
    names, count = names_of(model), model.head.out_features
    found = find_labelled(path, split, root=root)
    if names is not None:
        # air_drumming is air drumming: published weights and folders differ in that
        own = {_spelled(name): name for name in found.classes}
        found = find_labelled(path, split, like=[own.get(_spelled(name), name) for name in names], root=root)
    else:
        check(
            _are_numbers(found.classes) or len(found.classes) == count,
            f"{path} has {len(found.classes)} classes, {found.classes[0]} to {found.classes[-1]}, the weights' head "
            f"{count} without names: which is which is not known",
        )
    highest = max(found.labels)
    check(highest < count, f"{path} has the label {highest}; the weights' head has {count} classes, 0 to {count - 1}")
    return found


def _spelled(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _are_numbers(classes: tuple[str, ...] | None) -> bool:
    return classes is None or classes == tuple(map(str, range(len(classes))))


def protocol_card(
    model: Classifier, reader: ViewReader, videos: LabelledVideos, *, average: str, precision: str
) -> dict[str, Any]:
    """What the numbers depend on, apart from the rounding of other devices: with one card they can be compared, where
    the weights differ."""
    frames, height, width = reader.shape[:3]
    sampling = reader.sampling
    step = videos.videos.step
    return {
        "sampling": said(sampling),
        "views": f"{reader.clips}x{reader.crops}",
        "clip": f"{frames}x{height}x{width}",
        "resize": f"short side to {height}, bilinear, not antialiased",
        "crops": "in the middle" if reader.crops == 1 else "evenly along the long side, from end to end",
        "frames": f"the nearest of 0, {step}, {2 * step}, ..." if reader.nearest else "exact",
        "mean": list(model.input.mean),
        "std": list(model.input.std),
        "average": {"prob": "mean of probabilities", "score": "mean of logits"}[average],
        "videos": len(videos),
        "list": videos.fingerprint,
        "classes": model.head.out_features,
        "weights": weights_hash(model),
        "precision": precision,
    }


def weights_hash(model: Encoder) -> str:
    """16 hex digits that change with any weight and with the model's size, whatever the file that they came from."""
    digest = hashlib.sha256(repr((asdict(model.size), model.input.cube, model.input.positions_of)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()[:16]


def as_trained() -> EvaluateConfig:
    """Sampling as the weights say that they were trained; 5x3 views of dense, 2x3 of uniform sampling.

    python -m train.evaluate --data FOLDER --weights runs/finetune-mine
    """
    return EvaluateConfig(AS_TRAINED)


def k400() -> EvaluateConfig:
    """Kinetics-400: 5x3 views, dense, stride 4.

    python -m train.evaluate k400 --data k400/test.csv --weights WEIGHTS
    Published for VideoMAE of 1600 epochs: ViT-S 79.0 top-1, 93.8 top-5; ViT-B 81.5, 95.1; ViT-L 85.2, 96.8.
    """
    return EvaluateConfig("k400", views="5x3", sampling=AskedSampling("dense", 4))


def ssv2() -> EvaluateConfig:
    """Something-Something v2: 2x3 views, uniform.

    python -m train.evaluate ssv2 --data ssv2/val.csv --weights WEIGHTS
    Published for VideoMAE of 2400 epochs: ViT-S 66.8 top-1, 90.3 top-5; ViT-B 70.8, 92.4.
    """
    return EvaluateConfig("ssv2", views="2x3", sampling=AskedSampling("uniform"))


def ucf101() -> EvaluateConfig:
    """UCF101: 5x3 views, dense, stride 4.

    python -m train.evaluate ucf101 --data ucf101/test.csv --weights WEIGHTS
    Published for ViT-B, pre-trained on UCF101 alone: 91.3 top-1, 98.5 top-5.
    """
    return EvaluateConfig("ucf101", views="5x3", sampling=AskedSampling("dense", 4))


def hmdb51() -> EvaluateConfig:
    """HMDB51: 10x3 views, dense, stride 2.

    python -m train.evaluate hmdb51 --data hmdb51/test.csv --weights WEIGHTS
    Published for ViT-B, pre-trained on HMDB51 alone: 62.6 top-1.
    """
    return EvaluateConfig("hmdb51", views="10x3", sampling=AskedSampling("dense", 2))


def demo() -> EvaluateConfig:
    """The demo's test videos, one view of each, dense, stride 1.

    python -m train.evaluate demo
    """
    return EvaluateConfig("demo", weights="runs/finetune-demo", views="1x1", sampling=AskedSampling("dense", 1))


EVALUATE: dict[str, Callable[[], EvaluateConfig]] = {
    AS_TRAINED: as_trained,
    "k400": k400,
    "ssv2": ssv2,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "demo": demo,
}
