"""Command lines from dataclasses: `[RECIPE] [--flag VALUE] [--section.field VALUE]`, with errors of one line and exit
code 2."""

import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

T = TypeVar("T")


def parse(
    arguments: Sequence[str], recipes: Mapping[str, Callable[[], T]], default: str, *, prog: str, about: str
) -> T:
    """The configuration of a recipe (the first argument, else the default one), changed by flags."""
    name, flags = default, list(arguments)
    if flags and not flags[0].startswith("-"):
        name = flags.pop(0).replace("_", "-")
        if name not in recipes:
            refuse(prog, f"no recipe called {name}; there are {', '.join(recipes)}")
    listing = "\n".join(f"  {key}: {_first_line(recipe)}" for key, recipe in recipes.items())
    recipe = recipes[name]()
    about = f"{about}\n\nRecipes (the first argument, default {default}):\n{listing}"
    return _read(type(recipe), flags, prog=f"{prog} {name}", about=about, default=recipe, blame=prog)


def parse_flags(arguments: Sequence[str], config: type[T], *, prog: str, about: str) -> T:
    """The configuration of a command without recipes."""
    return _read(config, list(arguments), prog=prog, about=about, default=tyro.MISSING_NONPROP, blame=prog)


def _read(config: type[T], flags: Sequence[str], *, prog: str, about: str, default: Any, blame: str) -> T:
    """tyro's reading of the flags; blame: what an error names."""
    show_any_name()
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, args=_switches(flags), prog=prog, description=about, default=default)
    except SystemExit as end:
        if end.code:
            refuse(blame, _condense(complaint.getvalue()))
        raise


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
    """One line on stderr, exit code 2."""
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Around the checks of what the user asked for: their ValueErrors and missing files become one line and exit code
    2."""
    try:
        yield
    except (ValueError, OSError) as error:
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


def _condense(box: str) -> str:
    """tyro's framed complaint as one line: the complaint, and the flag it thinks was meant."""
    # the frame is of hyphens where the terminal has no lines
    parts = [" ".join(re.sub("[╭╮╰╯│─]", " ", part).split()) for part in re.split("[─-]{9,}", box)]
    # its title stands first, and often once more in the text
    titles = "Value error|Invalid choice|Unrecognized options|Missing argument|Required options|Error parsing arguments"
    complaint = re.sub(f"^(?:{titles}) ", "", next(part for part in parts if part and part not in titles))
    # a section's own message names its fields in full; types that were tried tell a user nothing
    complaint = re.sub(r"^Error parsing \w[\w.-]*: ", "", complaint).partition(" Got errors: ")[0]
    guess = next((found[1] for part in parts if (found := re.search(r"Perhaps you meant: (--[\w.-]+)", part))), None)
    return complaint + (f" (did you mean {guess}?)" if guess else "") + "; --help lists all flags"
