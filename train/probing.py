"""What can be read off frozen features: by neighbours, by a linear classifier, or by one query over the tokens.

`train.probe` measures finished weights with all of them; `OnlineProbe` measures an encoder while it is pre-trained.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.launch import check
from train.inference import Reading, encoder_of, read_views
from train.machine import bytes_text, memory_budget
from train.optim import Schedule
from videomae.data.augment import Augment, crop_resize, multi_scale_crop
from videomae.data.dataset import CROP, FRAMES, ORDER, Sample
from videomae.data.decode import Decoder, UnreadableVideo, Video
from videomae.data.labelled import LabelledVideos, find_labelled
from videomae.data.readers import Spent, ViewReader
from videomae.data.sampling import Sampling
from videomae.features import features_of, frozen
from videomae.keys import Draws, keys
from videomae.metrics import topk
from videomae.model import Encoder, Input, VideoMAE

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the k-NN of DINO (Caron et al., 2021)
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of the linear probe's penalty that are tried
_ROWS = 1024  # of tests whose neighbours are looked for at a time
_MOST_STEPS = 1000  # of L-BFGS; some tens suffice but for the weakest penalties


def share_right(probabilities: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of the labels among the k largest of their row."""
    return 100 * topk(probabilities, labels, k).double().mean().item()


def draw(count: int, most: int | None, seed: int) -> list[int]:
    """Numbers of at most so many of count things, drawn evenly, in random order."""
    order = torch.argsort(keys(seed, torch.arange(count), ORDER), stable=True).tolist()
    return order if most is None else order[:most]


def knn_probabilities(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Class probabilities [M, C] of features test [M, D]: the nearest of train [N, D] by cosine vote for their labels,
    each with the weight exp(cosine / temperature)."""
    check(neighbours >= 1, f"neighbours must be at least 1; got {neighbours}")
    check(temperature > 0, f"temperature must be positive; got {temperature}")
    train, rows = functional.normalize(train.float(), dim=1), []
    for part in functional.normalize(test.float(), dim=1).split(_ROWS):
        cosines, found = (part @ train.T).topk(min(neighbours, len(train)), dim=1)
        votes = (cosines / temperature).softmax(1)
        rows.append(torch.zeros(len(part), num_classes, device=part.device).scatter_add_(1, labels[found], votes))
    return torch.cat(rows) if rows else torch.zeros(0, num_classes)


class Linear(NamedTuple):
    """A linear classifier of standardised features, float64."""

    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    mean: Tensor  # [D]
    std: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [..., C] of features [..., D]."""
        return (features.double() - self.mean) / self.std @ self.weight.T + self.bias


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, *, l2: float, start: Linear | None = None) -> Linear:
    """Multinomial logistic regression of features [N, D], each of which is brought to mean 0 and deviation 1.

    The minimum of the mean cross-entropy plus l2 / 2 times the sum of the squared weights, biases not among them. It is
    the only one, and L-BFGS finds it wherever it starts (start: another fit), so that nothing is random.
    """
    check(l2 > 0, f"l2 must be positive; got {l2}")
    x = features.detach().double()
    mean, std = x.mean(0), x.std(0, correction=0)
    # a feature that is the same everywhere, but for rounding, says nothing
    std = torch.where(std > 1e-6 * (mean.abs() + std.max()), std, math.inf)
    x = (x - mean) / std
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias)
    search = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=_MOST_STEPS,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = functional.cross_entropy(x @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    return Linear(weight.detach(), bias.detach(), mean, std)


def choose_l2(features: Tensor, labels: Tensor, num_classes: int, *, seed: int = 0) -> float:
    """Which of STRENGTHS gives the best top-1 on a held-out fifth; of equally good ones, the least cross-entropy."""
    check(len(features) >= 5, f"a fifth of {len(features)} videos cannot be held out; give at least 5")
    order = torch.tensor(draw(len(features), None, seed), device=features.device)
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]
    fit, scores = None, []
    for l2 in STRENGTHS:
        fit = fit_linear(features[rest], labels[rest], num_classes, l2=l2, start=fit)
        logits = fit(features[held])
        scores.append((share_right(logits, labels[held]), -functional.cross_entropy(logits, labels[held]).item(), l2))
    return max(scores)[2]


class AttentiveProbe(nn.Module):
    """One learned query that attends to the frozen tokens, in as many heads as the encoder has, and a linear layer.

    Each feature of the tokens is first brought to mean 0 and deviation 1 over the training tokens.
    """

    def __init__(self, width: int, heads: int, num_classes: int) -> None:
        super().__init__()
        # what tells videos apart is small beside what all tokens share, which a LayerNorm in this place would leave in
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.query = nn.Parameter(torch.empty(heads, 1, width // heads))
        self.key_value = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, C] of tokens [B, N, D]."""
        heads, _, width = self.query.shape
        normed = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        keys_values = self.key_value(normed).unflatten(-1, (2, heads, width))
        key, value = keys_values.permute(2, 0, 3, 1, 4)  # [B, A, N, d] each
        pooled = functional.scaled_dot_product_attention(self.query.expand(len(tokens), -1, -1, -1), key, value)
        return self.head(pooled.flatten(1))


class Pass(NamedTuple):
    """A minibatch's inputs for a head, features or tokens, and labels."""

    inputs: Tensor
    labels: Tensor


def train_head(
    head: nn.Module,
    batches: Iterable[Pass],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    each: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> None:
    """A step of the optimiser for every batch; each is told the step and its loss."""
    head.train()
    for step, (inputs, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        loss = functional.cross_entropy(head(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        each(step, loss.detach())
    head.eval()


@dataclass(frozen=True)
class MultiScaleReader:
    """Reads a linear probe's training clips: frames drawn as in fine-tuning, cropped as in pre-training (RECIPES
    E.3)."""

    frames: int
    size: tuple[int, int]
    sampling: Sampling
    seed: int
    augment: Augment = Augment()
    nearest: bool = False  # frames that a prepared set does not hold are replaced by the nearest that it does
    decoder: Decoder = Decoder()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.frames, *self.size, 3)

    def read_into(self, path: str, samples: Sequence[Sample], out: Sequence[np.ndarray]) -> Spent:
        begin = time.perf_counter()
        video = Video(path, self.decoder)
        if len(video) < 2:
            raise UnreadableVideo(path, "a single frame, not a video")
        opened = time.perf_counter()
        epoch, index, _ = samples[0]
        numbers = self.sampling.train(len(video), self.frames, Draws(self.seed, epoch, index, FRAMES))
        distinct = sorted(set(numbers))
        frames = video.read(distinct, allow_nearest=self.nearest)
        ready = time.perf_counter()
        height, width = frames.shape[1:3]
        for sample, clip in zip(samples, out, strict=True):
            draws = Draws(self.seed, *sample, CROP)
            crop = multi_scale_crop(height, width, self.size, self.augment.scales, draws)
            flip = self.augment.flip and draws.below(2) == 1
            clip[:] = crop_resize(frames, crop, self.size, flip=flip)[np.searchsorted(distinct, numbers)]
        return Spent(opened - begin, ready - opened, time.perf_counter() - ready)


def draw_epoch(count: int, epoch: int, seed: int) -> list[int]:
    """All numbers below count, in the order of this epoch."""
    return torch.argsort(keys(seed, epoch, torch.arange(count), ORDER), stable=True).tolist()


def minibatches(count: int, batch: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Every epoch's numbers, so many at a time; its last batch may be smaller."""
    for epoch in range(epochs):
        order = draw_epoch(count, epoch, seed)
        yield from (order[i : i + batch] for i in range(0, count, batch))


@dataclass(frozen=True)
class Probing:
    """A look at what the encoder's features are worth while it is pre-trained. It changes nothing in the run."""

    # labelled videos, with a training and a test split: a folder with train.csv and val.csv, or train/ and val/
    data: str | None = None
    every: int = 1000  # steps from one look to the next
    clips: int = 1000  # at most, of each split; they stay in memory
    neighbours: int = NEIGHBOURS  # of the k-NN
    l2: float = 1e-2  # of the linear probe, on the weights of standardised features

    def __post_init__(self) -> None:
        check(self.data != "", "probe.data must not be empty")
        check(self.every >= 1, f"probe.every must be at least 1; got {self.every}")
        check(self.clips >= 1, f"probe.clips must be at least 1; got {self.clips}")
        check(self.neighbours >= 1, f"probe.neighbours must be at least 1; got {self.neighbours}")
        check(0 < self.l2 <= 1e6, f"probe.l2 must be in (0, 1e6]; got {self.l2}")


class _Kept(NamedTuple):
    """Clips of one split: uint8 [K, T, H, W, 3] and int64 [K], on the host."""

    frames: Tensor
    labels: Tensor


class OnlineProbe:
    """Clips of labelled videos, read once, whose features are looked at now and then."""

    def __init__(
        self,
        config: Probing,
        input: Input,
        sampling: Sampling,
        *,
        seed: int,
        reading: Reading | None = None,
        decoder: Decoder | None = None,
        say: Callable[[str], None] = print,
        at_once: int = 8,
    ) -> None:
        """The middle clip of at most config.clips videos of either split, drawn by the seed. at_once: clips on the
        device. ValueError when there are none, or more than memory should hold."""
        check(config.data is not None, "a probe needs labelled videos")
        assert config.data is not None
        self._config, self._at_once = config, at_once
        train = find_labelled(config.data, "train")
        test = find_labelled(config.data, "test", like=train)
        self._num_classes = len(train.classes)
        counts = [min(len(videos), config.clips) for videos in (train, test)]
        reader = ViewReader(input.frames, input.size, sampling, nearest=True, decoder=decoder or Decoder())
        size, budget = sum(counts) * math.prod(reader.shape), memory_budget(torch.device("cpu"))
        check(
            size <= budget,
            f"the {counts[0]} and {counts[1]} clips of the probe take {bytes_text(size)} of memory, of which "
            f"{bytes_text(budget)} are to spare: give fewer --probe.clips",
        )
        for name, videos in (("train", train), ("test", test)):
            for note in videos.videos.notes:
                say(f"probe, {name}: {note}")
        self._train, self._test = (
            _read(reader, videos, draw(len(videos), count, seed), reading or Reading(), say)
            for videos, count in zip((train, test), counts, strict=True)
        )

    @property
    def counts(self) -> tuple[int, int]:
        """Clips to learn from, and to test with."""
        return len(self._train.labels), len(self._test.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """What `probe` measures."""
        return ("probe_knn", "probe_linear")

    def probe(self, model: VideoMAE | Encoder, autocast: torch.dtype | None = None) -> dict[str, float]:
        """Percent of the test clips that are recognised, by k-NN and by a linear classifier.

        The model's mode, weights and gradients, and the random generators, are as they were.
        """
        encoder = encoder_of(model)
        train = self._features(encoder, self._train.frames, autocast)
        test = self._features(encoder, self._test.frames, autocast)
        labels, wanted = self._train.labels.to(train.device), self._test.labels.to(train.device)
        votes = knn_probabilities(train, labels, test, self._num_classes, neighbours=self._config.neighbours)
        logits = fit_linear(train, labels, self._num_classes, l2=self._config.l2)(test)
        return dict(zip(self.names, (_recognised(votes, wanted), _recognised(logits, wanted)), strict=True))

    def _features(self, encoder: Encoder, frames: Tensor, autocast: torch.dtype | None) -> Tensor:
        device = encoder.positions.device
        with frozen(encoder), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return torch.cat([features_of(encoder, part.to(device)) for part in frames.split(self._at_once)])


def _recognised(values: Tensor, labels: Tensor) -> float:
    """Percent; nothing where the features are not finite, which shall not end a run."""
    return share_right(values, labels) if values.isfinite().all() else 0.0


def _read(
    reader: ViewReader, videos: LabelledVideos, indices: Sequence[int], reading: Reading, say: Callable[[str], None]
) -> _Kept:
    host = torch.device("cpu")
    frames, found = torch.empty(len(indices), *reader.shape, dtype=torch.uint8), list[int]()
    for views in read_views(reader, videos.videos.paths, indices, views=1, device=host, reading=reading, say=say):
        frames[len(found) : len(found) + len(views.indices)] = views.frames[:, 0]
        found += views.indices
        for skip in views.skips:
            say(f"probe: skipped: {skip.path}: {skip.reason}")
    check(len(found) > 0, "none of the probe's videos could be read")
    return _Kept(frames[: len(found)], torch.tensor([videos.labels[index] for index in found]))
