"""Pages of help of a configuration's flags: `--help`, a screen; `--help SECTION`; `--help-all`."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.flags import Flag, flags_of, sections_of
from videomae.command_line import width

# the flags of the first page, by what they are about; each verb has some of them
COMMON: dict[str, tuple[str, ...]] = {
    "what on": ("data.path", "data.val", "data.split", "data.boxes", "test-data", "weights", "evaluate", "probe.data"),
    "how long": ("epochs", "steps", "batch-size", "optim.base-lr", "validate-every", "seeds", "seed"),
    "which model": (
        *("model.size", "model.frames", "model.image-size", "model.decoder-depth", "mask.kind", "mask.ratio"),
        *("sampling.kind", "sampling.stride", "clip.stride"),
    ),
    "how fast": ("device", "precision", "engine", "attention", "micro-batch", "workers"),
    "where it goes": ("out", "resume", "checkpoint.every"),
}
_MOST = 26  # flags of the first page
_LEFT = 0.4  # of a page's width: flag and value


def first_page(
    config: Any,
    *,
    prog: str,
    about: str,
    examples: Sequence[str] = (),
    recipes: Sequence[str] = (),
    default: str = "",
    groups: Sequence[str] = tuple(COMMON),
    own: Sequence[str] = (),
) -> str:
    """What the command does, how it is called, and the flags that are used most, of these groups. own: flags that mean
    something else here than where they are common."""
    flags, sections = flags_of(config), sections_of(config)
    needed = [flag.usage if flag.is_required else f"[{flag.usage}]" for flag in flags if _is_in_usage(flag)]
    lines = [f"usage: {' '.join([prog, *(['[RECIPE]'] if recipes else []), *needed, '[--flag VALUE ...]'])}", ""]
    lines += [*_wrapped(about), ""]
    lines += [*(f"  {example}" for example in examples), ""] if examples else []
    if recipes:
        lines += [*_wrapped(f"recipes, the first argument ({default} if none): {', '.join(recipes)}", "  "), ""]
    for title, group in _groups(flags, groups, own).items():
        lines += [title, *(_line(flag) for flag in group)]
    names = [name for name in sections if "." not in name]
    rest = f"; those of a section: --help SECTION, which is {', '.join(names)}" if names else ""
    return "\n".join([*lines, "", *_wrapped(f"all flags: --help-all{rest}", "  ")])


def _is_in_usage(flag: Flag) -> bool:
    return flag.is_required or flag.is_positional


def section_page(config: Any, section: str) -> str:
    """Every flag of a section, or of all where its name is empty, in full."""
    about = sections_of(config)
    lines: list[str] = []
    for name in ["", *about]:
        if section and name != section and not name.startswith(f"{section}."):
            continue
        flags = [flag for flag in flags_of(config) if flag.section == name]
        title = f"{name}: {' '.join(about[name].split())}" if name else "options"
        lines += ["", *_wrapped(title)] if flags else []
        for flag in flags:
            lines += _full(flag)
    return "\n".join(lines[1:])


def commands_of(recipes: Mapping[str, Callable[[], object]], default: str, prog: str) -> list[str]:
    """The commands that the docstrings of the default recipe and of the first that wants data give."""
    found = {name: _command(recipe, prog) for name, recipe in recipes.items()}
    with_data = next((command for command in found.values() if "--data" in command), "")
    return [command for command in dict.fromkeys((found.get(default, ""), with_data)) if command]


def _command(recipe: Callable[[], object], prog: str) -> str:
    lines = (line.strip() for line in (recipe.__doc__ or "").splitlines())
    return next((line for line in lines if re.match(f"{re.escape(prog)}( |$)", line)), "")


def _groups(flags: Sequence[Flag], titles: Sequence[str], apart: Sequence[str]) -> dict[str, list[Flag]]:
    known = {flag.key: flag for flag in flags if flag.key not in apart}
    common = {title: [known[key] for key in COMMON[title] if key in known] for title in titles}
    keys = {key for group in COMMON.values() for key in group} - {*apart}
    own = [flag for flag in flags if not flag.section and flag.key not in keys]
    # what a verb of few flags has of its own, it shows; a training what is common
    if len(own) + sum(map(len, common.values())) > _MOST:
        own = [flag for flag in own if _is_in_usage(flag)]
    return {title: group for title, group in {"options": own, **common}.items() if group}


def _line(flag: Flag) -> str:
    """One line: the text is cut where a clause ends."""
    default = f" ({flag.default})" if flag.default and not flag.is_required else ""
    left, about, place = f"  {flag.usage}", flag.about, _place()
    if len(left) > place - 2:
        values = flag.values.replace("|", ", ")
        left, about = (
            f"  {flag.names[0]} {flag.key.rpartition('.')[2].upper()}",
            values if "|" in flag.values else about,
        )
    return f"{left:<{place}}{_cut(about, width() - place - len(default))}{default or ' '}".rstrip()


def _place() -> int:
    """The column in which texts begin."""
    return round(width() * _LEFT)


def _cut(text: str, room: int) -> str:
    """The text, or its first clauses, or else its first words."""
    if len(text) <= room:
        return text
    for mark in ("; ", " (", ": "):
        end = text.rfind(mark, 0, room + 1)
        # a word or two before a colon say nothing
        if end > 0 and text[:end].count(" ") >= 2:
            return text[:end]
    return textwrap.shorten(text, room, placeholder=" ...")


def _full(flag: Flag) -> list[str]:
    names = ", ".join(flag.names[1:])
    says = [flag.about] if flag.about else []
    says += [f"also {names}"] if names else []
    says += [f"default {flag.default}"] if flag.default else []
    says += ["needed"] if flag.is_required else []
    text = "; ".join(says)
    left = f"  {flag.usage}"
    place = _place()
    first = textwrap.wrap(text, width() - place) or [""]
    if len(left) > place - 2:
        return [left, *(" " * place + line for line in first if line)]
    return [f"{left:<{place}}{first[0]}".rstrip(), *(" " * place + line for line in first[1:])]


def _wrapped(text: str, indent: str = "") -> list[str]:
    """Paragraphs as they are, lines that are too long in several."""
    return [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, width(), subsequent_indent=indent, break_on_hyphens=False) or [""]
    ]
