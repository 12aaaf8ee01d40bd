"""Goals of whole steps, met and missed, and the page that tells them: from made-up results."""

import json

import pytest

from bench import plot_step
from bench.page import Ceilings
from bench.report import Report
from bench.step_goals import slope, step_goals
from bench.step_results import FirstStep, PartTimes, StepReport, StepResult
from bench.timing import Timing

CEILINGS = Ceilings(4e12, 8e14, Timing(1, 1, 1, 5, "events"), Timing(1, 1, 1, 5, "events"))


def result(side, ms, group="step", size="vit_base", **more):
    timing = Timing(ms * 1e3, ms * 1e3, ms * 1e3, 20, "events") if ms else None
    return StepResult(size, group, side, 64, more.pop("depth", 4), timing=timing, **more)


def report_of(*results):
    report = StepReport()
    for r in results:
        report.add(r)
    return report


def met(report, words, ceilings=CEILINGS):
    return [g.met for g in step_goals(report, ceilings) if words in g.text]


@pytest.mark.parametrize(("ms", "wanted"), [(40.0, True), (40.1, False), (None, None)])
def test_the_rate_goal(ms, wanted):
    report = report_of(result("ours, eager", 50 if ms else None), result("ours, graph", ms))
    assert met(report, "clips/s") == [wanted]
    compiled = report_of(result("ours, eager", 50), result("ours, compile", 39, "compiled"))
    assert met(compiled, "clips/s") == [True]


def test_utilisation_is_of_the_stated_operations_for_every_side():
    # 64 clips x 6 x 33.8e9 in 40.56 ms are 320 TFLOP/s
    ours, theirs = result("ours, graph", 40.56), result("transformers", 81.12)
    assert (ours.utilisation(CEILINGS), theirs.utilisation(CEILINGS)) == (pytest.approx(0.4), pytest.approx(0.2))
    assert met(report_of(result("ours, graph", 40.5)), "measured rate") == [True]
    assert met(report_of(result("ours, graph", 40.6)), "measured rate") == [False]
    assert met(report_of(result("ours, graph", 40.6)), "measured rate", None) == [None]
    large = result("ours, graph", 64 * 6 * 140e9 / 0.45 / 8e14 * 1e3 * 0.99, size="vit_large")
    assert met(report_of(large), "measured rate") == [True]


@pytest.mark.parametrize(
    ("rival", "group", "wanted"),
    [("published", "step", 3.0), ("transformers", "step", 2.0), ("transformers, compiled", "compiled", 1.25)],
)
def test_speed_goals_take_our_fastest_engine_of_the_same_rounds(rival, group, wanted):
    text = f"as fast as {rival}"

    def decided(ms, **more):
        ours = [result("ours, eager", 50, group), result("ours, graph", 40, group), result("ours, graph", 1, "other")]
        report = report_of(*ours, result(rival, ms, group, **more))
        return [g for g in step_goals(report, CEILINGS) if g.text.endswith(text)]

    assert [g.met for g in decided(40 * wanted + 0.1)] == [True]
    assert [g.met for g in decided(40 * wanted - 0.1)] == [False]
    (goal,) = decided(None, failure="RuntimeError: no")
    assert (goal.met, goal.measured) == (None, "RuntimeError: no")


def test_memory_goals_and_what_recomputing_costs():
    theirs = result("transformers", 80, peak_bytes=1000)
    ours = [result("ours, eager", 50, peak_bytes=800), result("ours, graph", 40, peak_bytes=801)]
    ours.append(result("ours, graph, norms anew", 44, peak_bytes=600))
    goals = [g for g in step_goals(report_of(theirs, *ours), CEILINGS) if "peak memory" in g.text]
    assert [g.met for g in goals] == [True, False, True]
    assert goals[2].measured.endswith("takes 1.100 of ours, graph's time")
    assert met(report_of(*ours), "peak memory") == [None] * 3


def test_loss_goals():
    def decided(words, *changes):
        sides = {"ours, eager": (1.0, 0.9, 0.8), "ours, graph": (1.0, 0.9, 0.8), "transformers": (1.0, 0.7, 0.5)}
        sides |= dict(changes)
        return met(report_of(*(result(side, 1, losses=losses) for side, losses in sides.items())), words)

    nan = float("nan")
    assert decided("first losses") == [True]
    assert decided("first losses", ("published", (1.0011, 0.9, 0.8))) == [False]
    assert decided("first losses", ("published", (nan, 0.9, 0.8))) == [False]
    assert decided("first losses", ("transformers, bfloat16 weights", (1.01, 0.9, 0.8))) == [True]
    assert decided("engines") == [True]
    assert decided("engines", ("ours, compile", (1.0, 0.9, 0.8049))) == [False]
    assert decided("engines", ("ours, compile", (1.0, nan, 0.8))) == [False]
    assert decided("engines", ("ours, compile", (1.0, 0.9, 0.803))) == [True]
    assert decided("engines", ("ours, eager", ())) == [None]


@pytest.mark.parametrize(("estimated", "wanted"), [(851, True), (849, False), (1149, True), (1151, False)])
def test_the_estimate_goal(estimated, wanted):
    report = report_of(result("ours, eager, mlp", 50, "memory", peak_bytes=1000, estimated_bytes=estimated))
    assert met(report, "estimate") == [wanted]


def test_depth_goals_compare_slopes():
    def report(ours, published):
        sides = {"ours, graph": ours, "published": published}
        depths = (1, 2, 4, 8)
        return report_of(
            *(
                result(side, 10 + slope * d, "depth", depth=d, peak_bytes=10**9 * (5 + slope * d))
                for side, slope in sides.items()
                for d in depths
            )
        )

    assert met(report(5, 6), "decoder layer") == [True, True]
    assert met(report(6, 5), "decoder layer") == [False, False]
    assert slope(report(5, 6), "vit_base", "published", lambda r: r.peak_bytes) == 6 * 10**9
    alone = report_of(result("ours, graph", 10, "depth", depth=1), result("published", None, "depth", depth=1))
    assert met(alone, "decoder layer") == [None, None]


@pytest.mark.parametrize(("seconds", "wanted"), [(19.9, True), (20.0, False)])
def test_the_first_step_goal(seconds, wanted):
    report = StepReport(first_steps=[FirstStep("vit_base", 64, "eager", 5.0, 6.0, seconds, seconds + 1)])
    assert met(report, "first step") == [wanted]


def whole_report():
    steps = report_of(
        result("ours, eager", 50, losses=(1.4, 1.3), peak_bytes=10**10, reserved_bytes=12 * 10**9),
        result("published", 120, losses=(1.4001, 1.31), peak_bytes=4 * 10**10),
        result("transformers", None, failure="ImportError: no | such thing"),
        result("ours, compile", 45, "compiled"),
        result("ours, eager, none", 50, "memory", peak_bytes=10**10, estimated_bytes=9 * 10**9),
        *(result(s, 10 * d, "depth", depth=d, peak_bytes=d) for d in (1, 2) for s in ("ours, graph", "published")),
    )
    measured = {"encoder": {"forward": 50.0, "backward": 100.0}, "optimiser": {"forward": 20.0}}
    steps.parts = [PartTimes("vit_base", 64, measured, {"encoder": 100.0, "optimiser": 16.0})]
    steps.first_steps = [FirstStep("vit_base", 64, "eager", 5.0, 6.0, 15.0, 16.0)]
    steps.notes = ["vit_base: published did not fit with 128 clips."]
    return Report({"gpu": "Made Up"}, ceilings=CEILINGS, steps=steps, pages=("step",))


def test_the_page_says_what_was_found(tmp_path):
    whole_report().write(tmp_path)
    page = (tmp_path / "step.md").read_text()
    assert not (tmp_path / "ops.md").exists()
    assert "# A training step on Made Up" in page
    row = "| ours, eager | 64 | 1,280 | 32.4% | 50.00 | 50.00 to 50.00 | 1.00 | 10.00 | 12.00 | 1.40000 | 0.0e+00 "
    assert row + "| 1.30000 | 0.0e+00 |  |" in page
    assert "| published | 64 | 533 | 13.5% | 120.00 | 120.00 to 120.00 | 2.40 | 40.00 |  | 1.40010 | 7.1e-05 |" in page
    assert "ImportError: no \\| such thing" in page
    assert "published did not fit with 128 clips." in page
    assert "| encoder | 50.0 | 100.0 | 150.0 | 88% | 100.0 | 1.50 |" in page
    assert "| all |  |  | 170.0 |  | 116.0 | 1.47 |" in page
    assert "| ours, eager, none | 64 | 10.00 | 9.00 | -10.0% | 50.00 | 1.000 |  |" in page
    assert "| ours, graph | each more |  | 0.00 | 10.00 |  |" in page
    assert "| vit_base | 64 | eager | 5.0 | 6.0 | 15.0 | 16.0 |" in page
    raw = json.loads((tmp_path / "step.json").read_text())
    assert raw["results"][1]["timing"]["median"] == 120_000
    assert any(g["met"] is False for g in raw["goals"])
    for line in page.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in {line2.count("|") for line2 in page.splitlines()}


def test_the_picture_is_drawn_from_what_was_written(tmp_path):
    pytest.importorskip("matplotlib")
    whole_report().write(tmp_path)
    assert plot_step.main([str(tmp_path)]) == 0
    assert (tmp_path / "step_parts.png").read_bytes()[:4] == b"\x89PNG"
