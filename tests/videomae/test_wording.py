"""Numbers in words, and what was probably meant."""

import pytest

from videomae.wording import counted, nearest, nearest_flag, plural, with_guess


def test_counts_one_and_many():
    found = [counted(n, "step") for n in (0, 1, 2, 1800)]
    assert found == ["0 steps", "1 step", "2 steps", "1,800 steps"]
    assert [plural(word) for word in ("class", "box", "key frame", "batch")] == [
        "classes",
        "boxes",
        "key frames",
        "batches",
    ]


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("k400-bas", ("k400-small-1600", "k400-base-800", "k400-base-1600"), "k400-base-800"),
        ("K400_BASE_800", ("demo", "k400-base-800"), "k400-base-800"),
        ("tubes", ("random", "tube"), "tube"),
        ("zzz", ("random", "tube"), None),
        ("x", (), None),
    ],
)
def test_finds_the_nearest_word(word, known, meant):
    assert nearest(word, known) == meant


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--stesp", "--steps"),
        ("--batchsize", "--batch-size"),
        ("--decoder-depth", "--model.decoder-depth"),
        ("--decoder_dept", "--model.decoder-depth"),
        ("--lr", "--optim.base-lr"),
        ("--model.base-lr", "--optim.base-lr"),
        ("--qqq", None),
    ],
)
def test_finds_the_nearest_flag(flag, meant):
    known = ["--steps", "--batch-size", "--model.decoder-depth", "--optim.base-lr", "--optim.min-lr"]
    assert nearest_flag(flag, known) == meant


@pytest.mark.parametrize(
    ("message", "becomes"),
    [
        ("x must be one of sdpa, triton; got 'spda'", "x must be one of sdpa, triton; got 'spda' (did you mean sdpa?)"),
        ("x must be tube or frame; got 'tub'; y", "x must be tube or frame; got 'tub' (did you mean tube?); y"),
        ("x must be one of a, b; got 'zzz'", "x must be one of a, b; got 'zzz'"),
        ("x must be at least 1; got 0", "x must be at least 1; got 0"),
        ("no such file", "no such file"),
    ],
)  # fmt: skip
def test_adds_a_guess_to_choices_only(message, becomes):
    assert with_guess(message) == becomes
