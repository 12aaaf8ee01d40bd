"""What is in a video: `python -m train.predict VIDEO [VIDEO ...] --weights W [--views 5x3] [--top 5] [--json]`.

VIDEO is a file or a folder of them. Views are those of `train.evaluate`: sampled as the weights were trained. With
`--detector W --boxes BOXES` in place of the weights: what each box does, see predict_boxes.py.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kernels.launch import check
from train.cli import show_any_name, user_errors
from train.evaluation import AskedSampling, names_of, parse_views, read_classifier, view_reader
from train.inference import Inference, Reading, read_views
from train.predict_boxes import predict_boxes
from train.shares import refuse_several
from videomae.command_line import Parser, run_main
from videomae.data.dataset import find_named
from videomae.data.readers import ViewReader
from videomae.metrics import AVERAGES, average_views

PROG = "python -m train.predict"
_FEW = 8  # videos that are read before worker processes would have started


class _Prepared(NamedTuple):
    paths: tuple[str, ...]
    reader: ViewReader
    inference: Inference
    classes: tuple[str, ...]
    reading: Reading


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 a video could not be read, 2 wrong use, 130 stopped by
    Ctrl-C."""
    options = _parser().parse_args(arguments)
    show_any_name()
    try:
        with user_errors(PROG):
            refuse_several("it shows a few videos, in one process; of many: torchrun -m train.evaluate, train.features")
            _check(options)
            check((options.weights is None) != (options.detector is None), "give --weights, or --detector and --boxes")
            if options.detector is not None:
                return predict_boxes(find_named(options.videos)[0], options, PROG)
            check(options.boxes is None, "--boxes are for a detector: --detector W in place of --weights")
            prepared = _prepare(options)
        unread = 0
        for path, found in _predictions(prepared, options.average):
            if isinstance(found, str):
                unread += 1
                print(f"{PROG}: {path}: {found}", file=sys.stderr)
            else:
                _say(path, found, prepared.classes, options)
        return 1 if unread else 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        PROG,
        "Classify videos: the most probable classes of each.",
        example=f"{PROG} VIDEO --weights runs/finetune-mine",
    )
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="a file, or a folder of videos")
    add = parser.add_argument_group("by what").add_argument
    add("--weights", metavar="W", help="a run folder, checkpoint, file, Hugging Face folder or hub id")
    add("--detector", metavar="W", help="weights of a detector instead (train.detect): what each of --boxes does")
    add("--boxes", metavar="CSV", help="second,x1,y1,x2,y2 of a detector's key frames, and path for several videos")
    add = parser.add_argument_group("what of them").add_argument
    add("--views", metavar="CLIPSxCROPS", help="of each video (5x3 of dense sampling, 2x3 of uniform)")
    add("--average", choices=AVERAGES, default="prob", help="views by their probabilities (default) or logits")
    add("--sampling.kind", dest="kind", choices=("dense", "uniform"), help="(as the weights say)")
    add("--sampling.stride", dest="stride", type=int, metavar="S", help="of dense sampling (as the weights say)")
    add("--allow-nearest", action="store_true", help="frames that a prepared set does not hold: take the nearest")
    add = parser.add_argument_group("what is said").add_argument
    add("--top", type=int, default=5, metavar="N", help="classes to be shown (5)")
    add("--json", action="store_true", help="a JSON object a line instead of text")
    add("--out", metavar="DIR", default="runs/predict", help="folder of a detector's pictures (runs/predict)")
    add = parser.add_argument_group("how fast").add_argument
    add("--workers", type=int, metavar="N", help=f"decoding processes (by the cores; none for {_FEW} videos or fewer)")
    add("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    add("--precision", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="(auto)")
    return parser


def _check(options: argparse.Namespace) -> None:
    check(options.top >= 1, f"--top must be at least 1; got {options.top}")
    check(options.workers is None or options.workers >= 0, f"--workers must not be negative; got {options.workers}")
    if options.detector is not None:
        of_views = {"--views": options.views, "--sampling.kind": options.kind, "--sampling.stride": options.stride}
        given = [flag for flag, value in of_views.items() if value is not None]
        given += ["--average"] if options.average != "prob" else []
        given += ["--allow-nearest"] if options.allow_nearest else []
        check(not given, f"a detector sees whole frames around each key frame: leave out {', '.join(given)}")


def _prepare(options: argparse.Namespace) -> _Prepared:
    """Raises ValueError for what the user can mend; videos are looked at later."""
    if options.views is not None:
        parse_views(options.views)
    asked = AskedSampling(options.kind, options.stride)
    paths, step = find_named(options.videos)
    model, messages = read_classifier(options.weights)
    for message in messages:
        print(f"note: {message}", file=sys.stderr)
    sampling = asked.resolve(model.input.sampling)
    reader = view_reader(model.input, sampling, options.views, step=step, allow_nearest=options.allow_nearest)
    inference = Inference(model, device=options.device, precision=options.precision)
    classes = names_of(model) or tuple(map(str, range(model.head.out_features)))
    workers = options.workers
    if workers is None:
        workers = 0 if len(paths) <= _FEW else min(Reading().workers_for(inference.device), len(paths))
    return _Prepared(paths, reader, inference, classes, Reading(workers))


def _predictions(prepared: _Prepared, average: Any) -> Iterator[tuple[str, Tensor | str]]:
    """Each video with its class probabilities, or the reason why it cannot be read."""
    paths, reader, inference = prepared.paths, prepared.reader, prepared.inference
    indices = range(len(paths))
    all_views = read_views(
        reader, paths, indices, views=reader.views, device=inference.device, reading=prepared.reading
    )
    for views in all_views:
        found: dict[int, Tensor | str] = {skip.sample.index: skip.reason for skip in views.skips}
        if views.indices:
            logits = inference(views.frames.flatten(0, 1)).unflatten(0, views.frames.shape[:2])
            found |= dict(zip(views.indices, average_views(logits, average).cpu(), strict=True))
        yield from ((paths[index], value) for index, value in found.items())


def _say(path: str, probabilities: Tensor, classes: tuple[str, ...], options: argparse.Namespace) -> None:
    values, labels = probabilities.topk(min(options.top, len(classes)))
    best = [(label, classes[label], value) for value, label in zip(values.tolist(), labels.tolist(), strict=True)]
    if options.json:
        top = [{"label": label, "class": name, "probability": round(value, 6)} for label, name, value in best]
        print(json.dumps({"video": path, "top": top}), flush=True)
        return
    print(path)
    for _, name, value in best:
        print(f"{100 * value:7.2f} %  {name}", flush=True)


if __name__ == "__main__":
    run_main(main)
