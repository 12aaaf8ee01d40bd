"""The sections of one run on a report page: what it is, what it gave, what went wrong, how to repeat it."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.report_curves import number_text
from train.report_parts import EVALUATIONS, Html, code, csv_table, fold, pictures, spread, table, text
from train.report_run import FoundRun, seconds_text
from train.waiting import LIMIT

_FILES, _STEPS = 200, 50  # lines of tables of skipped files and of validations, and of steps not finite
_ROWS, _FEW = 24, 8  # lines of a table that is not folded, of classes and files, and of validations
_PICTURES = 6  # of a detector's key frames
_KINDS = {
    "pretrain": "pre-training",
    "moco": "contrastive pre-training",
    "finetune": "fine-tuning",
    "detect": "detection",
    "evaluate": "evaluation",
}
STATES = {"finished": "good", "going": "", "stopped": "warn", "empty": "warn"}  # classes of the style


def what(run: FoundRun) -> str:
    what = _KINDS.get(run.verb or "", run.verb or "run")
    return f"{what}, recipe {run.recipe}" if run.recipe else what


def about(run: FoundRun, now: float) -> str:
    state = run.state(now)
    out = [
        f'<p><span class="soft">{text(what(run))}, in {code(run.path)}:</span> '
        f'<strong class="{STATES[state.name]}">{text(state.text)}</strong></p>'
    ]
    notes = []
    if run.metrics.is_torn:
        notes.append("metrics.jsonl ends in half a line: it was being written, or the run was killed. It is left out.")
    if run.metrics.damaged:
        lines = "line" if run.metrics.damaged == 1 else "lines"
        notes.append(f"metrics.jsonl has {run.metrics.damaged:,} damaged {lines}, left out.")
    waited = _waiting(run)
    if waited is not None and waited > LIMIT:
        notes.append(f"The run waited for data {waited:.0%} of its time: more workers, or a prepared set, may help.")
    return "".join(out) + "".join(f'<p class="warn">{text(note)}</p>' for note in notes)


def _waiting(run: FoundRun) -> float | None:
    values = run.metrics.finite("data_wait")[1]
    # workers are still starting in the first
    return float(values[1:].mean()) if len(values) > 1 else None


def tiles(run: FoundRun) -> list[tuple[str, str, str]]:
    """Name, value and note of what is told first."""
    tiles = [(name, value, "") for name, value in scores_of(run.result)]
    steps, losses = run.metrics.finite("loss")
    if len(losses):
        tiles.append(("Loss", number_text(losses[-1]), f"{number_text(losses[0])} at step {steps[0]:,.0f}"))
    for measure in EVALUATIONS:
        steps, values = run.evaluations.finite(measure.name)
        if len(values) and measure.most == 100:
            best = int(values.argmax())
            note = f"best {values[best]:.2f} % at step {steps[best]:,.0f}" if values[best] > values[-1] else ""
            tiles.append((measure.title, f"{values[-1]:.2f} %", note))
    speeds = run.metrics.finite("clips_per_second")[1]
    if len(speeds):
        tiles.append(("Speed", f"{number_text(round(float(np.median(speeds)), 1))} clips/s", "median"))
    waited = _waiting(run)
    if waited is not None:
        tiles.append(("Waiting for data", f"{waited:.1%}", "of the time"))
    if run.seconds is not None:
        parts = len(run.parts)
        tiles.append(("Time", seconds_text(run.seconds), f"in {parts} parts" if parts > 1 else ""))
    card = {**run.plan, **(run.result or {})}
    protocol = card.get("protocol")
    precision = card.get("precision") or (protocol.get("precision") if isinstance(protocol, dict) else None)
    tiles.append(("Device", _device(run), str(precision or "")))
    return tiles


def _device(run: FoundRun) -> str:
    processes = run.now("processes")
    count = f"{len(processes)} x " if isinstance(processes, list) and len(processes) > 1 else ""
    used = str(run.plan.get("device") or (run.result or {}).get("device") or "")
    gpu = run.now("gpu")
    return count + (str(gpu) if gpu and not used.startswith("cpu") else "CPU")


def scores_of(result: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The numbers of a result.json of evaluations, probes and detectors' tests, named and written out."""
    if result is None:
        return []
    names = {"top1": "Top-1", "top5": "Top-5", "mean_class_top1": "Top-1, mean of classes"}
    found = [(name, f"{result[key]:.2f} %") for key, name in names.items() if _is_number(result.get(key))]
    accuracy = result.get("accuracy")
    for method, scores in accuracy.items() if isinstance(accuracy, dict) else ():
        if isinstance(scores, dict):
            found += [(f"{method}, {key}", f"{value:.2f} %") for key, value in scores.items() if _is_number(value)]
    if _is_number(result.get("mAP")):
        found.append(("Frame mAP", f"{100 * result['mAP']:.2f} %"))
    if _is_number(result.get("commonest_class")):
        found.append(("Always the commonest class", f"{result['commonest_class']:.2f} %"))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def changed(run: FoundRun) -> str:
    if not run.is_training:
        return ""
    if run.changed is None:
        return f'<p class="soft">There is no recipe {code(run.recipe)} to compare with; see all settings below.</p>'
    if not run.changed:
        return f"<p>Nothing: every setting is that of the recipe {code(run.recipe)}.</p>"
    rows = [(flag(name), value, recipe) for name, (value, recipe) in run.changed.items()]
    said = "The recipe is that of the code that made this page; at the run's commit it may have been another."
    return table(("setting", "this run", f"recipe {run.recipe}"), rows) + f'<p class="soft note">{text(said)}</p>'


def flag(name: str) -> Html:
    return Html(f'<code class="whole">{text("--" + name.replace("_", "-"))}</code>')


def results(run: FoundRun) -> str:
    """Tables and pictures of result.json and the files beside it, and the validations of a training."""
    out = []
    if run.result is not None:
        card, groups = run.result.get("protocol"), run.result.get("per_group")
        out.append(_weights(run.result.get("weights")))
        if isinstance(card, dict):
            rows = [(name.replace("_", " "), _rounded(value)) for name, value in card.items()]
            out.append(table(("how it was measured", ""), rows))
        sides = [side for key in ("train", "test") if isinstance(side := run.result.get(key), dict)]
        if len(sides) == 2:
            rows = [(name, *(side.get(name) for side in sides)) for name in sides[0]]
            out.append(table(("", "learned from", "tested on"), rows, numbers=(1, 2)))
        if isinstance(groups, dict) and len(groups) > 1:
            rows = [(name, f"{100 * value:.2f}") for name, value in groups.items() if _is_number(value)]
            out.append("<h3>By kind of class</h3>" + table(("", "mAP, %"), rows, numbers=(1,)))
        out.append(_by_class(run.path))
    return "".join(out) + _validations(run)


def _weights(read: Any) -> str:
    """Whose results they are."""
    if isinstance(read, dict):
        size = " an untrained encoder of the size of" if read.get("random") else ""
        return f"<p>Of{size} {code(read.get('read'))}.</p>"
    return f"<p>Of {code(read)}.</p>" if read else ""


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return number_text(value) if isinstance(value, float) else value


def _by_class(path: Path) -> str:
    """Of an evaluation's folder."""
    out = ""
    if (path / "per_class.csv").exists():
        shown, count = csv_table(path / "per_class.csv")
        out += f"<h3>By class</h3>{shown}" if count <= _ROWS else fold(f"All {count:,} classes", shown)
    confusion = path / "confusion.png"
    drawn = [(confusion, "Confusion")] if confusion.exists() else []
    drawn += [(found, found.stem) for found in spread(sorted((path / "pictures").glob("*.png")), _PICTURES)]
    return out + (pictures(drawn) if drawn else "")


def _validations(run: FoundRun) -> str:
    series = run.evaluations
    names = [name for name in series.values if np.isfinite(series.values[name]).any()]
    if not names or not len(series.steps):
        return ""
    titles = {measure.name: measure.title for measure in EVALUATIONS}
    shown = list(range(len(series.steps)))[-_FILES:]
    rows = [(f"{series.steps[i]:,.0f}", *(_found(series.values[name][i]) for name in names)) for i in shown]
    head = ("step", *(titles.get(name, name) for name in names))
    made = table(head, rows, numbers=range(1, len(head)))
    which = "All" if len(rows) == len(series.steps) else f"The last {len(rows)} of"
    return made if len(rows) <= _FEW else fold(f"{which} {len(series.steps):,} validations", made)


def _found(value: float) -> str:
    return number_text(value) if math.isfinite(value) else ""


def samples(run: FoundRun, most: int) -> str:
    if not run.samples:
        return ""
    chosen = spread(run.samples, most)
    left = len(run.samples) - len(chosen)
    said = f'<p class="soft">{left} more pictures are in {code(run.path / "samples")}.</p>' if left else ""
    return pictures([(path, _step_of(path)) for path in chosen]) + said


def _step_of(path: Path) -> str:
    found = re.fullmatch(r"step_0*(\d+)", path.stem)
    return f"after step {int(found[1]):,}" if found else path.stem


def trouble(run: FoundRun) -> str:
    unreadable = (run.result or {}).get("unreadable_videos") or (run.result or {}).get("unreadable")
    lost = [entry for entry in unreadable if isinstance(entry, dict)] if isinstance(unreadable, list) else []
    if not run.skipped and not run.nonfinite and not lost:
        said = "Every step was finite, and no clip was skipped." if run.is_training else "Every video could be read."
        return f'<p class="good">{said}</p>'
    return _skipped(run.skipped) + _skipped(lost) + _nonfinite(run)


def _skipped(entries: Sequence[dict[str, Any]]) -> str:
    files: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        files.setdefault(str(entry.get("path")), []).append(entry)
    if not files:
        return ""
    clips = f"{len(entries):,} {'clip' if len(entries) == 1 else 'clips'}"
    said = f"<p>{clips} of {len(files):,} {'file' if len(files) == 1 else 'files'} could not be read.</p>"
    rows = [
        (code(path), len(of), f"{first:,}" if isinstance(first := of[0].get("step"), int) else "", of[0].get("reason"))
        for path, of in sorted(files.items(), key=lambda item: -len(item[1]))[:_FILES]
    ]
    shown = table(("file", "clips", "first at step", "why"), rows, numbers=(1, 2))
    more = f'<p class="soft">... and {len(files) - _FILES:,} more files.</p>' if len(files) > _FILES else ""
    return said + (shown + more if len(rows) <= _ROWS else fold(f"The {len(rows)} files most often", shown + more))


def _nonfinite(run: FoundRun) -> str:
    if not run.nonfinite:
        return ""
    count = len(run.nonfinite)
    said = f'<p class="bad">{count:,} {"step was" if count == 1 else "steps were"} not finite and left out.</p>'
    rows = []
    for entry in run.nonfinite[:_STEPS]:
        clips = entry.get("clips")
        listed = clips if isinstance(clips, list) else []
        named = Html(fold(f"{len(listed)} clips", "<br>".join(code(clip) for clip in listed))) if listed else ""
        rows.append((entry.get("step"), entry.get("loss"), entry.get("grad_norm"), named))
    more = f'<p class="soft">... and {count - _STEPS:,} more.</p>' if count > _STEPS else ""
    return said + table(("step", "loss", "gradient norm", "clips"), rows) + more


def repeat(run: FoundRun) -> str:
    command = run.repeat()
    if command is None:
        return ""
    commit = str(run.record.get("commit") or "")
    clean = commit.removesuffix("-dirty")
    notes = []
    if commit:
        dirty = ", which had changes that were not committed: the same code may not be found again"
        notes.append(f"With the code at commit {code(clean)}{dirty if clean != commit else ''}.")
    if run.is_training:
        notes.append(
            f"While {code(run.path)} is there, the same command goes on with it, or finds it finished: another "
            f"{code('--out')} makes it beside this one, {code('--resume never')} moves this one aside."
        )
    return f'<div class="copy"><pre>{text(command)}</pre></div>' + "".join(f"<p>{note}</p>" for note in notes)


def machine(run: FoundRun) -> str:
    plan, versions = run.plan, run.now("versions")
    attention, peak = plan.get("attention"), plan.get("peak_bytes")
    facts = {
        "device": _device(run),
        "host": run.now("host"),
        "system": run.now("system"),
        **{name.replace("_", " "): plan.get(name) for name in ("workers", "threads", "micro_batch", "accumulation")},
        "attention": (run.result or {}).get("attention"),
        **({f"attention, {part}": said for part, said in attention.items()} if isinstance(attention, dict) else {}),
        "memory of a step": f"{peak / 1e6:,.0f} MB, estimated" if isinstance(peak, (int, float)) else None,
        "started": run.record.get("started"),
        "finished": run.record.get("finished"),
    }
    code_facts = {
        "commit": run.now("commit"),
        **(versions if isinstance(versions, dict) else {}),
        "kernel tiles": run.now("kernel_tiles"),
    }
    columns = [
        table(("", ""), [(name, value) for name, value in of.items() if value is not None])
        for of in (facts, code_facts)
    ]
    return f'<div class="beside">{"".join(columns)}</div>' + _processes(run) + _parts(run)


def _processes(run: FoundRun) -> str:
    processes = run.now("processes")
    if not isinstance(processes, list) or not processes:
        return ""
    keys = ("rank", "host", "device", "gpu", "gpu_bytes", "driver")
    rows = [[process.get(key) for key in keys] for process in processes if isinstance(process, dict)]
    return "<h3>Processes</h3>" + table(("rank", "host", "device", "GPU", "bytes", "driver"), rows)


def _parts(run: FoundRun) -> str:
    """Of a run that was resumed."""
    if len(run.parts) == 1:
        return ""
    keys = ("started", "host", "gpu", "commit")
    rows = []
    for part in run.parts:
        words = part.get("command")
        typed = code(shlex.join(map(str, words[1:]))) if isinstance(words, list) else None
        step = part.get("step", 0)
        rows.append((f"{step:,}" if isinstance(step, int) else step, *(part.get(key) for key in keys), typed))
    return "<h3>Parts of the run</h3>" + table(("from step", "started", "host", "GPU", "commit", "flags"), rows)


def settings(run: FoundRun) -> str:
    """All of them and what the run made of them, folded."""
    if not run.config:
        return ""
    made = table(("setting", "value"), ((flag(name), value) for name, value in run.config.items()))
    plan = {name: plain(value) for name, value in run.plan.items()}
    planned = fold("What the run made of them", table(("", ""), plan.items())) if plan else ""
    return fold(f"{len(run.config)} settings", made) + planned


def plain(value: Any) -> Any:
    """Lists of many words, and objects, as JSON."""
    return json.dumps(value) if isinstance(value, (dict, list)) else value
