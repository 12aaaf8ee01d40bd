"""What is kept of an ablation table that was run: one JSON file each, from which the page is made. Tables may so be run
one by one, on several machines."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.record import surroundings
from train.study_ablations import Ablations, Found
from train.study_jobs import Job
from train.study_rows import PROG
from train.study_tables import TABLES, Table
from videomae.weight_files import write_atomically

_VALUES = ("rate", "minutes", "clips", "peak", "loss")


@dataclass(frozen=True)
class Record:
    """A table's results and how they came about. settings: of the study. runs: seconds of every command."""

    table: Table
    rows: tuple[Found, ...]
    command: str
    settings: Mapping[str, float]
    runs: Mapping[str, float]
    date: str
    around: Mapping[str, Any]
    commits: Sequence[str]  # that its runs were made with


def write_record(study: Ablations, table: Table, seconds: Mapping[str, float], path: Path) -> None:
    """seconds: of every run of the study, of which the table's own are kept with their commands."""
    jobs: Sequence[Job] = Ablations((table,), study.config, study.folder).jobs()
    rows = [
        {
            "title": row.line.title,
            "top1": list(row.tuned),
            "linear": list(row.linear),
            **{name: getattr(row, name) for name in _VALUES},
        }
        for row in study.read(table)
    ]
    record = {
        "command": " ".join([PROG, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "settings": study.settings,
        "commits": sorted(_commits(study.folder, jobs)),
        "rows": rows,
        "runs": {job.name: {"command": list(job.arguments), "seconds": seconds[job.name]} for job in jobs},
        **{name: value for name, value in surroundings().items() if name not in ("host", "commit")},
    }
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(path, lambda file: file.write_text(text))


def _commits(folder: Path, jobs: Sequence[Job]) -> set[str]:
    paths = [path for job in jobs if (path := folder / job.name / "config.json").exists()]
    kept = [json.loads(path.read_text()) for path in paths]
    return {part["commit"] for run in kept for part in (run, *run.get("resumed", ())) if part.get("commit")}


def read_records(folder: Path) -> list[Record]:
    """Those of all tables that the folder has, in the study's order."""
    paths = {name: folder / f"{name}.json" for name in TABLES}
    return [_read(TABLES[name], path) for name, path in paths.items() if path.exists()]


def _read(table: Table, path: Path) -> Record:
    """ValueError where its lines are not the table's, or it is no record: the study has changed since."""
    again = f"run `{PROG} {table.name}` again, or remove it"
    try:
        kept = json.loads(path.read_text())
        titles = [row["title"] for row in kept["rows"]]
        if titles != [line.title for line in table.lines]:
            raise ValueError(f"{path} has other lines than the table now: {again}")
        rows = tuple(
            Found(line, tuple(row["top1"]), tuple(row["linear"]), **{name: row[name] for name in _VALUES})
            for line, row in zip(table.lines, kept["rows"], strict=True)
        )
        runs = {name: run["seconds"] for name, run in kept["runs"].items()}
        around = {name: kept[name] for name in ("versions", "gpu")}
        return Record(table, rows, kept["command"], kept["settings"], runs, kept["date"], around, kept["commits"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no record of this study ({error!r}): {again}") from error
