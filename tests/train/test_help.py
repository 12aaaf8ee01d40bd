"""Pages of help: what is shown first, and how it is cut."""

import pytest

from train.detect_recipes import DETECT
from train.evaluation import EVALUATE
from train.features import FeaturesConfig
from train.finetune_recipes import FINETUNE
from train.flags import flags_of, sections_of
from train.help import COMMON, _cut, commands_of, first_page, section_page
from train.probe_config import ProbeConfig
from train.recipes import PRETRAIN

ALL = (PRETRAIN["demo"](), FINETUNE["demo"](), DETECT["demo"](), EVALUATE["demo"](), ProbeConfig, FeaturesConfig)


def test_every_common_flag_exists():
    there = {flag.key for config in ALL for flag in flags_of(config)}
    missing = {key for keys in COMMON.values() for key in keys} - there
    assert missing <= {"seeds"}  # of train.study


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
def test_a_page_fits_a_screen(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    widest = {40: 72, 200: 100}.get(columns, columns)
    for config, recipes in zip(ALL, (PRETRAIN, FINETUNE, DETECT, EVALUATE, (), ()), strict=True):
        page = first_page(config, prog="python -m prog", about="about", recipes=tuple(recipes), examples=["x", "y"])
        assert len(page.splitlines()) <= (45 if widest == 100 else 50)
        # commands stand in one line, to be copied
        assert max(len(line) for line in page.splitlines() if "python -m" not in line) <= widest
    # the last page has the shortest texts, the first ones fill their lines
    first = first_page(ALL[0], prog="python -m prog", about="about", recipes=tuple(PRETRAIN))
    assert max(map(len, first.splitlines())) > widest - 12


def test_every_flag_has_a_text_or_its_section_does():
    for config in ALL:
        for flag in flags_of(config):
            assert flag.about or sections_of(config).get(flag.section), flag.key


def test_cuts_where_a_clause_ends():
    text = "folder of the run; a name of its own (of recipe and verb), if not given"
    assert _cut(text, 80) == text
    assert _cut(text, 60) == "folder of the run"
    assert _cut("a long explanation: what it does", 20) == "a long explanation"
    assert _cut("no: end of a clause to be found here", 20) == "no: end of a ..."


def test_shows_commands_that_the_recipes_give():
    found = commands_of(PRETRAIN, "demo", "python -m train.pretrain")
    assert found == ["python -m train.pretrain", "python -m train.pretrain tiny --data FOLDER"]
    assert commands_of(PRETRAIN, "demo", "python -m train.plan") == []


def test_a_verb_of_few_flags_shows_all_it_has_of_its_own():
    page = first_page(ProbeConfig, prog="p", about="a")
    for flag in flags_of(ProbeConfig):
        assert flag.section or f"  {flag.names[0]}" in page, flag.key
    assert "usage: p --weights WEIGHTS [--flag VALUE ...]" in page


def test_every_section_stands_in_the_whole():
    text = section_page(PRETRAIN["demo"](), "")
    for name in ("data", "optim", "mask", "probe"):
        assert f"\n{name}: " in text
