"""What report pages are made of: escaped text, tables, pictures inside the page, charts."""

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from train.report_curves import COLOURS, LONGEST, Curve, axis, draw
from train.report_run import FoundRun

_AS_IT_IS, _WIDEST, _QUALITY = 200_000, 1600, 80  # bytes of a file; pixels and quality of what a larger one becomes
_WIDE = 700  # pixels from which a picture has a row to itself


class Html(str):
    """Text that is not escaped once more."""


class Measure(NamedTuple):
    """What is drawn of one name in metrics.jsonl or evaluations.jsonl."""

    name: str
    title: str
    hint: str = ""
    zero: bool = True  # the axis begins there
    log: bool = False  # it may be logarithmic
    most: float | None = None  # and reaches at least so far


METRICS: tuple[Measure, ...] = (
    Measure("loss", "Loss", "of the training; mean since the point before", zero=False, log=True),
    Measure("grad_norm", "Gradient norm", "before any clipping; a spike is worth a look", log=True),
    Measure("lr", "Learning rate", "as scheduled"),
    Measure("clips_per_second", "Clips per second", "trained on; higher is faster"),
    Measure("data_wait", "Waiting for data", "share of the time; above 0.05 is worth a change", most=0.1),
    Measure("batches_ready", "Batches ready", "decoded ahead of a step; at 0 it waits"),
    Measure("decode_ms", "Decoding", "a worker's milliseconds for a video"),
    Measure("skipped_clips", "Clips skipped", "that could not be read, so far"),
    Measure("nonfinite_steps", "Steps not finite", "left out of the training, so far"),
)
EVALUATIONS: tuple[Measure, ...] = (
    Measure("val_top1", "Validation, top-1", "per cent of the videos", most=100),
    Measure("val_top5", "Validation, top-5", "per cent of the videos", most=100),
    Measure("val_map", "Validation, frame mAP", "per cent", most=100),
    Measure("probe_knn", "Probe: nearest neighbours", "per cent right, on frozen features", most=100),
    Measure("probe_linear", "Probe: linear", "per cent right, on frozen features", most=100),
    Measure("val_loss", "Validation loss", zero=False, log=True),
    Measure("contrast_top1", "Contrast, top-1", "per cent of the clips whose other view is found", most=100),
    Measure("query_spread", "Spread of queries", "1: everywhere; 0: all the same, a collapse"),
    Measure("feature_spread", "Spread of features", "1: everywhere; 0: all the same, a collapse"),
)
_ACCURACIES = 5  # of them, which one run has in one chart
_NEVER = ("time",)
_IF_ANY = ("skipped_clips", "nonfinite_steps", "val_unreadable")  # drawn where they are not all 0


def text(value: Any) -> str:
    """Escaped; None, switches and lists as flags have them."""
    if isinstance(value, Html):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return " ".join(map(text, value))
    return '<span class="soft">none</span>' if value is None else escape(str(value))


def code(value: Any) -> Html:
    return Html(f"<code>{text(value)}</code>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, numbers: Sequence[int] = ()) -> str:
    """numbers: columns that are set right."""
    kinds = [' class="number"' if place in numbers else "" for place in range(len(head))]
    titles = "".join(f'<th scope="col"{kind}>{text(cell)}</th>' for cell, kind in zip(head, kinds, strict=True))
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        if any(head)
        else f'<div class="scroll"><table><tbody>{"".join(lines)}</tbody></table></div>'
    )


def fold(title: str, inside: str) -> str:
    return f"<details><summary>{text(title)}</summary>{inside}</details>"


def csv_table(path: Path) -> tuple[str, int]:
    """A file with a header, and how many lines it has beside that."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        head, *rows = [*csv.reader(file)] or [[]]
    rows = [row for row in rows if len(row) == len(head)]
    numbers = [place for place, name in enumerate(head) if place > 0 and name != "class"]
    return table(head, rows, numbers=numbers), len(rows)


def picture(path: Path, title: str) -> str:
    """A figure with the file inside the page; a large one as WebP, a damaged one as a line that says so."""
    try:
        with Image.open(path) as image:
            image.load()
            data, kind, size = _encoded(path, image)
    except (OSError, SyntaxError, ValueError) as error:
        return f'<p class="warn">{text(path.name)} cannot be read: {text(error)}</p>'
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    shown = f'<img src="{source}" width="{size[0]}" height="{size[1]}" alt="{text(title)}">'
    wide = size[0] > _WIDE
    shown = f'<div class="scroll">{shown}</div>' if wide else shown
    opening = '<figure class="wide">' if wide else "<figure>"
    return f"{opening}<figcaption>{text(title)}</figcaption>{shown}</figure>"


def _encoded(path: Path, image: Image.Image) -> tuple[bytes, str, tuple[int, int]]:
    if path.stat().st_size <= _AS_IT_IS and image.format == "PNG":
        return path.read_bytes(), "png", image.size
    plain = image.convert("RGB")
    if plain.width > _WIDEST:
        plain = plain.resize((_WIDEST, max(round(plain.height * _WIDEST / plain.width), 1)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    plain.save(buffer, "WEBP", quality=_QUALITY)
    return buffer.getvalue(), "webp", plain.size


def pictures(chosen: Sequence[tuple[Path, str]]) -> str:
    return f'<div class="pictures">{"".join(picture(path, title) for path, title in chosen)}</div>'


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """The first, the last, and evenly spread ones between; the last alone where there is room for one."""
    if len(paths) <= most:
        return list(paths)
    if most == 1:
        return [paths[-1]]
    return [paths[round(k * (len(paths) - 1) / (most - 1))] for k in range(most)]


def swatch(number: int) -> Html:
    """The colour of a run or a curve."""
    dashed = " dashed" if number // COLOURS % 2 else ""
    return Html(f'<span class="swatch c{number % COLOURS}{dashed}"></span>')


def legend(labels: Sequence[str]) -> str:
    entries = "".join(f"<li>{swatch(number)}{text(label)}</li>" for number, label in enumerate(labels))
    return f'<ul class="legend">{entries}</ul>'


def charts(runs: Sequence[FoundRun], names: Sequence[str]) -> str:
    """All that is in the runs' metrics and evaluations, a curve for each run. names: of the runs."""
    together = [m for m in EVALUATIONS[:_ACCURACIES] if any(_has(run, "evaluations", m.name) for run in runs)]
    if len(runs) > 1 or len(together) == 1:
        together = []
    judged = [_together(runs[0], together)] if together else []
    judged += _charts(runs, names, "evaluations", [measure for measure in EVALUATIONS if measure not in together])
    loss, rest = (_charts(runs, names, "metrics", part) for part in (METRICS[:1], METRICS[1:]))
    # accuracy stands beside the loss
    drawn = [*loss, *judged, *rest, *_charts(runs, names, "metrics", _unknown(runs, "metrics"))]
    drawn += _charts(runs, names, "evaluations", _unknown(runs, "evaluations"))
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else '<p class="soft">There is no curve yet.</p>'


def _unknown(runs: Sequence[FoundRun], kind: str) -> list[Measure]:
    """What only some kind of training reports."""
    told = {measure.name for measure in (*METRICS, *EVALUATIONS)} | set(_NEVER)
    found = dict.fromkeys(name for run in runs for name in getattr(run, kind).values)
    return [Measure(name, name.replace("_", " ")) for name in found if name not in told]


def _charts(runs: Sequence[FoundRun], names: Sequence[str], kind: str, measures: Sequence[Measure]) -> list[str]:
    return [chart for measure in measures if (chart := _chart(runs, names, kind, measure))]


def _has(run: FoundRun, kind: str, name: str) -> bool:
    values = getattr(run, kind).finite(name)[1]
    return len(values) > 0 and (name not in _IF_ANY or bool(values.any()))


def _chart(runs: Sequence[FoundRun], names: Sequence[str], kind: str, measure: Measure) -> str:
    """Empty where no run has the measure."""
    curves = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        if _has(run, kind, measure.name):
            series = getattr(run, kind)
            # a line of metrics without a value is a gap; one of evaluations told of something else
            whole = (series.steps, series.values[measure.name])
            steps, values = whole if kind == "metrics" else series.finite(measure.name)
            curves.append(Curve(name, steps, values, number))
    if not curves:
        return ""
    if measure.name == "loss" and len({_loss_of(run) for run in runs}) > 1:
        measure = measure._replace(hint="these runs minimise different losses: only shapes can be compared")
    marks = _marks(runs[0]) if len(runs) == 1 and measure.name in ("loss", "grad_norm") else ()
    return _figure(curves, measure, marks)


def _loss_of(run: FoundRun) -> tuple[Any, ...]:
    """What runs must share for their losses to be compared."""
    # the values of runs from before there was a choice
    known = {"target.normalize": True, "target.loss": "mse", "contrast.temperature": None}
    return run.verb, *(run.config.get(name, usual) for name, usual in known.items())


def _together(run: FoundRun, measures: Sequence[Measure]) -> str:
    """Several measures of one run in one chart."""
    curves = []
    for number, measure in enumerate(measures):
        steps, values = run.evaluations.finite(measure.name)
        curves.append(Curve(measure.title, steps, values, number))
    return _figure(curves, Measure("", "Accuracy", "per cent, on videos held back", most=100), (), with_legend=True)


def _figure(
    curves: Sequence[Curve], measure: Measure, marks: Sequence[tuple[float, str, str]], *, with_legend: bool = False
) -> str:
    values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
    vertical = axis(values, zero=measure.zero, log=measure.log, most=measure.most)
    hints = [measure.hint] if measure.hint else []
    hints += ["logarithmic"] if vertical.is_log else []
    hints += ["line: medians; shade: least to greatest"] if any(len(curve.steps) > LONGEST for curve in curves) else []
    hints += ["red: a step that was not finite"] if any(kind == "nonfinite" for _, kind, _ in marks) else []
    hints += ["dotted: resumed"] if any(kind == "resumed" for _, kind, _ in marks) else []
    said = f"<small>{text('; '.join(hints))}</small>" if hints else ""
    own = legend([curve.label for curve in curves]) if with_legend else ""
    drawing = draw(curves, vertical, title=measure.title, marks=marks)
    return f"<figure><figcaption>{text(measure.title)}{said}{own}</figcaption>{drawing}</figure>"


def _marks(run: FoundRun, most: int = 200) -> list[tuple[float, str, str]]:
    """Where the run went on, and steps that were not finite; of very many, evenly spread ones."""
    marks = []
    for part in run.parts[1:]:
        if isinstance(step := part.get("step"), int):
            marks.append((float(step), "resumed", f"resumed at step {step:,}"))
    steps = [entry["step"] for entry in run.nonfinite if isinstance(entry.get("step"), int)]
    for step in steps[:: max(len(steps) // most, 1)]:
        marks.append((float(step), "nonfinite", f"step {step:,} was not finite"))
    return marks
