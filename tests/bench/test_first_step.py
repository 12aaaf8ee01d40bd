"""The first step of a fresh process: who starts the clock, and what the process tells."""

import json
import sys

import pytest

from bench import first_step


def test_the_first_step_is_counted_from_the_start_of_the_process():
    told = "import json, os, time; print('noise'); assert not os.listdir(os.environ['TRITON_CACHE_DIR']); "
    told += "t = time.time(); print(json.dumps(dict(imported=t, built=t + 1, first_step=t + 2, second_step=t + 3)))"
    found = first_step.first_step("vit_base", 4, command=[sys.executable, "-S", "-c", told])
    assert 0 < found.imported < 10
    assert found.first_step == pytest.approx(found.imported + 2)
    assert (found.size, found.clips, found.engine) == ("vit_base", 4, "eager")
    with pytest.raises(RuntimeError, match=r"exited with 1:(.|\n)*ZeroDivisionError"):
        first_step.first_step("vit_base", 4, command=[sys.executable, "-S", "-c", "1 / 0"])


def test_the_process_of_the_first_step_tells_its_moments(capsys):
    assert first_step.main(["--size", "vit_tiny", "--clips", "1"]) == 0
    moments = json.loads(capsys.readouterr().out)
    assert list(moments) == list(first_step.STAGES)
    assert list(moments.values()) == sorted(moments.values())


def test_the_default_engine_is_that_of_training():
    recipes = pytest.importorskip("train.recipes")
    assert recipes.demo().engine == first_step.DEFAULT_ENGINE
