"""Test a detector: `python -m train.detect --evaluate --weights W --data PATH`.

Writes AVA's csv of detections, the table of frame mAP, and pictures of key frames. Under torchrun the processes share
the key frames, on a GPU each.
"""

import contextlib
import csv
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kernels.launch import check
from train.box_picture import Boxed, draw_boxes
from train.cli import flat
from train.detect_recipes import DETECT, DetectConfig
from train.detection import AT_ONCE, Detections, NotFinite, Scored, inference_of, score_boxes
from train.evaluation import weights_hash
from train.inference import Inference, Reading, find_weights, name_of, read_model
from train.progress import Progress
from train.record import surroundings
from train.run import check_reader, demo_scenes, warn_of
from train.shares import Shares, command
from train.signals import stop_signals
from videomae.data import storage
from videomae.data.box_rows import write_rows
from videomae.data.key_frame_reader import KeyFrameReader, key_frame_image
from videomae.data.key_frames import KeyFrames, find_key_frames
from videomae.data.loader import Skip
from videomae.data.sampling import KeyFrameClip
from videomae.detector import Detector
from videomae.weight_files import write_atomically
from videomae.wording import counted

_SHOWN = 3  # classes of a box in a picture
_LEAST_SHOWN = 0.05  # of their scores
_WORST = 5  # classes on the terminal
# what a test looks at: these sections, but for a field, and these
_SECTIONS, _UNUSED = ("data.", "clip.", "loader."), "data.views_per_decode"
_FIELDS = (
    *("recipe", "evaluate", "weights", "out", "workers", "micro_batch", "device", "precision", "attention"),
    *("pictures", "unreadable", "protocol", "iou"),
)
# those of them that say what is tested, not where and how
_ASKED = (
    *("data.videos", "data.boxes", "data.least_score", "data.starts_at", "data.frames_rate", "data.allow_missing"),
    *("protocol", "iou"),
)


@dataclass
class _Test:
    """All that a test needs."""

    config: DetectConfig
    out: Path
    weights: str
    model: Detector
    clip: KeyFrameClip
    key_frames: KeyFrames
    reader: KeyFrameReader
    inference: Inference
    shares: Shares


def source_of(config: DetectConfig) -> str:
    """Where the key frames are; the demo renders its own. ValueError when nobody said."""
    is_demo = config.data.path is None
    check(not is_demo or config.recipe == "demo", f"recipe {config.recipe} needs --data: key frames, boxes and videos")
    return str(demo_scenes()) if config.data.path is None else config.data.path


def find_set(
    config: DetectConfig, source: str, split: str, *, like: KeyFrames | None = None, model: Detector | None = None
) -> KeyFrames:
    """The key frames of a split, their classes numbered as those of like, or as model's head. Raises ValueError."""
    data = config.data
    known = like or model
    return find_key_frames(
        source,
        split,
        videos=data.videos,
        boxes=data.boxes if split != "train" else None,
        score_at_least=data.least_score,
        starts_at=data.starts_at,
        frames_rate=data.frames_rate,
        classes=None if known is None else known.classes,
        allow_missing=data.allow_missing,
    )


def _changed(config: DetectConfig) -> dict[str, Any]:
    """What is not as in the recipe, by flag."""
    recipe = flat(DETECT[config.recipe]())
    return {key: value for key, value in flat(config).items() if value != recipe[key]}


def flags_of_test(config: DetectConfig) -> list[str]:
    """Those of a training run that its test needs as well."""
    found = {_flag(key): value for key, value in _changed(config).items() if key in _ASKED}
    texts = {flag: str(value).lower() if isinstance(value, bool) else str(value) for flag, value in found.items()}
    return [word for flag, text in texts.items() for word in (flag, text)]


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _check_flags(config: DetectConfig) -> None:
    """ValueError for flags that say nothing to a test."""
    read = (*_FIELDS, *(key for key in flat(config) if key.startswith(_SECTIONS) and key != _UNUSED))
    unread = [_flag(key) for key in _changed(config) if key not in read]
    check(not unread, f"a test takes the model as it is, and does not train: leave out {', '.join(unread)}")


def make_writable(out: Path) -> None:
    """Make the folder and write in it, before the work and not after it. ValueError where that fails."""
    check(not out.exists() or out.is_dir(), f"{out} is a file; --out is a folder for the results")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"cannot write in --out {out}: {error.strerror}") from error


def said(clip: KeyFrameClip) -> str:
    """In words."""
    rate = "" if clip.rate is None else f" at {clip.rate:g} frames a second"
    return f"stride {clip.stride}{rate}, short side {clip.short_side}"


def read_detector(source: str) -> tuple[Detector, tuple[str, ...]]:
    """The detector in these weights, and what is to be said of loading it. ValueError where they are of none."""
    model, report = read_model(source)
    if not isinstance(model, Detector):
        raise ValueError(f"{source} holds no detector: train one first (python -m train.detect --weights {source})")
    return model, report.messages


def evaluate(config: DetectConfig, prog: str) -> int:
    """Run the test; returns its exit code: 0 done, 1 without a result, 2 wrong use, 130 and 143 stopped by Ctrl-C,
    SIGTERM."""
    work = partial(_evaluate, prog)
    return command(partial(_prepare, config), work, prog=prog, device=config.device, stops=NotFinite)


def _evaluate(prog: str, test: _Test) -> int:
    _say_plan(test)
    begin, shares = time.monotonic(), test.shares
    with stop_signals("these key frames; once more to stop at once") as stop:
        own = _score(test, stop)
        if not shares.wait("scored", stop):
            print(f"{prog}: stopped, without a result", file=sys.stderr)
            return 128 + stop[0]
        everyones = shares.gather(own)
    if not shares.world.is_first:
        return 0
    found = Detections(test.key_frames)
    for scored, _ in everyones:
        found.add(scored)
    lost = sorted((skip for _, skips in everyones for skip in skips), key=lambda skip: skip.sample.index)
    if lost and test.config.unreadable == "error":
        return _refuse_unreadable(prog, lost, len(test.key_frames))
    _report(test, found, lost, time.monotonic() - begin)
    return 0


def _prepare(config: DetectConfig, shares: Shares, _: contextlib.ExitStack) -> _Test:
    """Everything that can be refused, before the first clip is read."""
    _check_flags(config)
    weights = config.weights
    if weights is None and config.recipe == "demo" and Path("runs/detect-demo").exists():
        weights = "runs/detect-demo"
    check(weights is not None, "nothing to test: give --weights, a run folder or a weights file")
    assert weights is not None
    weights = find_weights(weights)
    model, messages = read_detector(weights)
    for message in messages:
        print(f"note: {message}", file=sys.stderr)
    clip = clip_of(model, config.clip, DETECT[config.recipe]().clip)
    source = config.data.val or source_of(config)
    storage.configure(config.data.cache_of(source))
    key_frames = find_set(config, source, "val", model=model)
    warn_of(key_frames.videos)
    # of detected boxes a note says so already
    if config.data.boxes is None and (missing := _missing(key_frames)):
        print(f"warning: boxes of {missing:,} annotated key frames count as missed", file=sys.stderr)
    check_reader(config.data, key_frames.videos)
    check(
        len(key_frames.classes) == model.head.out_features,
        f"{source} has {counted(len(key_frames.classes), 'class')}, the detector {model.head.out_features}",
    )
    reader = KeyFrameReader.for_test(key_frames, clip, model.input.frames, decoder=config.data.decoder)
    inference = inference_of(
        *(model, key_frames, clip.short_side),
        device=config.device,
        precision=config.precision,
        attention=config.attention,
        micro_batch=config.micro_batch,
        world=shares.world,
    )
    out = Path(config.out or f"runs/evaluate-{name_of(weights)}")
    make_writable(out)
    return _Test(config, out, weights, model, clip, key_frames, reader, inference, shares)


def clip_of(model: Detector, asked: KeyFrameClip, usual: KeyFrameClip) -> KeyFrameClip:
    """As the weights were trained, unless what is asked for is not the usual; says what may be wrong."""
    stated = model.key_clip
    if stated is None:
        taken = f"as {model.input.frames} frames, {said(asked)}"
        print(f"note: the weights do not say how clips were taken in training: {taken} here", file=sys.stderr)
        return asked
    if asked in (stated, usual):
        return stated
    print(f"note: clips were {said(stated)} in training and are {said(asked)} here", file=sys.stderr)
    return asked


def _missing(key_frames: KeyFrames) -> int:
    """Annotated key frames that are not to be tested, for want of a video or of boxes."""
    rows = key_frames.ground_truth
    annotated = {(rows.names[video], second) for video, second in zip(rows.video, rows.second.tolist(), strict=True)}
    there = set(zip(key_frames.names, key_frames.seconds.tolist(), strict=True))
    return len(annotated - there - set(key_frames.excluded))


def _say_plan(test: _Test) -> None:
    frames, attention = test.key_frames, test.inference.attention
    print(f"test      {test.out}")
    print(f"weights   {test.weights} ({weights_hash(test.model)}): {counted(len(frames.classes), 'class')}")
    print(
        f"data      {counted(len(frames), 'key frame')} ({frames.fingerprint}), "
        f"{counted(frames.num_boxes, 'box')} {frames.boxes_from}"
        f"{test.shares.said}"
    )
    print(f"clip      {test.model.input.frames} frames, {said(test.clip)}, whole frames")
    print(
        f"device    {test.inference.device}, {test.inference.precision}; attention {attention.name} ({attention.why})"
    )
    sys.stdout.flush()


def _score(test: _Test, stop: list[int]) -> tuple[list[Scored], list[Skip]]:
    """This process's share."""
    shares, found, lost = test.shares, list[Scored](), list[Skip]()
    mine = shares.take(len(test.key_frames), AT_ONCE)
    reading = Reading(test.config.workers, test.config.loader, processes=shares.world.local_size)
    with Progress(len(mine), unit=shares.unit("key frames")) as progress:
        for scored, skips in score_boxes(
            test.inference, test.key_frames, test.reader, reading=reading, say=progress.say, indices=mine
        ):
            found += scored
            lost += skips
            for skip in skips:
                progress.say(f"unreadable: {skip.path}: {skip.reason}")
            progress.advance(len(scored) + len(skips))
            if stop:
                break
    return found, lost


def _refuse_unreadable(prog: str, lost: list[Skip], total: int) -> int:
    print(f"{prog}: no result: {len(lost):,} of {counted(total, 'key frame')} cannot be read", file=sys.stderr)
    for skip in lost:
        print(f"  {skip.path}: {skip.reason}", file=sys.stderr)
    print("repair these, or count their boxes as missed with --unreadable missed", file=sys.stderr)
    return 1


def _report(test: _Test, found: Detections, lost: list[Skip], seconds: float) -> None:
    config, out = test.config, test.out
    write_rows(out / "detections.csv", found.rows())
    measured = found.measure(iou=config.iou, protocol=config.protocol)
    _write_table(test, measured, out / "per_class.csv")
    drawn = _draw(test, found)
    result = {
        "mAP": measured["mAP"],
        "per_group": measured["per_group"],
        "per_class": {str(label): value for label, value in measured["per_class"].items()},
        "protocol": _card(test),
        "unreadable": [{"path": skip.path, "reason": skip.reason} for skip in lost],
        "weights": test.weights,
        "seconds": round(seconds, 3),
        "config": flat(config),
        "command": sys.argv,
        **surroundings(),
    }
    text = json.dumps(result, indent=2) + "\n"
    # last: where it is, all of it is
    write_atomically(out / "result.json", lambda file: file.write_text(text))
    _say_result(test, measured, len(lost), seconds, drawn)


def _card(test: _Test) -> dict[str, Any]:
    """What the numbers depend on, beside rounding: with one card they can be compared, where the weights differ."""
    frames, data = test.key_frames, test.config.data
    return {
        "iou": test.config.iou,
        "protocol": test.config.protocol,
        "clip": f"{test.model.input.frames} frames, {said(test.clip)}",
        "boxes": frames.boxes_from,
        "least_score": data.least_score if data.boxes else None,
        "key_frames": len(frames),
        "list": frames.fingerprint,
        "classes": len(frames.evaluated),
        "mean": list(test.model.input.mean),
        "std": list(test.model.input.std),
        "weights": weights_hash(test.model),
        "precision": test.inference.precision,
        "unreadable": test.config.unreadable,
        "missing": _missing(frames),
    }


def _write_table(test: _Test, measured: dict[str, Any], path: Path) -> None:
    """A line for every class that counts: its AP in per cent, and how many boxes are annotated with it."""
    frames = test.key_frames
    names = dict(zip(frames.class_ids, frames.classes, strict=True))
    counts = dict(zip(*np.unique(frames.ground_truth.label, return_counts=True), strict=True))
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(("id", "class", "annotated", "AP"))
        for label in frames.evaluated:
            value = measured["per_class"].get(label)
            shown = "" if value is None else f"{100 * value:.2f}"
            table.writerow((label, names[label], int(counts.get(label, 0)), shown))


def _draw(test: _Test, found: Detections) -> int:
    """Key frames evenly spread over those that were read; how many."""
    frames, wanted = test.key_frames, test.config.pictures
    read = [i for i in range(len(frames)) if found.scores_of(i) is not None]
    chosen = sorted({read[len(read) * k // wanted] for k in range(wanted)}) if read and wanted else []
    folder = test.out / "pictures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()  # of an earlier test
    for index in chosen:
        scores, boxes = found.scores_of(index), frames.boxes_of(index)
        assert scores is not None
        truth = frames.annotated(index)
        boxed = [
            Boxed(box, best_classes(row, frames.classes), None if truth is None else truth[place])
            for place, (box, row) in enumerate(zip(boxes, scores, strict=True))
        ]
        name, second = frames.names[index], frames.seconds[index]
        image = key_frame_image(test.reader, frames.videos.paths[index], index)
        sheet = draw_boxes(image, boxed, f"{Path(name).name}, second {second:g}")
        sheet.save(folder / f"{index:06d}.png")
    return len(chosen)


def best_classes(scores: np.ndarray, names: tuple[str, ...]) -> list[tuple[str, float]]:
    """The likeliest classes of a box with their scores; none but the first where it is small."""
    order = np.argsort(-scores, kind="stable")[:_SHOWN]
    return [(names[c], float(scores[c])) for n, c in enumerate(order) if n == 0 or scores[c] >= _LEAST_SHOWN]


def _say_result(test: _Test, measured: dict[str, Any], lost: int, seconds: float, drawn: int) -> None:
    frames, config = test.key_frames, test.config
    names = dict(zip(frames.class_ids, frames.classes, strict=True))
    missed = f"; {lost:,} could not be read, their boxes count as missed" if lost else ""
    rate = f", {len(frames) / seconds:,.2f} a second" if seconds else ""
    print(f"\nmAP@{config.iou:<5g} {100 * measured['mAP']:6.2f} %   {len(measured['per_class'])} classes{missed}")
    if len(measured["per_group"]) > 1:
        for group, value in measured["per_group"].items():
            print(f"{'':<10}{100 * value:6.2f} %   {group.replace('_', ' ')}")
    worst = sorted(measured["per_class"].items(), key=lambda item: item[1])[:_WORST]
    for number, (label, value) in enumerate(worst):
        print(f"{'worst' if number == 0 else '':<10}{100 * value:6.2f} %   {names[label]}")
    pictures = f", pictures/ ({drawn})" if drawn else ""
    print(f"time      {seconds:,.1f} s for {counted(len(frames), 'key frame')}{rate}")
    print(f"files     {test.out}/result.json, detections.csv, per_class.csv{pictures}")
