"""A run, or several beside each other, as one HTML page that needs nothing else, least of all the network."""

import base64
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from train.report_parts import Html, charts, code, fold, legend, swatch, table, text
from train.report_run import FoundRun
from train.report_sections import (
    STATES,
    about,
    changed,
    flag,
    machine,
    plain,
    repeat,
    results,
    samples,
    settings,
    tiles,
    trouble,
    what,
)
from train.report_style import SCRIPT, STYLE

_PICTURES, _OF_SEVERAL, _MANY = 6, 3, 6  # of a run; of each of several; of more than so many, the last alone


def page(runs: Sequence[FoundRun], *, now: float, command: str) -> str:
    """The page of one run or several. now: seconds since the epoch; command: what made it."""
    names = names_of([run.path for run in runs])
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    body = _one(runs[0], names[0], now) if len(runs) == 1 else _several(runs, names, now)
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    # the page may not load anything, and run this script alone: also what a file's name would smuggle in
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<footer>Made {made} by {code(command)}. The page holds all it shows.</footer>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of what is above them as tells them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    length = 1
    while length < max(map(len, parts)) and len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _hash(inline: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def _section(key: str, title: str, inside: str) -> str:
    return f'<section id="{key}"><h2>{text(title)}</h2>{inside}</section>\n' if inside else ""


def _header(title: str, about: str, tiles: Iterable[tuple[str, str, str]], sections: str) -> str:
    """sections: what comes after it, for the links."""
    found = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', sections)
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in found)
    boxes = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f'<small>{text(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in tiles
    )
    told = f'<dl class="tiles">{boxes}</dl>' if boxes else ""
    return (
        f'<header><h1>{text(title)}</h1>{about}<nav aria-label="On this page">{links}</nav>{told}</header>\n'
        f"<main>\n{sections}</main>"
    )


# -- one run


def _one(run: FoundRun, name: str, now: float) -> str:
    sections = "".join(
        (
            _section("changed", "What differs from the recipe", changed(run)),
            _section("results", "Results", results(run)),
            _section("curves", "Curves", charts([run], [name]) if run.is_training else ""),
            _section("pictures", "Reconstructions over time", samples(run, _PICTURES)),
            _section("trouble", "Skipped files and steps", trouble(run)),
            _section("repeat", "Repeat it", repeat(run)),
            _section("machine", "Hardware and versions", machine(run)),
            _section("settings", "All settings", settings(run)),
        )
    )
    return _header(name, about(run, now), tiles(run), sections)


# -- several runs


def _several(runs: Sequence[FoundRun], names: Sequence[str], now: float) -> str:
    trained = [(run, name) for run, name in zip(runs, names, strict=True) if run.is_training]
    drawn = legend([name for _, name in trained]) + charts(*zip(*trained, strict=True)) if trained else ""
    sections = "".join(
        (
            _section("runs", "The runs", _overview(runs, names, now)),
            _section("differ", "What differs between them", _differences(runs, names)),
            _section("curves", "Curves", drawn),
            _section("pictures", "Reconstructions over time", _samples_of(runs, names)),
            _section("each", "Each run", "".join(map(_details, runs, names))),
        )
    )
    kinds = dict.fromkeys(what(run) for run in runs)
    about = f'<p class="soft">{text("; ".join(kinds))}</p>'
    return _header(f"{len(runs)} runs", about, (), sections)


def _overview(runs: Sequence[FoundRun], names: Sequence[str], now: float) -> str:
    """A line for each run: its state and what its tiles say."""
    told = [{name: value for name, value, _ in tiles(run)} for run in runs]
    last = ("Speed", "Waiting for data", "Time", "Device")
    columns = sorted(dict.fromkeys(name for values in told for name in values), key=lambda name: name in last)
    # colours are counted as in the curves, which only trainings have
    places = iter(range(len(runs)))
    rows = []
    for run, name, values in zip(runs, names, told, strict=True):
        state = run.state(now)
        colour = swatch(next(places)) if run.is_training else ""
        label = Html(f'<span class="whole">{colour}{text(name)}</span>')
        said = Html(f'<span class="state {STATES[state.name]}">{text(state.text)}</span>')
        kind = Html(f'<span class="whole">{text(what(run))}</span>')
        rows.append((label, kind, said, *(values.get(column, "") for column in columns)))
    return table(("run", "what", "state", *columns), rows, numbers=range(3, 3 + len(columns)))


def _differences(runs: Sequence[FoundRun], names: Sequence[str]) -> str:
    settings_of = [{key: value for key, value in run.config.items() if key != "out"} for run in runs]
    shared = set[str]().union(*settings_of).intersection(*settings_of)
    split = [
        [{key: value for key, value in of.items() if (key in shared) == wanted} for of in settings_of]
        for wanted in (True, False)
    ]
    main = _differing(split[0], names, flag) or "<p>No setting that all of them have.</p>"
    folded = (
        ("Settings that not all of them have", _differing(split[1], names, flag)),
        ("What the runs made of their settings", _differing([run.plan for run in runs], names, plain)),
        ("Code, versions and machine", _differing([_around(run) for run in runs], names, plain)),
    )
    return main + "".join(fold(title, shown) for title, shown in folded if shown)


def _differing(columns: Sequence[dict[str, Any]], names: Sequence[str], label: Callable[[str], str]) -> str:
    """A table of the keys that are not the same in all columns; empty where there is none."""
    keys = dict.fromkeys(key for column in columns for key in column)
    absent = Html('<span class="soft">\u2013</span>')
    rows = []
    for key in keys:
        values = [column.get(key, absent) for column in columns]
        if any(value != values[0] for value in values):
            rows.append((label(key), *(plain(value) if isinstance(value, dict) else value for value in values)))
    return table(("", *names), rows) if rows else ""


def _around(run: FoundRun) -> dict[str, Any]:
    versions = run.now("versions")
    facts = {name: run.now(name) for name in ("commit", "kernel_tiles", "host", "system", "gpu")}
    return facts | (versions if isinstance(versions, dict) else {})


def _samples_of(runs: Sequence[FoundRun], names: Sequence[str]) -> str:
    most = 1 if len(runs) > _MANY else _OF_SEVERAL
    made = ((name, samples(run, most)) for run, name in zip(runs, names, strict=True))
    return "".join(f"<h3>{text(name)}</h3>{inside}" for name, inside in made if inside)


def _details(run: FoundRun, name: str) -> str:
    parts = (
        ("What differs from the recipe", changed(run)),
        ("Results", results(run)),
        ("Skipped files and steps", trouble(run)),
        ("Repeat it", repeat(run)),
        ("Hardware and versions", machine(run)),
        ("All settings", settings(run)),
    )
    inside = "".join(f"<h3>{title}</h3>{part}" for title, part in parts if part)
    return f'<details class="box"><summary>{text(name)}</summary>{inside}</details>'
