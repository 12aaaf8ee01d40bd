"""A trained model in use: weights to a model on a device, and every video's clips through it, decoded ahead.

What the commands share that do not train: evaluate, predict, features, probe, and the validation of a training run.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kernels.launch import check
from train import checkpoint
from train.distributed import ALONE, World
from train.machine import decoding_cores, memory_budget, pick_device
from train.optim import PRECISIONS, resolve_precision
from videomae.attention import choose
from videomae.blocks import set_attention
from videomae.classifier import Classifier
from videomae.data.dataset import Sample
from videomae.data.feed import feed
from videomae.data.loader import Loader, LoaderConfig, Skip
from videomae.data.pool import available_cpus
from videomae.data.readers import Reader
from videomae.data.storage import CacheConfig
from videomae.model import Encoder, VideoMAE
from videomae.weights import Report, model_from

_MOST_CLIPS = 64  # at a time: more makes no GPU faster
_TOKEN_WIDTHS = 14  # numbers alive per token in a block's forward pass, in widths: qkv, sums, the MLP's hidden layer

M = TypeVar("M", bound=Encoder)


def find_weights(source: str) -> str:
    """What `model_from` reads: of a run folder its newest checkpoint, anything else as it is. ValueError for a run
    without one."""
    folder = Path(source).expanduser()
    if not (folder / "checkpoints").is_dir():
        return source
    found = checkpoint.checkpoints(folder / "checkpoints")
    check(len(found) > 0, f"the run in {folder} has no checkpoint yet")
    return str(found[0])


def name_of(weights: str) -> str:
    """What results of these weights are called: their file's name, of a run's the run's and the step's."""
    path = Path(weights.rstrip("/"))
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}-{path.name}"
    # an average of the weights has its name in every run
    of_run = path.parent.parent.name == "checkpoints"
    return f"{path.parents[2].name}-{path.parent.name}-{path.stem}" if of_run else path.stem


def read_model(source: str) -> tuple[VideoMAE | Encoder | Classifier, Report]:
    """The model of a run folder, a checkpoint, a file, a Hugging Face folder or hub id. ValueError when there is
    none."""
    return model_from(find_weights(source))


def encoder_of(model: VideoMAE | Encoder | Classifier) -> Encoder:
    """The encoder: of a pre-training model its own, anything else is one."""
    return model.encoder if isinstance(model, VideoMAE) else model


class Inference:
    """A model in eval mode on a device, called with uint8 clips, any number of them."""

    def __init__(
        self,
        model: Encoder,
        *,
        device: str | None = None,
        precision: str = "auto",
        attention: str = "auto",
        micro_batch: int | None = None,
        cubes: int | None = None,
        world: World = ALONE,
    ) -> None:
        """micro_batch: clips at a time; by the free memory if not given. cubes: of the largest clip; the model's own if
        not given. world: the processes that share this machine. ValueError for what it lacks."""
        self.device = pick_device(device, None if world.group is None else world.local_rank)
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(available_cpus() // world.local_size, 1))
        self.precision = resolve_precision(precision, self.device)
        self._autocast = PRECISIONS[self.precision]
        size, cubes = model.size, cubes or model.input.num_cubes
        self.attention = choose(
            attention,
            device=self.device,
            dtype=self._autocast or torch.float32,
            length=cubes,
            head_width=size.width // size.heads,
        )
        self.model = model.to(self.device).eval()
        set_attention(self.model, attention)
        clip_bytes = cubes * size.width * _TOKEN_WIDTHS * (2 if self._autocast else 4)
        fitting = memory_budget(self.device, world.local_size) // clip_bytes
        self.micro_batch = micro_batch or max(min(fitting, _MOST_CLIPS), 1)

    def __call__(self, frames: Tensor, function: Callable[..., Tensor] | None = None, *others: Tensor) -> Tensor:
        """function (the model, if not given) of frames [B, T, H, W, 3] and of others, which go with them, micro_batch
        at a time: float32 on the device."""
        function = function or self.model
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None),
        ):
            given = (x.to(self.device, non_blocking=True).split(self.micro_batch) for x in (frames, *others))
            return torch.cat([function(*parts).float() for parts in zip(*given, strict=True)])


class Views(NamedTuple):
    """Whole videos. indices: in the list; frames: uint8 [videos, views, T, H, W, 3] on the device, until the next are
    asked for; skips: of those that could not be read, which are not among the indices."""

    indices: tuple[int, ...]
    frames: Tensor
    skips: tuple[Skip, ...]


@dataclass(frozen=True)
class Reading:
    """How videos are read; nothing here changes a clip."""

    workers: int | None = None  # decoding processes; by the number of cores if not given
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    cache: CacheConfig | None = None
    processes: int = 1  # that share this machine's cores

    def workers_for(self, device: torch.device) -> int:
        return decoding_cores(device, self.processes) if self.workers is None else self.workers


def read_views(
    reader: Reader,
    paths: Sequence[str],
    indices: Sequence[int],
    *,
    views: int,
    device: torch.device,
    reading: Reading,
    say: Callable[[str], None] = print,
    at_once: int = 32,
) -> Iterator[Views]:
    """Every view of the videos with these indices, each video decoded once, in order; about at_once clips at a time."""
    if not indices:
        return
    videos = max(at_once // views, 1)
    groups = [indices[i : i + videos] for i in range(0, len(indices), videos)]
    batches = ([Sample(0, index, view) for index in group for view in range(views)] for group in groups)
    loader = Loader(
        reader,
        paths,
        batches,
        batch_size=min(videos, len(indices)) * views,
        workers=reading.workers_for(device),
        config=reading.loader,
        cache=reading.cache,
    )
    with loader, feed(loader, device, say) as fed:
        for batch, frames, *_ in fed:
            lost = {skip.sample.index: skip for skip in batch.skips}
            whole = [sample.index for sample in batch.samples[::views]]
            rows = [i for i, index in enumerate(whole) if index not in lost]
            grouped = frames.view(len(whole), views, *frames.shape[1:])
            kept = grouped if len(rows) == len(whole) else grouped[rows]
            yield Views(tuple(whole[i] for i in rows), kept, tuple(lost.values()))
