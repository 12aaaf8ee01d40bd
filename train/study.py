"""Small experiments that show the method at work, each from one command: `python -m train.study [NAME]`.

A study is a list of the project's own commands by several seeds, run side by side and gone on with where it was
stopped, and ends in a table and a plot. See study_learns.py, study_detects.py and, for the paper's ablations,
study_tables.py for what there is.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from train import study_detects, study_learns
from train.cli import parse_flags, user_errors
from train.study_ablations import Ablations
from train.study_jobs import JobFailed, Terminated, run_jobs
from train.study_pages import write
from train.study_rows import PROG, StudyConfig
from train.study_tables import TABLES
from videomae.command_line import nobody_reads, run_main
from videomae.data.pool import available_cpus

_SINGLE = {"learns": study_learns, "detects": study_detects}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 a run failed, 2 wrong use, 130 and 143 stopped by Ctrl-C, SIGTERM."""
    about = "Small experiments on the demo's clips, each ending in tables and plots."
    given = sys.argv[1:] if arguments is None else arguments
    config = parse_flags(given, StudyConfig, prog=PROG, about=about)
    begin = time.monotonic()
    # tables of the ablations share their runs and their page
    name = config.name if config.name in _SINGLE else "ablations"
    folder, out = Path(config.runs) / name, Path(config.out) / name
    at_once = config.jobs or (1 if torch.cuda.is_available() else available_cpus())
    with user_errors(PROG):
        ablations = None
        if config.name not in _SINGLE:
            tables = tuple(TABLES.values()) if config.name == "ablations" else (TABLES[config.name],)
            ablations = Ablations(tables, config, folder)
        jobs = ablations.jobs() if ablations else _SINGLE[config.name].jobs(config, folder)
    print(f"study {config.name}: {len(jobs)} runs, {at_once} at a time, in {folder}")
    try:
        seconds = run_jobs(jobs, folder, at_once=at_once, threads=max(available_cpus() // at_once, 1))
    except (JobFailed, OSError) as error:
        if nobody_reads():
            raise
        print(f"{PROG}: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(f"{PROG}: stopped; the same command goes on", file=sys.stderr)
        return 143 if isinstance(stopped, Terminated) else 130
    out.mkdir(parents=True, exist_ok=True)
    if ablations:
        with user_errors(PROG):
            print("\n".join(write(ablations, seconds, out)))
    else:
        _SINGLE[config.name].report(config, folder, jobs, seconds, time.monotonic() - begin)
    return 0


if __name__ == "__main__":
    run_main(main)
