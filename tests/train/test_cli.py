"""Command lines: recipes, flags, and refusals of one line with exit code 2."""

import re

import pytest

from train.cli import flat, parse, parse_flags, user_errors
from train.finetune_recipes import FINETUNE
from train.flags import flags_of
from train.recipes import PRETRAIN
from train.visualize import VisualizeConfig


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
        (["--decoder-depth", "8"], r"no flag --decoder-depth \(did you mean --model\.decoder-depth\?\)"),
        (["--lr=1"], r"no flag --lr \(did you mean --optim\.base-lr\?\)"),
        (["--qqq"], "no flag --qqq; --help-all lists"),
        (
            ["k400-bas"],
            r"no recipe called k400-bas \(did you mean k400-base-800\?\); there are demo, demo-scenes, tiny",
        ),
        (["zzz"], "no recipe called zzz; there are demo, demo-scenes, tiny, k400-small-1600"),
        (["--help", "optm"], r"no section called optm \(did you mean optim\?\); there are data, optim"),
        (["demo", "extra"], "extra"),
        (["--steps", "many"], "error: --steps takes N; got many$"),
        (["--steps"], "error: --steps takes N; got nothing$"),
        (["--model.cube=2", "x"], "error: --model.cube takes N N N; got 2 x$"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["--device", "cdua"], r"--device must be one of .*; got cdua \(did you mean cuda\?\)"),
        (["--mask.ratio", "1.5"], "mask ratio must be between 0 and 1"),
        (["--mask.ratio", "0.01"], "hides 0 of 16 places"),
        (["--mask.kind", "cell"], "--mask.kind must be one of tube, random, frame; got cell;"),
        (["--model.image-size", "33"], "height must be a multiple of the cube's 8; got 33"),
        (["--model.frames", "7"], "frames must be a multiple of the cube's 2; got 7"),
        (
            ["--model.size", "vit_giant"],
            r"model size must be one of vit_tiny.*got 'vit_giant' \(did you mean vit_\w+\?\)",
        ),
        (["--model.cube", "2", "8"], "cube"),
        (["--batch-size", "0"], "batch-size must be at least 1"),
        (["--optim.betas", "0.9", "1.5"], "betas"),
        (["--augment.scales", "2.0"], "scales"),
        (["--log.every", "0"], "^prog: error: log.every must be"),
        (["--model.decoder-depth", "x"], "^prog: error: --model.decoder-depth takes N; got x$"),
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


def test_names_the_flag_that_is_needed_and_what_it_takes(capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(["a.mp4"], VisualizeConfig, prog="prog", about="")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("prog: error: --weights WEIGHTS is needed: a run folder, a checkpoint")


def test_a_word_of_several_lines_is_named_in_one(capsys):
    with pytest.raises(SystemExit):
        read("no\nsuch\x1crecipe\r")
    assert capsys.readouterr().err.startswith("prog: error: no recipe called no such recipe ;")


def page(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        read(*arguments)
    assert not end.value.code
    return capsys.readouterr().out


def test_help_is_a_screen_with_recipes_and_common_flags(capsys):
    text = page(capsys, "--help")
    assert text.count("\n") <= 45
    assert max(map(len, text.splitlines())) <= 100
    for word in ("k400-huge-1600", "--model.decoder-depth N", "--optim.base-lr", "--resume", "--help-all"):
        assert word in text
    assert "--optim.eps" not in text


def test_help_has_the_values_of_the_recipe(capsys):
    assert re.search(r"--batch-size N .*\(64\)", page(capsys, "demo", "--help"))
    assert re.search(r"--batch-size N .*\(2048\)", page(capsys, "k400-base-800", "-h"))


def test_help_of_a_section_has_its_flags_in_full(capsys):
    text = page(capsys, "--help", "optim")
    assert "--optim.eps X" in text
    assert "--model.size" not in text
    assert "--rand-augment.ops N" in page_of_finetune(capsys, "rand_augment")


def page_of_finetune(capsys, section):
    with pytest.raises(SystemExit):
        parse(["--help", section], FINETUNE, "demo", prog="prog", about="about")
    return capsys.readouterr().out


def test_all_flags_are_those_that_are_read(capsys):
    text = page(capsys, "--help-all")
    listed = {name for flag in flags_of(PRETRAIN["demo"]()) for name in flag.names}
    assert listed == {
        "--data",
        *(f"--{name.replace('_', '-')}" for name in flat(PRETRAIN["demo"]()) if name != "recipe"),
    }
    for name in listed:
        assert name in text
    assert "  k400-huge-1600: ViT-H on Kinetics-400" in text


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
