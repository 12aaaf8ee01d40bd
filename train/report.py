"""A run as a page to look at and to pass on: `python -m train.report [RUN ...] [--out FILE]`.

RUN is a folder that train.pretrain, finetune, detect, evaluate or probe has written; several are compared; without any
it is the newest in runs/. The page is one HTML file that holds its curves and pictures: no network, no other file.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from kernels.launch import check
from train.cli import parse_flags, user_errors
from train.report_page import names_of, page
from train.report_run import FoundRun, newest_run, read_run
from train.shares import refuse_several
from videomae.command_line import run_main
from videomae.weight_files import write_atomically

PROG = "python -m train.report"
_RUNS = Path("runs")


@dataclass(frozen=True)
class ReportConfig:
    """Which runs, and where their page goes."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # folders of runs or results; the newest in runs/ if none is given
    # the page, or a folder for its report.html; the run's own folder, or runs/ of several, if not given
    out: str | None = None

    def __post_init__(self) -> None:
        check(self.out != "", "out must not be empty")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0 done, 2 wrong use, 130 stopped by Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    about = "One run, or several beside each other, as an HTML page that needs no network."
    examples = [PROG, f"{PROG} runs/a runs/b --out comparison.html"]
    config = parse_flags(arguments, ReportConfig, prog=PROG, about=about, examples=examples)
    try:
        with user_errors(PROG):
            refuse_several("a page is made by one process")
            _write(config, shlex.join([*PROG.split(), *arguments]))
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _write(config: ReportConfig, command: str) -> None:
    """Raises ValueError and OSError for what the user can mend."""
    paths = [Path(run).expanduser() for run in config.runs] or [newest_run(_RUNS)]
    paths = list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]
    out = Path(config.out).expanduser() if config.out else (paths[0] if len(paths) == 1 else _RUNS) / "report.html"
    if out.is_dir():
        out /= "report.html"
    runs = [read_run(path) for path in paths]
    now = time.time()
    # a name that is no UTF-8 is shown by its codes
    made = page(runs, now=now, command=command).encode("utf-8", "backslashreplace")
    write_atomically(out, lambda file: file.write_bytes(made))
    _say(runs, now, out, len(made))


def _say(runs: Sequence[FoundRun], now: float, out: Path, size: int) -> None:
    names = names_of([run.path for run in runs])
    width = max(map(len, names))
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        print(f"{'runs' if number == 0 else '':<10}{name:<{width}}  {run.state(now).text}")
    print(f"page      {out}, {size / 1e3:,.0f} kB")


if __name__ == "__main__":
    run_main(main)
