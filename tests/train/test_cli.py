"""Command lines: recipes, flags, and refusals of one line with exit code 2."""

import re

import pytest

from train.cli import flat, parse, user_errors
from train.recipes import PRETRAIN


def read(*arguments):
    return parse(arguments, PRETRAIN, "demo", prog="prog", about="about")


def test_starts_from_the_default_recipe_or_a_named_one_and_changes_it_by_flags():
    assert read() == PRETRAIN["demo"]()
    config = read(
        "k400-base-800", "--model.decoder-depth", "8", "--data", "x y", "--model.image-size", "112", "160", "--steps=3"
    )
    assert config.model.decoder_depth == 8
    assert config.model.image_size == (112, 160)
    assert (config.data.path, config.steps, config.epochs, config.recipe) == ("x y", 3, 800, "k400-base-800")
    assert read("k400_base_800") == PRETRAIN["k400-base-800"]()


@pytest.mark.parametrize(
    ("arguments", "flip"),
    [
        (["--augment.flip"], True),
        (["--augment.flip", "True"], True),
        (["--augment.flip", "false"], False),
        (["--augment.no-flip"], False),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_switches_take_a_value_or_none(arguments, flip):
    assert read(*arguments).augment.flip is flip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model.sise", "vit_base"], r"--model\.sise.*did you mean --model\.size"),
        (["k500-base"], "no recipe called k500-base; there are demo, demo-scenes, tiny, k400-small-1600"),
        (["demo", "extra"], "extra"),
        (["--steps", "many"], "--steps"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["--device", "tpu"], "tpu"),
        (["--mask.ratio", "1.5"], "mask ratio must be between 0 and 1"),
        (["--mask.ratio", "0.01"], "hides 0 of 16 places"),
        (["--mask.kind", "cell"], "cell"),
        (["--model.image-size", "33"], "height must be a multiple of the cube's 8; got 33"),
        (["--model.frames", "7"], "frames must be a multiple of the cube's 2; got 7"),
        (["--model.size", "vit_giant"], "model size must be one of vit_tiny"),
        (["--model.cube", "2", "8"], "cube"),
        (["--batch-size", "0"], "batch-size must be at least 1"),
        (["--optim.betas", "0.9", "1.5"], "betas"),
        (["--augment.scales", "2.0"], "scales"),
        (["--log.every", "0"], "^prog: error: log.every must be"),
        (["--model.decoder-depth", "x"], "^prog: error: Error parsing --model.decoder-depth: [^;]*; --help lists"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refuses_in_one_line_with_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        read(*arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prog: error: ")
    assert captured.err.count("\n") == 1
    assert "----" not in captured.err  # of a frame
    assert re.search(says, captured.err)


def test_a_word_of_several_lines_is_named_in_one(capsys):
    with pytest.raises(SystemExit):
        read("no\nsuch\x1crecipe\r")
    assert capsys.readouterr().err.startswith("prog: error: no recipe called no such recipe ;")


def test_help_lists_recipes_and_settings(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert not end.value.code
    text = capsys.readouterr().out
    for word in ("k400-huge-1600", "--model.decoder-depth", "--optim.base-lr", "--resume"):
        assert word in text


def test_user_errors_become_one_line(capsys):
    for error in (ValueError("bad\n  thing"), FileNotFoundError(2, "No such file", "x")):
        with pytest.raises(SystemExit) as end, user_errors("prog"):
            raise error
        assert end.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(KeyError), user_errors("prog"):
        raise KeyError


def test_flat_names_every_setting():
    names = flat(PRETRAIN["demo"]())
    assert names["model.cube"] == [2, 8, 8]
    assert "optim.base_lr" in names
    assert "model" not in names
