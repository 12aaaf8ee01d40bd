"""Fuzzing's target of command lines: recipes and flags of every verb."""

import contextlib
import dataclasses
import io
from typing import Any

from hypothesis import strategies as st

from tests.fuzz import Target
from tests.fuzz_inputs import values, words
from train import cli
from train.detect_recipes import DETECT
from train.evaluate import EVALUATE
from train.features import FeaturesConfig
from train.finetune_recipes import FINETUNE
from train.moco_recipes import MOCO
from train.probe import ProbeConfig
from train.recipes import PRETRAIN
from train.study import StudyConfig
from train.visualize import VisualizeConfig

_RECIPES: dict[str, tuple[Any, str]] = {
    "pretrain": (PRETRAIN, "demo"),
    "moco": (MOCO, "demo"),
    "finetune": (FINETUNE, "demo"),
    "detect": (DETECT, "demo"),
    "evaluate": (EVALUATE, next(iter(EVALUATE))),
    "plan": (PRETRAIN, "k400-base-800"),
}
_FLAGS: dict[str, type] = {
    "features": FeaturesConfig,
    "probe": ProbeConfig,
    "study": StudyConfig,
    "visualize": VisualizeConfig,
}


class CommandLines(Target):
    """Every verb's recipes and flags: a configuration, or one line and exit code 2."""

    name, share = "command lines", 3
    refusals = (SystemExit,)

    def inputs(self) -> st.SearchStrategy[tuple[str, list[str]]]:
        return st.sampled_from((*_RECIPES, *_FLAGS)).flatmap(
            lambda verb: st.tuples(st.just(verb), _arguments(verb, self._flags(verb)))
        )

    def _flags(self, verb: str) -> tuple[str, ...]:
        if verb in _FLAGS:
            return tuple(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(_FLAGS[verb]))
        recipes, default = _RECIPES[verb]
        return tuple(f"--{name.replace('_', '-')}" for name in cli.flat(recipes[default]()))

    def parse(self, value: tuple[str, list[str]]) -> None:
        verb, arguments = value
        said, blamed = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(blamed):
                if verb in _FLAGS:
                    cli.parse_flags(arguments, _FLAGS[verb], prog="prog", about="about")
                else:
                    cli.parse(arguments, *_RECIPES[verb], prog="prog", about="about")
        except SystemExit as end:
            if end.code:
                _check_refusal(end.code, said.getvalue(), blamed.getvalue())
            raise


def _check_refusal(code: object, said: str, blamed: str) -> None:
    assert code == 2
    assert said == ""
    assert blamed.startswith("prog: error: ")
    assert len(blamed.splitlines()) == 1
    assert len(blamed) > 20


def _arguments(verb: str, flags: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    """Flags with values, right or wrong in number and kind, and what is no flag at all."""
    name = st.one_of(
        st.sampled_from(flags), st.sampled_from(flags), st.sampled_from(("--help", "--no", "--", "-x")), words
    )
    value = st.one_of(words, values.map(str), st.sampled_from(("true", "false", "None", "16", "224", "auto", "1e-3")))
    one = st.tuples(name, st.lists(value, max_size=3)).map(lambda pair: [pair[0], *pair[1]])
    joined = st.tuples(name, value).map(lambda pair: [f"{pair[0]}={pair[1]}"])
    many = st.lists(st.one_of(one, one, joined), max_size=4).map(
        lambda parts: [word for part in parts for word in part]
    )
    first = st.sampled_from(tuple(_RECIPES[verb][0])) if verb in _RECIPES else words
    return st.one_of(many, st.tuples(st.one_of(first, words), many).map(lambda pair: [pair[0], *pair[1]]))
