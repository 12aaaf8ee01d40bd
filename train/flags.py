"""The flags of a configuration, read off its dataclasses: names, values, defaults, and what is written beside the
fields."""

import ast
import dataclasses
import inspect
import io
import sys
import tokenize
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal, Union

import tyro


@dataclasses.dataclass(frozen=True)
class Flag:
    """One of them. names: the short one first. section: "model" of --model.size, "" at the top. values: what it takes;
    none, where it is a switch. default: as text; none, where the comment says it or there is none."""

    names: tuple[str, ...]
    section: str
    values: str
    about: str
    default: str
    is_required: bool = False
    is_positional: bool = False

    @property
    def key(self) -> str:
        """`model.size`: as it is in tables of flags."""
        return self.names[-1].lstrip("-")

    @property
    def usage(self) -> str:
        """`--model.size SIZE`."""
        return self.values if self.is_positional else f"{self.names[0]} {self.values}".rstrip()


def flags_of(config: Any) -> list[Flag]:
    """Of a dataclass, or of an instance, whose values are then the defaults; in the order of its fields, its own before
    those of its sections."""
    return sorted(_walk(config, ""), key=lambda flag: flag.section != "")


def sections_of(config: Any) -> dict[str, str]:
    """Name and docstring of every section."""
    found = {}
    for name, kind, default in _fields(config):
        if dataclasses.is_dataclass(kind):
            name = name.replace("_", "-")
            found[name] = inspect.getdoc(kind) or ""
            found |= {f"{name}.{inner}": text for inner, text in sections_of(default).items()}
    return found


def _fields(config: Any) -> list[tuple[str, Any, Any]]:
    """Name, type and default of every field that has a flag; MISSING where there is no default."""
    cls = config if isinstance(config, type) else type(config)
    hints, found = typing.get_type_hints(cls, include_extras=True), []
    for field in dataclasses.fields(cls):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if not isinstance(config, type):
            value = getattr(config, field.name)
        if tyro.conf.Suppress not in typing.get_args(hints[field.name]):
            found.append((field.name, hints[field.name], value))
    return found


def _walk(config: Any, section: str) -> list[Flag]:
    cls, flags = config if isinstance(config, type) else type(config), []
    for name, hint, value in _fields(config):
        word = name.replace("_", "-")
        full = f"{section}.{word}".lstrip(".")
        if dataclasses.is_dataclass(hint):
            flags += _walk(value, full)
            continue
        marks, kind = (hint.__metadata__, hint.__origin__) if typing.get_origin(hint) is Annotated else ((), hint)
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        is_positional = tyro.conf.Positional in marks
        many = " ..." if typing.get_origin(kind) is tuple else ""
        values = f"{word.upper()}{many}" if is_positional else _values(kind, word)
        missing = value is dataclasses.MISSING
        about = _comment(cls, name)
        names = (*aliases, word if is_positional else f"--{full}")
        flags.append(Flag(names, section, values, about, "" if missing else _said(value), missing, is_positional))
    return flags


def _said(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(_said, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _values(kind: Any, word: str) -> str:
    """What stands behind a flag: N for a number, X for one with decimals, a|b for a choice."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return ""
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, types.UnionType):
        kinds = [_values(each, word) for each in inner if each is not type(None)]
        # one is a part of the other: N and N N
        return min(kinds, key=len) + (" ..." if len(kinds) > 1 else "")
    if origin is tuple:
        one = _values(inner[0], word)
        return f"{one} ..." if inner[-1] is Ellipsis else " ".join(_values(each, word) for each in inner)
    return {int: "N", float: "X"}.get(kind, word.rpartition("-")[2].upper())


def _comment(cls: type, name: str) -> str:
    """What is written behind a field, or on the lines above it; of the nearest class that says something."""
    for each in cls.__mro__:
        if text := _comments(each).get(name):
            return text
    return ""


@cache
def _comments(cls: type) -> dict[str, str]:
    module = sys.modules.get(cls.__module__)
    tree, comments = _parsed(module) if module is not None else (None, {})
    here = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] if tree else []
    body = next((node.body for node in here if node.name == cls.__name__), [])
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = [n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
            if not lines:
                above = node.lineno - 1
                while comments.get(above, ("", False))[1]:
                    lines.insert(0, above)
                    above -= 1
            found[node.target.id] = " ".join(comments[n][0] for n in lines)
    return found


@cache
def _parsed(module: types.ModuleType) -> tuple[ast.AST | None, dict[int, tuple[str, bool]]]:
    """The module's tree, and its comments by line, with whether nothing else is on the line."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):  # frozen, or built in
        return None, {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    return ast.parse(source), comments
