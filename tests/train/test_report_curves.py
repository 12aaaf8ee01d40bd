"""Curves: thinned without losing a spike, on axes that hold them, drawn where they belong."""

import json
import math
import re
from html import unescape

import numpy as np
import pytest

from train.report_curves import LONGEST, Curve, axis, draw, number_text, thin

NAN = math.nan


def test_keeps_a_short_curve_and_the_spikes_of_a_long_one():
    steps = np.arange(1.0, LONGEST + 1)
    kept = thin(steps, np.where(steps == 5, np.inf, steps))
    assert not kept.is_binned
    assert kept.steps.tolist() == steps.tolist()
    assert np.isnan(kept.middle[4])
    generator = np.random.default_rng(0)
    values = generator.normal(size=100_003)
    values[70_123], values[12], values[50_000:51_000] = 99.0, -99.0, NAN
    kept = thin(np.arange(100_003.0), values)
    assert kept.is_binned
    assert 2 * len(kept.steps) <= 1000
    assert kept.high[np.isfinite(kept.high)].max() == 99
    assert kept.low[np.isfinite(kept.low)].min() == -99
    assert kept.steps[-1] == 100_002
    # each bin by itself
    edges = np.concatenate(([-1], kept.steps)).astype(int)
    for number in (0, 17, len(kept.steps) - 1):
        part = values[edges[number] + 1 : edges[number + 1] + 1]
        assert kept.middle[number] == np.median(part)
        assert (kept.low[number], kept.high[number]) == (part.min(), part.max())
    # and a gap where there is no number
    assert 2 <= np.isnan(kept.middle).sum() <= 5


@pytest.mark.parametrize("values", [[1.0], [0.0], [3, 3], [-5, 2], [1e-9, 2e-9], [1e12, 3e12], [0.3, 0.31, 0.3]])
@pytest.mark.parametrize("zero", [True, False])
def test_its_axis_holds_the_values_with_few_round_ticks(values, zero):
    made = axis(np.array(values, dtype=float), zero=zero)
    assert made.low <= min(values)
    assert made.high >= max(values)
    assert not zero or made.low <= 0
    assert 2 <= len(made.ticks) <= 8
    assert all(made.low - 1e-12 <= tick <= made.high * (1 + 1e-9) for tick in made.ticks)
    digits = [re.sub("[-0.]", "", f"{tick:.4g}".split("e")[0]) for tick in made.ticks]
    assert all(len(each) <= 2 for each in digits if zero)


def test_its_axis_is_logarithmic_for_spikes_alone():
    falling = np.linspace(6, 0.3, 100)
    assert not axis(falling, log=True).is_log
    spiked = np.append(np.full(100, 0.3), 4.0)
    assert not axis(spiked).is_log
    made = axis(spiked, log=True)
    assert made.is_log
    assert made.place(np.array([made.low, math.sqrt(made.low * made.high), made.high])) == pytest.approx([0, 0.5, 1])
    assert {0.5, 1.0, 2.0} <= set(made.ticks)
    # of a value that is not positive there is no logarithm
    assert not axis(np.append(spiked, 0.0), log=True).is_log


def points(path):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]


def test_draws_each_point_where_it_belongs_with_gaps():
    steps, values = np.array([0.0, 25, 50, 75, 100]), np.array([0.0, 10, NAN, 5, 10])
    vertical = axis(values[np.isfinite(values)], zero=True, most=10)
    drawing = draw([Curve('a <b> "c"', steps, values, 9)], vertical, title="T & <t>")
    path = re.search(r'<path d="([^"]*)"', drawing)[1]
    left, right, _ = map(float, re.search(r'data-area="([^"]*)"', drawing)[1].split())
    (x0, y0), (x1, y1), (x3, y3), (x4, y4) = points(path)
    assert [x0, x1, x3, x4] == pytest.approx(
        [left, left + (right - left) / 4, right - (right - left) / 4, right], abs=0.1
    )
    assert y1 == y4
    assert y3 == pytest.approx((y0 + y4) / 2, abs=0.1)
    # a pen that is lifted once
    assert [letter for letter in path if letter.isalpha()] == ["M", "L", "M", "L"]
    assert 'class="c1 dashed"' in drawing
    assert "<b>" not in drawing
    assert "<t>" not in drawing
    told = json.loads(unescape(re.search(r'data-points="([^"]*)"', drawing)[1]))
    assert told == [[0, 25, 75, 100], [0, 10, 5, 10]]


def test_draws_a_long_curve_as_a_band_with_its_range_told():
    steps = np.arange(5000.0)
    values = np.sin(steps)
    drawing = draw([Curve("a", steps, values, 0)], axis(values), title="t")
    assert len(drawing) < 60_000
    told = json.loads(re.search(r'data-points="([^"]*)"', drawing)[1])
    assert len(told) == 4
    assert max(told[3]) == pytest.approx(1, abs=1e-3)
    band = re.search(r'class="band" d="([^"]*)"', drawing)[1]
    assert band.count("M") == band.count("V") == len(told[0])


def test_draws_a_curve_without_a_number():
    nothing = np.array([NAN, NAN])
    for steps, values in ((np.array([1.0, 2]), nothing), (np.empty(0), np.empty(0))):
        assert "no value" in draw([Curve("a", steps, values, 0)], axis(np.empty(0)), title="t")


def test_writes_numbers_shortly():
    told = {0.29489237: "0.29489", 1234.5: "1,234.5", 3600: "3,600", 1.3e-05: "1.3e-05", 5: "5", 0: "0", 2e7: "2e+07"}
    assert {value: number_text(value) for value in told} == told
    assert number_text(NAN) == "not finite"


@pytest.mark.parametrize("values", [[1e308, -1e308], [1e308, 1.0], [5e-324, 0.0]])
def test_its_axis_holds_any_float(values):
    for log in (False, True):
        made = axis(np.array(values), log=log)
        assert made.low < made.high
        assert all(map(math.isfinite, (made.low, made.high, *made.ticks)))
