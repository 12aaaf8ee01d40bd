"""Flags of a configuration: what is read off its dataclasses."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro

from train.detect_recipes import DETECT
from train.finetune_recipes import FINETUNE
from train.flags import flags_of, sections_of
from train.recipes import PRETRAIN


@dataclass(frozen=True)
class Inner:
    """What is inside."""

    path: Annotated[str | None, tyro.conf.arg(aliases=["--place"])] = None
    # two lines
    # above
    sides: tuple[float, ...] = (1.0, 0.5)
    on: bool = True


@dataclass(frozen=True)
class Settings:
    """Of a test."""

    thing: tyro.conf.Positional[str]  # what it is about
    hidden: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "x"
    count: int | None = None  # how many
    kind: Literal["a", "b"] = "a"
    some_part: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Narrower(Settings):
    """With another default."""

    count: int | None = 3


def test_tells_names_values_comments_and_defaults():
    found = {flag.key: flag for flag in flags_of(Narrower)}
    assert list(found) == ["thing", "count", "kind", "some-part.path", "some-part.sides", "some-part.on"]
    assert found["thing"].usage == "THING"
    assert found["thing"].is_required
    assert found["thing"].is_positional
    assert (found["count"].usage, found["count"].about, found["count"].default) == ("--count N", "how many", "3")
    assert (found["kind"].usage, found["kind"].about) == ("--kind a|b", "")
    assert found["some-part.path"].names == ("--place", "--some-part.path")
    sides = found["some-part.sides"]
    assert (sides.usage, sides.about, sides.default) == ("--some-part.sides X ...", "two lines above", "1 0.5")
    assert (found["some-part.on"].usage, found["some-part.on"].default) == ("--some-part.on", "on")
    assert sections_of(Narrower) == {"some-part": "What is inside."}


def test_takes_the_values_of_an_instance():
    flags = flags_of(Narrower("x", count=7, some_part=Inner("here")))
    found = {flag.key: flag.default for flag in flags}
    assert (found["count"], found["some-part.path"]) == ("7", "here")


@pytest.mark.long
@pytest.mark.parametrize("recipes", [PRETRAIN, FINETUNE, DETECT], ids=["pretrain", "finetune", "detect"])
def test_tyro_has_the_same_flags(recipes, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    config = recipes["demo"]()
    with pytest.raises(SystemExit):
        tyro.cli(type(config), args=["--help"], default=config)
    text = capsys.readouterr().out
    theirs = {word.strip(",") for line in text.splitlines() for word in line.split() if word.startswith("--")}
    theirs = {word.split("|")[0] for word in theirs} - {"--help", "--no"}
    ours = {name for flag in flags_of(config) for name in flag.names}
    assert ours <= theirs, ours - theirs
    # a comment may name a flag that is not in this configuration, or be cut
    extra = {name for name in theirs - ours if "." in name and ".no-" not in name}
    assert not extra
