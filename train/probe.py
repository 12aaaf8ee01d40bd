"""What frozen features are worth: `python -m train.probe --weights W --data PATH [--method knn linear ...]`.

Learned from the training split, tested on the test split, of labelled videos:
- knn: the nearest training videos vote; nothing is trained.
- linear: logistic regression on one clip of each video, to its one optimum; quick, and the same every time.
- linear-paper: VideoMAE's own linear probe, 100 epochs of SGD on augmented clips (RECIPES E.3), which the encoder sees
  one and all: hours where the others take minutes.
- attentive: one learned query over all tokens of a clip.
--random measures an untrained encoder of the same size: what learning has added is the difference. Under torchrun the
processes share the work of the encoder for knn and linear.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.launch import check
from train.cli import flat, parse_flags
from train.evaluation import view_reader, weights_hash
from train.inference import Inference, Reading, encoder_of, find_weights, read_model
from train.machine import bytes_text, memory_budget
from train.optim import Schedule
from train.probe_config import Method, ProbeConfig
from train.probe_features import SAY_EVERY, CannotProbe, Known, Probe, Split, features_in, read
from train.probing import (
    AttentiveProbe,
    MultiScaleReader,
    Pass,
    choose_l2,
    draw,
    draw_epoch,
    fit_linear,
    knn_probabilities,
    minibatches,
    share_right,
    train_head,
)
from train.record import surroundings
from train.run import warn_of
from train.shares import Shares, command
from videomae.command_line import run_main
from videomae.data import storage
from videomae.data.dataset import Order
from videomae.data.feed import feed
from videomae.data.labelled import find_labelled
from videomae.data.loader import Loader
from videomae.features import features_of
from videomae.metrics import average_views
from videomae.model import Encoder
from videomae.weight_files import write_atomically
from videomae.wording import counted

PROG = "python -m train.probe"
_MICRO_BATCH = 64  # of the paper's batch, clips that are decoded together
_SHARED: tuple[Method, ...] = ("knn", "linear")  # of which features are all that the encoder has to do with


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0 done, 1 without a result, 2 wrong use, 130 stopped by Ctrl-C."""
    about = "What frozen features are worth: accuracies of simple classifiers on them."
    arguments = sys.argv[1:] if arguments is None else arguments
    example = f"{PROG} --weights runs/pretrain-mine --data k400 --method knn linear"
    config = parse_flags(arguments, ProbeConfig, prog=PROG, about=about, examples=[example])
    return command(partial(prepare, config), _probe, prog=PROG, device=config.device, stops=CannotProbe)


def prepare(config: ProbeConfig, shares: Shares, _: contextlib.ExitStack) -> Probe:
    """Everything that can be refused, before the first video is read. Raises ValueError."""
    alone = [method for method in config.methods if method not in _SHARED]
    check(
        not alone or shares.world.size == 1,
        f"--method {' '.join(alone)}: the encoder works in every step, in one process; leave torchrun out",
    )
    path = config.data.path
    check(path is not None, "nothing to learn from: give --data, labelled videos with a training and a test split")
    assert path is not None
    storage.configure(config.data.kept)
    weights = find_weights(config.weights)
    model, report = read_model(weights)
    for message in report.messages:
        print(f"note: {message}", file=sys.stderr)
    encoder = encoder_of(model)
    if config.random:
        torch.manual_seed(config.seed)
        encoder = Encoder(encoder.size, encoder.input)
    train = find_labelled(path, "train", root=config.data.root)
    test = find_labelled(config.test_data or path, config.data.split, like=train, root=config.data.root)
    sampling = config.sampling.resolve(encoder.input.sampling)
    splits = []
    for videos, views in ((train, "1x1"), (test, config.views)):
        warn_of(videos.videos)
        step, nearest = videos.videos.step, config.data.allow_nearest
        reader = view_reader(encoder.input, sampling, views, step=step, allow_nearest=nearest)
        splits.append(Split(videos, tuple(draw(len(videos), config.videos, config.seed)), reader))
    if config.chooses_l2:
        check(len(splits[0].indices) >= 5, _too_few(len(splits[0].indices)))
    if config.out is not None:
        _make_folder(Path(config.out).expanduser())
    inference = Inference(
        encoder,
        device=config.device,
        precision=config.precision,
        attention=config.attention,
        micro_batch=config.micro_batch,
        world=shares.world,
    )
    reading = Reading(config.workers, config.loader, config.data.kept, shares.world.local_size)
    reading = replace(reading, workers=min(reading.workers_for(inference.device), len(splits[0].indices)))
    return Probe(config, weights, inference, splits[0], splits[1], reading, shares)


def _too_few(count: int) -> str:
    return f"a fifth of {count} training videos, on which the penalty is chosen, is none; give it: --linear.l2 0.01"


def _make_folder(out: Path) -> None:
    """Before the work. Raises ValueError, OSError."""
    check(not out.exists() or out.is_dir(), f"--out must be a folder; {out} is a file")
    out.mkdir(parents=True, exist_ok=True)


def _say(probe: Probe) -> None:
    train, test, inference = probe.train, probe.test, probe.inference
    what = f"untrained, of the size of {probe.weights}" if probe.config.random else probe.weights
    sampling = test.reader.sampling
    frames = (f"stride {sampling.stride}" if sampling.kind == "dense" else "uniform") + probe.shares.said
    print(f"encoder   {what} ({weights_hash(inference.model)})")
    classes = counted(probe.num_classes, "class")
    print(f"learns    {len(train.indices):,} of {counted(len(train.videos), 'video')}, {classes}")
    tested = counted(len(test.videos), "video")
    print(f"tested    {len(test.indices):,} of {tested}, {probe.config.views} views, {frames}")
    print(f"device    {inference.device}, {inference.precision}; attention {inference.attention.name}", flush=True)


def _probe(probe: Probe) -> int:
    _say(probe)
    # the test first: whoever gave a damaged one hears of it soon
    test = features_in(probe, probe.test, "test")
    train = features_in(probe, probe.train, "train")
    return _report(probe, measure(probe, train, test)) if probe.shares.world.is_first else 0


def measure(probe: Probe, train: Known, test: Known) -> dict[str, Tensor]:
    """Class probabilities of the readable test videos, by method. Their labels are under "labels"."""
    methods: dict[Method, Callable[[Probe, Known, Known], Tensor]] = {
        "knn": _by_neighbours,
        "linear": _by_regression,
        "linear-paper": _by_paper,
        "attentive": _by_attention,
    }
    found = {"labels": test.labels}
    for method in probe.config.methods:
        begin = time.monotonic()
        found[method] = methods[method](probe, train, test).cpu()
        if not found[method].isfinite().all():
            raise CannotProbe(f"{method} ended with numbers that are not finite")
        print(f"{method}: {time.monotonic() - begin:.1f} s", flush=True)
    return found


def _by_neighbours(probe: Probe, train: Known, test: Known) -> Tensor:
    count, views, _ = test.features.shape
    votes = knn_probabilities(
        train.features[:, 0],
        train.labels,
        test.features.flatten(0, 1),
        probe.num_classes,
        neighbours=probe.config.knn.k,
        temperature=probe.config.knn.temperature,
    )
    return votes.unflatten(0, (count, views)).mean(1)


def _by_regression(probe: Probe, train: Known, test: Known) -> Tensor:
    features, labels = train.features[:, 0], train.labels
    if probe.config.chooses_l2 and len(labels) < 5:
        raise CannotProbe(_too_few(len(labels)))
    l2 = probe.config.linear.l2 or choose_l2(features, labels, probe.num_classes, seed=probe.config.seed)
    probe.chosen["linear.l2"] = l2
    return average_views(fit_linear(features, labels, probe.num_classes, l2=l2)(test.features))


def _by_paper(probe: Probe, train: Known, test: Known) -> Tensor:
    """SGD on augmented clips: the encoder works for every one of them."""
    config, count = probe.config.paper, len(probe.train.indices)
    batch = min(config.batch_size, count)
    steps = max(config.epochs * count // batch, 1)
    width = train.features.shape[-1]
    linear = nn.Linear(width, probe.num_classes)
    nn.init.zeros_(linear.weight)  # the problem is convex
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(width, affine=False) if config.batch_norm else nn.Identity()
    head = nn.Sequential(norm, linear).to(probe.inference.device)
    optimizer = torch.optim.SGD(head.parameters(), momentum=0.9)
    schedule = Schedule(config.lr, 0.0, steps * config.warmup_epochs // config.epochs, steps)
    probe.chosen |= {"paper.batch_size": batch, "paper.steps": steps}
    if batch < config.batch_size:
        few = f"{counted(batch, 'video')} where a batch has {config.batch_size:,}"
        print(f"note: linear-paper: {few}: {counted(steps, 'step')} in all", file=sys.stderr)
    train_head(head, _augmented(probe, batch, steps), optimizer, schedule, _saying("linear-paper", steps))
    with torch.no_grad():
        return average_views(head(test.features.flatten(0, 1)).unflatten(0, test.features.shape[:2]))


def _augmented(probe: Probe, batch: int, steps: int) -> Iterator[Pass]:
    """Features of augmented training clips, a batch for every step."""
    config, split, inference = probe.config, probe.train, probe.inference
    view = split.reader
    reader = MultiScaleReader(
        view.frames,
        view.size,
        view.sampling,
        config.seed,
        config.paper.augment,
        view.nearest or split.videos.videos.step > 1,
    )
    order = Order(len(split.indices), config.seed)
    sizes = [min(_MICRO_BATCH, batch - begin) for begin in range(0, batch, _MICRO_BATCH)]
    starts = (step * batch + begin for step in range(steps) for begin in range(0, batch, _MICRO_BATCH))
    loader = Loader(
        reader,
        [split.videos.videos.paths[index] for index in split.indices],
        (order.samples(start, sizes[number % len(sizes)]) for number, start in enumerate(starts)),
        batch_size=sizes[0],
        workers=probe.reading.workers_for(inference.device),
        config=config.loader,
        cache=probe.reading.cache,
    )
    function = partial(features_of, inference.model)
    features, labels = list[Tensor](), list[int]()
    with loader, feed(loader, inference.device, print) as fed:
        for number, (clips, frames, *_) in enumerate(fed, 1):
            lost = {skip.sample for skip in clips.skips}
            rows = [i for i, sample in enumerate(clips.samples) if sample not in lost]
            features.append(inference(frames, function)[rows].clone())
            labels += [split.videos.labels[split.indices[clips.samples[i].index]] for i in rows]
            if number % len(sizes) == 0:
                if len(labels) > 1:  # of one alone, batch norm has no deviation
                    yield Pass(torch.cat(features), torch.tensor(labels, device=inference.device))
                features, labels = [], []


def _by_attention(probe: Probe, train: Known, test: Known) -> Tensor:
    config, inference = probe.config.attentive, probe.inference
    size = inference.model.size
    torch.manual_seed(probe.config.seed)
    head = AttentiveProbe(size.width, size.heads, probe.num_classes).to(inference.device)
    steps = -(-len(train.labels) // config.batch_size) * config.epochs
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=config.weight_decay)
    schedule = Schedule(config.lr, 0.0, steps // 10, steps)
    train_head(head, _tokens(probe, len(train.labels)), optimizer, schedule, _saying("attentive", steps))
    function = partial(features_of, inference.model, level="token")
    logits = []
    for views in read(probe, probe.test, probe.test.indices):
        if views.indices:
            tokens = inference(views.frames.flatten(0, 1), function)
            with torch.no_grad():
                logits.append(head(tokens.half().float()).unflatten(0, views.frames.shape[:2]))
    return average_views(torch.cat(logits))


def _tokens(probe: Probe, count: int) -> Iterator[Pass]:
    """Tokens of the middle clips of count training videos, in minibatches of every epoch: from memory where they fit,
    else computed anew; through float16 in both cases."""
    config, inference = probe.config.attentive, probe.inference
    model, split = inference.model, probe.train
    size = count * model.input.num_cubes * model.size.width * 2
    places = (inference.device, torch.device("cpu"))
    place = next((place for place in places if size <= memory_budget(place) // 2), None)
    where = f"kept on {place}" if place else "computed anew in every epoch"
    print(f"attentive: {bytes_text(size)} of tokens, {where}", flush=True)
    function = partial(features_of, model, level="token")

    def tokens_of(indices: Sequence[int]) -> Iterator[Pass]:
        for views in read(probe, split, indices, config.batch_size):
            if views.indices:
                tokens = inference(views.frames[:, 0], lambda part: function(part).half())
                yield Pass(tokens.clone(), probe.labels(split, views.indices))

    if place is None:
        for epoch in range(config.epochs):
            order = draw_epoch(len(split.indices), epoch, probe.config.seed)
            yield from tokens_of([split.indices[number] for number in order])
        return
    parts = [(tokens.half().to(place), labels) for tokens, labels in tokens_of(split.indices)]
    tokens, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    for numbers in minibatches(len(labels), config.batch_size, config.epochs, probe.config.seed):
        rows = torch.tensor(numbers)
        yield Pass(tokens[rows.to(place)].to(inference.device).float(), labels[rows.to(labels.device)])


def _saying(method: str, steps: int) -> Callable[[int, Tensor], None]:
    said = time.monotonic()

    def say(step: int, loss: Tensor) -> None:
        nonlocal said
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            print(f"{method}: step {step + 1:,} of {steps:,}, loss {loss.item():.4f}", flush=True)

    return say


def _report(probe: Probe, found: dict[str, Tensor]) -> int:
    """The table, and result.json."""
    labels = found.pop("labels").cpu()
    lost = probe.unreadable["test"]
    # those that could not be read are wrong
    share = len(labels) / (len(labels) + lost)
    accuracy = {
        method: {f"top{k}": share * share_right(probabilities, labels, k) for k in (1, 5)}
        for method, probabilities in found.items()
    }
    print(f"\n{'method':<16}{'top-1':>7}{'top-5':>9}")
    for method, right in accuracy.items():
        print(f"{method:<16}{right['top1']:7.2f}{right['top5']:9.2f}")
    guessed = 100 * torch.bincount(labels).max().item() / len(labels)
    print(f"{'commonest class':<16}{guessed:7.2f}")
    if probe.config.out is not None:
        out = Path(probe.config.out).expanduser()
        text = json.dumps(_result(probe, accuracy, guessed), indent=2) + "\n"
        write_atomically(out / "result.json", lambda file: file.write_text(text))
        print(f"\nwritten: {out / 'result.json'}")
    return 0


def _result(probe: Probe, accuracy: dict[str, dict[str, float]], guessed: float) -> dict[str, Any]:
    sampling = probe.test.reader.sampling
    splits = {"train": probe.train, "test": probe.test}
    return {
        "accuracy": accuracy,
        "commonest_class": guessed,
        "classes": probe.num_classes,
        **{
            name: {
                "videos": len(split.videos),
                "used": len(split.indices),
                "unreadable": probe.unreadable[name],
                "list": split.videos.fingerprint,
            }
            for name, split in splits.items()
        },
        "weights": {"read": probe.weights, "random": probe.config.random, "hash": weights_hash(probe.inference.model)},
        "sampling": {"kind": sampling.kind, "stride": sampling.stride},
        "precision": probe.inference.precision,
        "chosen": probe.chosen,
        "config": flat(probe.config),
        "command": sys.argv,
        **surroundings(),
    }


if __name__ == "__main__":
    run_main(main)
