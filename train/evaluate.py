"""Test a classifier: `python -m train.evaluate [RECIPE] --data PATH --weights W [--out DIR] [--views 5x3]`.

Every video is decoded once for all its views, and counted once. Killed at any moment, the same command goes on. Under
torchrun the processes share the work, on a GPU each; with --shard i/n, n commands do in one --out, at any time, and the
last gives the result.
"""

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from kernels.launch import check
from train.cli import flat, parse
from train.evaluation import (
    AS_TRAINED,
    EVALUATE,
    EvaluateConfig,
    find_tested,
    names_of,
    protocol_card,
    read_classifier,
    said,
    view_reader,
)
from train.inference import Inference, Reading, Views, find_weights, name_of, read_views
from train.predictions import Predictions, Row, claim
from train.progress import Progress
from train.record import surroundings
from train.run import demo_list, warn_of
from train.scores import Scores, draw_confusion, score, write_tables
from train.shares import Shares, command
from train.signals import stop_signals
from videomae.classifier import Classifier
from videomae.command_line import run_main
from videomae.data import storage
from videomae.data.labelled import LabelledVideos
from videomae.data.readers import ViewReader
from videomae.metrics import average_views
from videomae.weight_files import write_atomically
from videomae.wording import counted

PROG = "python -m train.evaluate"
_WORST = 5  # classes on the terminal


class NotFinite(Exception):
    """The model gives numbers that are none: there is no result."""


@dataclass
class Evaluation:
    """All that the loop needs."""

    config: EvaluateConfig
    out: Path
    weights: str  # what was read
    model: Classifier
    inference: Inference
    videos: LabelledVideos
    reader: ViewReader
    card: dict[str, Any]
    shares: Shares

    @property
    def mine(self) -> range:
        """This process's videos."""
        part, parts = self.config.part
        return range(part, len(self.videos), parts)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The head's classes: their names, or else their numbers."""
        count = self.model.head.out_features
        data = self.videos.classes if len(self.videos.classes) == count else tuple(map(str, range(count)))
        return names_of(self.model) or data


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 without a result, 2 wrong use, 130 and 143 stopped by Ctrl-C,
    SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    about = "Test a classifier on labelled videos, over several views of each."
    example = f"{PROG} k400 --data k400 --weights runs/finetune-k400-base-1600"
    config = parse(arguments, EVALUATE, AS_TRAINED, prog=PROG, about=about, examples=[example])
    after = "; the same command goes on"
    return command(partial(_begin, config), _evaluate, prog=PROG, device=config.device, stops=NotFinite, after=after)


def _begin(config: EvaluateConfig, shares: Shares, _: contextlib.ExitStack) -> tuple[Evaluation, Predictions]:
    evaluation = prepare(replace(config, shard=shares.shard(config.shard)), shares)
    return evaluation, Predictions(evaluation.out, evaluation.config.part, evaluation.model.head.out_features)


def prepare(config: EvaluateConfig, shares: Shares) -> Evaluation:
    """Everything that can be refused, before the first video is read. Raises ValueError for what the user can mend."""
    path = config.data.path
    if path is None and config.recipe == "demo":
        path = str(demo_list("test"))
    check(path is not None, "nothing to test on: give --data, a folder of videos or a list file")
    check(config.weights is not None, "nothing to test: give --weights, a run folder or a weights file")
    assert path is not None
    assert config.weights is not None
    made_before = config.weights != EVALUATE["demo"]().weights or Path(config.weights).exists()
    check(made_before, f"no {config.weights}: `python -m train.finetune demo` makes it; or give --weights")
    weights = find_weights(config.weights)
    model, messages = read_classifier(weights)
    for message in messages:
        print(f"note: {message}", file=sys.stderr)
    stated = model.input.sampling
    sampling = config.sampling.resolve(stated)
    if stated not in (None, sampling):
        print(f"note: sampling was {said(stated)} in training and is {said(sampling)} here", file=sys.stderr)
    storage.configure(config.data.kept)
    videos = find_tested(path, config.data.split, model, config.data.root)
    warn_of(videos.videos)
    allowed = config.data.allow_nearest
    reader = view_reader(model.input, sampling, config.views, step=videos.videos.step, allow_nearest=allowed)
    inference = Inference(
        model,
        device=config.device,
        precision=config.precision,
        attention=config.attention,
        micro_batch=config.micro_batch,
        world=shares.world,
    )
    card = protocol_card(model, reader, videos, average=config.average, precision=inference.precision)
    out = Path(config.out or f"runs/evaluate-{_name(config, weights)}")
    started = {"command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "config": flat(config)}
    claim(out, card, {**started, **surroundings()})
    return Evaluation(config, out, weights, model, inference, videos, reader, card, shares)


def _name(config: EvaluateConfig, weights: str) -> str:
    """Of the results' folder."""
    if config.recipe != AS_TRAINED:
        return config.recipe
    return name_of(weights)


def _say_protocol(evaluation: Evaluation) -> None:
    config, card, inference = evaluation.config, evaluation.card, evaluation.inference
    part = f", part {config.shard}: {len(evaluation.mine):,}" if config.shard != "0/1" else ""
    part = evaluation.shares.said or part
    print(f"evaluate  {evaluation.out}")
    print(f"weights   {evaluation.weights} ({card['weights']}): {counted(card['classes'], 'class')}")
    print(f"data      {config.data.path or 'data/demo'} ({card['list']}): {counted(card['videos'], 'video')}{part}")
    print(f"views     {card['views']} clips x crops of {card['clip']}, {card['sampling']}; {card['average']}")
    nearest = f"; frames: {card['frames']}" if evaluation.reader.nearest else ""
    print(f"pixels    {card['resize']}; crops {card['crops']}{nearest}")
    attention = inference.attention
    print(f"device    {inference.device}, {inference.precision}; attention {attention.name} ({attention.why})")
    sys.stdout.flush()


def _evaluate(begun: tuple[Evaluation, Predictions]) -> int:
    """The loop, and what comes of it; the exit code."""
    evaluation, predictions = begun
    shares = evaluation.shares
    _say_protocol(evaluation)
    with predictions, stop_signals() as stop:
        rows, retry = predictions.rows, evaluation.config.unreadable == "error"
        todo = [i for i in evaluation.mine if i not in rows or (retry and rows[i].unreadable is not None)]
        if len(todo) < len(evaluation.mine):
            done = len(evaluation.mine) - len(todo)
            print(f"going on  {done:,} of {len(evaluation.mine):,} {shares.unit('videos')} are done", flush=True)
        _predict(evaluation, predictions, todo, stop)
        if not shares.wait("predicted", stop):
            print("\nStopped; the same command goes on from here.")
            return 128 + stop[0]
        if not shares.world.is_first:
            return 0
        if not predictions.join(len(evaluation.videos)):
            return _report_part(evaluation, predictions)
    return _report(evaluation, predictions)


def _predict(evaluation: Evaluation, predictions: Predictions, todo: Sequence[int], stop: list[int]) -> None:
    config, inference = evaluation.config, evaluation.inference
    reading = Reading(config.workers, config.loader, config.data.kept, evaluation.shares.world.local_size)
    # more processes than videos would only be started
    reading = replace(reading, workers=min(reading.workers_for(inference.device), len(todo)))
    paths, labels = evaluation.videos.videos.paths, evaluation.videos.labels
    unit = evaluation.shares.unit("videos")
    with Progress(len(evaluation.mine), len(evaluation.mine) - len(todo), unit) as progress:
        videos = read_views(
            evaluation.reader,
            paths,
            todo,
            views=evaluation.reader.views,
            device=inference.device,
            reading=reading,
            say=progress.say,
        )
        for views in videos:
            made = [Row(s.sample.index, s.path, labels[s.sample.index], 0, unreadable=s.reason) for s in views.skips]
            for row in made:
                progress.say(f"unreadable: {row.path}: {row.unreadable}")
            vectors = _probabilities(evaluation, views)
            made += [Row(i, paths[i], labels[i], 0, vector) for i, vector in zip(views.indices, vectors, strict=True)]
            predictions.append(made)
            progress.advance(len(made))
            if stop:
                return


def _probabilities(evaluation: Evaluation, views: Views) -> Any:
    """float32 [videos, C], in host memory."""
    if not views.indices:
        return ()
    logits = evaluation.inference(views.frames.flatten(0, 1)).unflatten(0, views.frames.shape[:2])
    probabilities = average_views(logits, evaluation.config.average).cpu()
    for index, vector in zip(views.indices, probabilities, strict=True):
        if not vector.isfinite().all():
            path, precision = evaluation.videos.videos.paths[index], evaluation.inference.precision
            raise NotFinite(f"the model's outputs for {path} are not finite, in {precision}")
    return probabilities.numpy()


def _report_part(evaluation: Evaluation, predictions: Predictions) -> int:
    """What a process says whose part is done, where others' are not."""
    rows = predictions.rows
    print(
        f"\npart {evaluation.config.shard} is done; {len(rows):,} of {counted(len(evaluation.videos), 'video')} are: "
        "the last "
        "part to finish gives the result"
    )
    lost = [rows[i] for i in evaluation.mine if rows[i].unreadable is not None]
    if lost and evaluation.config.unreadable == "error":
        return _refuse_unreadable(evaluation, lost)
    return 0


def _report(evaluation: Evaluation, predictions: Predictions) -> int:
    """All videos have rows: the result, or why there is none; the exit code."""
    rows = predictions.rows
    lost = [row for row in rows.values() if row.unreadable is not None]
    if lost and evaluation.config.unreadable == "error":
        return _refuse_unreadable(evaluation, lost)
    scores = score(rows, evaluation.classes)
    write_tables(scores, evaluation.out)
    title = f"{evaluation.config.recipe}: top-1 {scores.top1:.2f} % of {counted(len(rows), 'video')}"
    draw_confusion(scores, evaluation.out / "confusion.png", title)
    result = _result(evaluation, scores, list(rows.values()))
    text = json.dumps(result, indent=2) + "\n"
    # last: where it is, all of it is
    write_atomically(evaluation.out / "result.json", lambda file: file.write_text(text))
    _say_result(evaluation, scores, len(lost), result["seconds"])
    return 0


def _refuse_unreadable(evaluation: Evaluation, lost: Sequence[Row]) -> int:
    """Name the videos without which there is no result."""
    known = "" if len(evaluation.mine) == len(evaluation.videos) else ", of those known by now"
    print(
        f"{PROG}: no result: {len(lost):,} of {counted(len(evaluation.videos), 'video')} cannot be read{known}",
        file=sys.stderr,
    )
    for row in lost:
        print(f"  {row.path}: {row.unreadable}", file=sys.stderr)
    print(
        "what was predicted is kept: repair these and give the same command again, which reads only these; or count "
        "them as wrong with --unreadable wrong, which reads nothing",
        file=sys.stderr,
    )
    return 1


def _result(evaluation: Evaluation, scores: Scores, rows: Sequence[Row]) -> dict[str, Any]:
    lost = [{"path": row.path, "reason": row.unreadable} for row in rows if row.unreadable is not None]
    seconds = sum(row.seconds for row in rows)
    inference = evaluation.inference
    return {
        "top1": round(scores.top1, 4),
        "top5": round(scores.top5, 4),
        "mean_class_top1": round(scores.mean_class_top1, 4),
        "videos": len(rows),
        "unreadable": len(lost),
        "protocol": {**evaluation.card, "unreadable": evaluation.config.unreadable},
        "unreadable_videos": lost,
        "weights": evaluation.weights,
        # of all processes together
        "seconds": round(seconds, 3),
        "videos_per_second": round(len(rows) / seconds, 3) if seconds else None,
        "device": str(inference.device),
        "attention": f"{inference.attention.name} ({inference.attention.why})",
        "config": flat(evaluation.config),
        "command": sys.argv,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **surroundings(),
    }


def _say_result(evaluation: Evaluation, scores: Scores, lost: int, seconds: float) -> None:
    total, right, names = int(scores.videos.sum()), int(scores.right1.sum()), scores.classes
    wrong = f"; {lost:,} could not be read and count as wrong" if lost else ""
    rate = f", {total / seconds:,.2f} videos a second" if seconds else ""
    print(f"\ntop-1     {scores.top1:6.2f} %   {right:,} of {counted(total, 'video')}{wrong}")
    print(f"top-5     {scores.top5:6.2f} %   in {seconds:,.1f} s of work{rate}")
    for number, (label, share, taken_for) in enumerate(scores.worst(_WORST)):
        confused = "" if taken_for is None else f", mostly taken for {names[taken_for]}"
        head = "worst" if number == 0 else ""
        print(f"{head:<10}{share:6.2f} %   {names[label]}: {counted(int(scores.videos[label]), 'video')}{confused}")
    print(f"files     {evaluation.out}/result.json, predictions.jsonl, per_class.csv, confusion.csv, confusion.png")


if __name__ == "__main__":
    run_main(main)
