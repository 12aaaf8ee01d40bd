"""What commands share: a parser whose errors are one line that names what was meant, and an end without a traceback
where nobody reads on (`| head`)."""

import argparse
import os
import re
import select
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, TextIO

from videomae.wording import did_you_mean, nearest, nearest_flag

_NARROWEST, _WIDEST = 72, 100  # columns of a page of help
_LONGEST = 24  # list of choices that stands behind its flag
_PIPE_CLOSED = 141  # as shells report a command that SIGPIPE ended


def width() -> int:
    """Of a page of help: the terminal's, where there is one, within bounds."""
    return min(max(shutil.get_terminal_size((_WIDEST, 0)).columns, _NARROWEST), _WIDEST)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """A command from start to end: leaves Python with its exit code."""
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _let_go():
            raise
        code = _PIPE_CLOSED
    raise SystemExit(code)


def show(page: str) -> NoReturn:
    """Print a page of help, and leave."""
    try:
        print(page, flush=True)
    except BrokenPipeError:
        _let_go()
        raise SystemExit(_PIPE_CLOSED) from None
    raise SystemExit(0)


def nobody_reads() -> bool:
    """Whether what this process prints goes nowhere: then an OSError is no more than that."""
    return _is_gone(sys.stdout)


def _let_go() -> bool:
    """Send to nowhere what nobody reads, which Python would else try to write when it ends, and complain; whether there
    was any."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _is_gone(stream)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in gone:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return bool(gone)


def _is_gone(stream: TextIO) -> bool:
    """Asked of the system: a stream forgets what it could not write, and then flushes well."""
    try:
        look = select.poll()
        look.register(stream.fileno(), select.POLLOUT)
    # no file behind it, or a system without poll
    except (OSError, ValueError, AttributeError):
        return False
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in look.poll(0))


class Parser(argparse.ArgumentParser):
    """argparse's, with help as wide as the terminal, and errors of one line, which name the flag or the value that was
    probably meant, and exit code 2."""

    def __init__(self, prog: str, about: str, *, example: str = "") -> None:
        """prog: what errors begin with. about: the text above the flags. example: a command, below them."""
        super().__init__(
            prog,
            description=_reflowed(about),
            epilog=f"example: {example}" if example else None,
            add_help=False,
            allow_abbrev=False,
            formatter_class=partial(_Formatter, f"python -m {prog.removeprefix('python -m ')}"),
        )
        self._positionals.title, self._optionals.title = "what on", "options"
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Names an unknown flag before anything that is missing."""
        given = sys.argv[1:] if args is None else list(args)
        for word in given:
            flag = word.partition("=")[0]
            if flag == "--":
                break
            if re.match("--[a-zA-Z]", flag) and flag not in self._option_string_actions:
                self.error(f"no flag {flag}{did_you_mean(nearest_flag(flag, self.flags))}; --help lists all")
        return super().parse_known_args(given, namespace)

    @property
    def flags(self) -> Sequence[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        found = re.match(r"(.*?): invalid choice: '(.*?)' \(choose from (.*)\)$", message, re.S)
        if found:
            choices = [choice.strip("'\"") for choice in found[3].split(", ")]
            guess = did_you_mean(nearest(found[2], choices))
            message = f"{found[1]} must be one of {', '.join(choices)}; got {found[2]}{guess}"
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """command: as it is to be typed, whatever errors call it."""

    def __init__(self, command: str, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=width())
        self._command = command

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        """Without the flags, which are listed below."""
        words = [self._command]
        words += [f"{a.option_strings[-1]} {a.metavar}" for a in actions if a.option_strings and a.required]
        for action in actions:
            if not action.option_strings:
                name = str(action.metavar or action.dest)
                words.append(f"{name} ..." if action.nargs == "+" else f"[{name}]" if action.nargs else name)
        super().add_usage(" ".join([*words, "[--flag VALUE ...]"]), actions, groups, prefix)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if action.choices is None or action.metavar is not None:
            return super()._metavar_formatter(action, default_metavar)
        choices = "|".join(map(str, action.choices))
        return lambda size: (choices if len(choices) <= _LONGEST else default_metavar,) * size

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """With the choices, where the flag does not show them."""
        choices = [str(choice) for choice in action.choices or ()]
        is_seen = action.metavar is None and len("|".join(choices)) <= _LONGEST
        return action.help if not choices or is_seen else ": ".join(filter(None, (action.help, ", ".join(choices))))


def _reflowed(about: str) -> str:
    """A docstring in lines of that width; what is set in, and commands, as they stand."""
    out: list[str] = []
    is_open = False  # the last line goes on
    for line in about.splitlines():
        is_prose = bool(line) and not line.startswith((" ", "python -m"))
        if is_prose and is_open:
            out[-1] += f" {line}"
        else:
            out.append(line)
        is_open = is_prose
    # of what is set in, lines go on below their last column
    indents = [" " * len(found[0]) if (found := re.match(r" +(?:\S.*\S {2,})?", line)) else "" for line in out]
    wrapped = [
        textwrap.wrap(line, width(), subsequent_indent=indent, break_on_hyphens=False) or [""]
        for line, indent in zip(out, indents, strict=True)
    ]
    return "\n".join(part for parts in wrapped for part in parts)
