"""Command lines from dataclasses: `[RECIPE] [--flag VALUE] [--section.field VALUE]`, with errors of one line and exit
code 2."""

import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NoReturn, TypeVar

import tyro

from train.flags import flags_of, sections_of
from train.help import COMMON, commands_of, first_page, section_page
from videomae.command_line import nobody_reads, show
from videomae.wording import did_you_mean, nearest, nearest_flag, with_guess

T = TypeVar("T")


def parse(
    arguments: Sequence[str],
    recipes: Mapping[str, Callable[[], T]],
    default: str,
    *,
    prog: str,
    about: str,
    examples: Sequence[str] = (),
    groups: Sequence[str] = tuple(COMMON),
    elsewhere: Sequence[str] = (),
) -> T:
    """The configuration of a recipe (the first argument, else the default one), changed by flags.

    examples: commands for the first page of help; the recipes' own if not given. groups: of flags, on that page.
    elsewhere: flags that the caller has taken out of the arguments, so that they too can be what was meant.
    """
    name, flags = default, list(arguments)
    if flags and not flags[0].startswith("-"):
        name = flags.pop(0).replace("_", "-")
        if name not in recipes:
            guess = nearest(name, tuple(recipes))
            refuse(prog, f"no recipe called {name}{did_you_mean(guess)}; there are {', '.join(recipes)}")
    recipe = recipes[name]()
    page = partial(
        first_page,
        recipe,
        prog=prog,
        about=about,
        recipes=tuple(recipes),
        default=default,
        groups=groups,
        examples=examples or commands_of(recipes, default, prog),
    )
    listing = "\n".join(f"  {key}: {_first_line(each)}" for key, each in recipes.items())
    return _read(recipe, flags, prog=prog, page=page, listing=f"recipes\n{listing}\n\n", elsewhere=elsewhere)


def parse_flags(
    arguments: Sequence[str],
    config: type[T],
    *,
    prog: str,
    about: str,
    examples: Sequence[str] = (),
    own: Sequence[str] = (),
) -> T:
    """The configuration of a command without recipes. examples, own: commands for the first page of help, and flags
    that stand there among the command's own."""
    page = partial(first_page, config, prog=prog, about=about, examples=examples, own=own)
    return _read(config, list(arguments), prog=prog, page=page)


def _read(
    config: Any,
    flags: Sequence[str],
    *,
    prog: str,
    page: Callable[[], str],
    listing: str = "",
    elsewhere: Sequence[str] = (),
) -> Any:
    """tyro's reading of the flags, which change a configuration, or make one of that class. page, listing: the first
    page of help, and what stands before all flags."""
    show_any_name()
    _help(config, flags, prog, page, listing)
    _check_names(config, flags, prog, elsewhere)
    is_class = isinstance(config, type)
    cls = config if is_class else type(config)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            default = tyro.MISSING_NONPROP if is_class else config
            return tyro.cli(cls, args=_switches(flags), prog=prog, default=default)
    except SystemExit as end:
        if end.code:
            refuse(prog, _plain(_condense(complaint.getvalue()), config, flags))
        raise


def _help(config: Any, flags: Sequence[str], prog: str, page: Callable[[], str], listing: str) -> None:
    """Where help is asked for, print it, and end."""
    asked = next((i for i, flag in enumerate(flags) if flag in ("-h", "--help", "--help-all")), None)
    if asked is None:
        return
    section = next(iter(flags[asked + 1 : asked + 2]), "").replace("_", "-")
    sections = sections_of(config)
    if flags[asked] == "--help-all":
        show(f"{listing}{section_page(config, '')}\n\nA switch is on by its name alone, off by `--flag false`.")
    if section in sections:
        show(section_page(config, section))
    if not section or section.startswith("-"):
        show(page())
    guess = did_you_mean(nearest(section, tuple(sections)))
    refuse(prog, f"no section called {section}{guess}; there are {', '.join(sections) or 'none'}")


def _check_names(config: Any, flags: Sequence[str], prog: str, elsewhere: Sequence[str]) -> None:
    """Refuse a flag that there is none of, and say what was probably meant."""
    known = [name for flag in flags_of(config) if not flag.is_positional for name in reversed(flag.names)]
    plain = {name.replace("_", "-") for name in known}
    for word in flags:
        flag = word.partition("=")[0]
        if not re.match("--[a-zA-Z]", flag):
            continue
        name = flag.replace("_", "-")
        section, dot, last = name.removeprefix("--").rpartition(".")
        if name not in plain and f"--{section}{dot}{last.removeprefix('no-')}" not in plain:
            guess = nearest_flag(flag, [*known, *elsewhere])
            refuse(prog, f"no flag {flag}{did_you_mean(guess)}; --help-all lists all flags")


def _switches(flags: Sequence[str]) -> list[str]:
    """`--section.field true` and `false`, as for every other field, in tyro's spelling of switches."""
    out: list[str] = []
    for flag in flags:
        if flag.lower() in ("true", "false") and out and out[-1].startswith("--") and "=" not in out[-1]:
            if flag.lower() == "false":
                section, dot, name = out[-1][2:].rpartition(".")
                out[-1] = f"--{section}{dot}no-{name}"
        else:
            out.append(flag)
    return out


def show_any_name() -> None:
    """Let a terminal that cannot show a file's or class's name show its codes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def refuse(prog: str, message: str) -> NoReturn:
    """One line on stderr, with the word that was probably meant; exit code 2."""
    print(f"{prog}: error: {with_guess(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Around the checks of what the user asked for: their ValueErrors and missing files become one line and exit code
    2."""
    try:
        yield
    except (ValueError, OSError) as error:
        if nobody_reads():
            raise
        refuse(prog, " ".join(str(error).split()))


def flat(config: Any) -> dict[str, Any]:
    """A nested dataclass as {"section.field": value}, for json and for comparison; tuples become lists."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out |= {f"{field.name}.{key}": inner for key, inner in flat(value).items()}
        else:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def _first_line(function: Callable[[], object]) -> str:
    return typing.cast(str, function.__doc__).strip().splitlines()[0]


def _plain(complaint: str, config: Any, flags: Sequence[str]) -> str:
    """What a flag takes, in place of the types that tyro tried."""
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    if complaint.startswith("Missing from "):
        named = {*complaint.split()}
        absent = [flag for flag in flags_of(config) if named & {*flag.names, flag.is_positional and flag.key.upper()}]
        needed = [f"{flag.usage} is needed{flag.about and f': {flag.about}'}" for flag in absent]
        return "; ".join([*needed, "--help lists flags"]) if needed else complaint
    found = re.match(r"(?:Error parsing |Missing value for argument ')(--[\w.-]+)", complaint)
    known = {name: flag for flag in flags_of(config) for name in flag.names}
    if found is None or found[1] not in known or found[1] not in words:
        return complaint
    given = list(takewhile(lambda word: not word.startswith("--"), words[words.index(found[1]) + 1 :]))
    return f"{found[1]} takes {known[found[1]].values}; got {' '.join(given) or 'nothing'}"


def _condense(box: str) -> str:
    """tyro's framed complaint as one line."""
    # the frame is of hyphens where the terminal has no lines
    parts = [" ".join(re.sub("[╭╮╰╯│─]", " ", part).split()) for part in re.split("[─-]{9,}", box)]
    # its title stands first, and often once more in the text
    titles = "Value error|Invalid choice|Unrecognized options|Missing argument|Required options|Error parsing arguments"
    complaint = re.sub(f"^(?:{titles}) ", "", next(part for part in parts if part and part not in titles))
    # a section's own message names its fields in full; types that were tried tell a user nothing
    complaint = re.sub(r"^Error parsing \w[\w.-]*: ", "", complaint).partition(" Got errors: ")[0]
    choice = re.match(r"invalid choice '(.*)' for argument '(.*?)'. Expected one of \((.*)\)", complaint)
    if choice:
        words = [word.strip(" '") for word in choice[3].split(",") if word.strip(" '") not in ("", "None")]
        complaint = f"{choice[2]} must be one of {', '.join(words)}; got {choice[1]}"
    return complaint + "; --help lists flags"
