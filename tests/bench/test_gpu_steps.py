"""Whole steps beside each other on a CPU, at a tiny size: which sides are timed, and what is said of the others."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import train.engine
from bench import gpu_steps, steps
from bench.bench_traffic import expected_flops
from bench.compare import Setting
from bench.gpu_steps import Bench, Contest, Side, turns
from bench.shapes import Shape, shape_of
from bench.step_goals import difference
from bench.step_results import StepReport, counted_gmac, stated_gmac
from bench.steps import DECODER_DEPTHS, Step
from tests.bench.fake_meter import FakeMeter
from tests.recorder import Recorder

SMALL = Shape("vit_tiny", clips=2, width=64, heads=4, decoder_width=64, frames=4, side=48, ratio=0.5)
CPU = torch.device("cpu")
STEPS = 5


@pytest.fixture(autouse=True)
def _short_and_without_graphs(monkeypatch):
    monkeypatch.setattr(train.engine, "CudaRecorder", (lambda device: Recorder()))
    monkeypatch.setattr(gpu_steps, "ROUNDS", 2)
    monkeypatch.setattr(gpu_steps, "COMPARED", STEPS)


def bench_on(meter, **changes):
    saved = []
    setting = Setting(CPU, torch.float32, "eager")
    bench = Bench(setting, meter, StepReport(), lambda: saved.append(dict(bench.report.results)), **changes)
    bench.saved = saved
    bench.report.clips["vit_tiny"] = SMALL.clips
    return bench


def pretended(meter, seconds, losses=(1.0,), holds=100, uses=1000, fails_at=None, error=None, order=None, name=""):
    """A side whose every step takes so long, and fails at one of them."""

    def build(shape, device, weights):
        assert sum(p.numel() for p in weights.parameters()) > 100
        meter.held += holds
        count = 0

        def run():
            nonlocal count
            count += 1
            if count == fails_at:
                raise error or RuntimeError("on purpose\nand more")
            if order is not None:
                order.append(name)
            meter.now += seconds
            meter.most = max(meter.most, meter.held + uses * shape.clips)
            return torch.tensor(losses[min(count, len(losses)) - 1])

        return Step(nn.Identity(), run, ())

    return Side(build)


def contest(bench, sides, group="step", **changes):
    return Contest(bench, group, replace(SMALL, **changes), sides, 2)


def test_sides_take_turns_and_the_first_step_of_a_turn_is_not_timed():
    meter, order = FakeMeter(), []
    sides = {"ours, eager": pretended(meter, 0.1, order=order, name="a")}
    sides["published"] = pretended(meter, 0.3, order=order, name="b", holds=7)
    bench = bench_on(meter)
    assert contest(bench, sides).run(2) == ""
    assert "".join(order) == "a" * STEPS + "b" * STEPS + "aabb" + "aaabbb" * 2
    ours, published = bench.report.group("vit_tiny", "step").values()
    assert (ours.timing.median, published.timing.median) == (pytest.approx(1e5), pytest.approx(3e5))
    assert (ours.timing.repeats, ours.timing.how) == (4, "events")
    assert (ours.clips_per_second, ours.losses) == (pytest.approx(20), (1.0,) * STEPS)
    # each beside nothing of the others
    assert (ours.peak_bytes, published.peak_bytes) == (100 + 2 * 1000, 7 + 2 * 1000)
    assert (ours.reserved_bytes, published.reserved_bytes) == (200, 14)


def test_losses_and_memory_are_saved_before_anything_is_timed():
    meter = FakeMeter()
    bench = bench_on(meter)
    contest(bench, {"ours, eager": pretended(meter, 0.1, losses=(1.5, 1.25))}).run(2)
    (first,) = bench.saved[0].values()
    assert (first.losses[:2], first.peak_bytes, first.timing) == ((1.5, 1.25), 2100, None)
    assert bench.saved[-1][first.size, "step", first.side, 2].timing is not None


def test_a_side_of_another_loss_gets_no_time():
    meter = FakeMeter()
    sides = {
        "ours, eager": pretended(meter, 0.1),
        "transformers": pretended(meter, 0.1, losses=(1.0009, 9.0)),
        "published": pretended(meter, 0.1, losses=(1.002,)),
        "rough": replace(pretended(meter, 0.1, losses=(1.02,)), tolerance=0.03),
        "ours, graph": pretended(meter, 0.1, losses=(float("nan"),)),
    }
    bench = bench_on(meter)
    one = contest(bench, sides)
    assert one.run(1) == ""
    results = bench.report.group("vit_tiny", "step")
    assert [side for side, r in results.items() if r.timing] == ["ours, eager", "transformers", "rough"]
    assert results["published"].failure == "losses differ: 1.002, 1 ours, eager; allowed 0.001"
    assert one.failures() == "ours, graph, decoder depth 2: losses differ: nan, 1 ours, eager; allowed 0.001"


@pytest.mark.parametrize("at", [1, STEPS, STEPS + 2, STEPS + 4], ids=["first", "compared", "warm", "timed"])
def test_a_side_that_fails_costs_no_other_its_time(at):
    meter = FakeMeter()
    sides = {"ours, eager": pretended(meter, 0.1), "transformers": pretended(meter, 0.1, fails_at=at)}
    sides["published"] = pretended(meter, 0.1)
    bench = bench_on(meter)
    contest(bench, sides).run(2)
    results = bench.report.group("vit_tiny", "step")
    assert results["transformers"].failure == "RuntimeError: on purpose"
    assert [r.timing is None for r in results.values()] == [False, True, False]
    assert [r.timing.repeats for r in results.values() if r.timing] == [4, 4]


def test_a_slow_side_is_left_out():
    meter = FakeMeter()
    sides = {"ours, eager": pretended(meter, 0.1), "published": pretended(meter, 2.1)}
    bench = bench_on(meter)
    contest(bench, sides).run(2)
    ours, published = bench.report.group("vit_tiny", "step").values()
    assert published.failure == "2.1 s a step: it would hold up the others"
    assert (ours.timing.repeats, published.timing) == (4, None)


def short_of_memory(meter, most_clips, wrapped=False):
    """A side that has room for so many clips."""
    plain = pretended(meter, 0.1)

    def build(shape, device, weights):
        if shape.clips <= most_clips:
            return plain.build(shape, device, weights)
        if not wrapped:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except torch.OutOfMemoryError:
            raise RuntimeError("operation failed due to a previous error during capture") from None

    return Side(build)


@pytest.mark.parametrize("wrapped", [False, True])
def test_when_a_rival_does_not_fit_all_sides_get_fewer_clips(monkeypatch, wrapped):
    meter = FakeMeter()
    bench = bench_on(meter)
    bench.report.clips["vit_tiny"] = 8
    sides = {"ours, eager": pretended(meter, 0.1), "published": short_of_memory(meter, 2, wrapped)}
    monkeypatch.setattr(Bench, "sides", lambda self: sides)
    gpu_steps.step(bench, SMALL)
    assert bench.report.clips == {"vit_tiny": 2}
    results = bench.report.group("vit_tiny", "step")
    assert [(r.clips, r.failure, r.timing is None) for r in results.values()] == [(2, "", False)] * 2
    assert bench.report.notes == [f"vit_tiny: published did not fit with {clips} clips." for clips in (8, 4)]


def test_memory_that_sides_take_from_each_other_counts_as_not_fitting(monkeypatch):
    meter = FakeMeter()

    bench = bench_on(meter)
    bench.report.clips["vit_tiny"] = 4
    calm = pretended(meter, 0.1)

    def build(shape, device, weights):
        step = calm.build(shape, device, weights)

        def run():
            meter.tried += shape.clips > 2
            return step.run()

        return replace(step, run=run)

    monkeypatch.setattr(Bench, "sides", lambda self: {"ours, eager": Side(build)})
    gpu_steps.step(bench, SMALL)
    assert bench.report.clips == {"vit_tiny": 2}
    assert bench.report.notes == ["vit_tiny: the allocator did not fit with 4 clips."]


def test_what_does_not_fit_with_a_single_clip_is_an_error(monkeypatch):
    meter = FakeMeter()
    bench = bench_on(meter)
    monkeypatch.setattr(Bench, "sides", lambda self: {"published": short_of_memory(meter, 0)})
    with pytest.raises(RuntimeError, match="published does not fit with a single clip"):
        gpu_steps.step(bench, SMALL)


def test_beside_compiled_sides_the_others_go_on_without_what_does_not_fit(monkeypatch):
    meter = FakeMeter()
    bench = bench_on(meter)
    sides = {"ours, graph": pretended(meter, 0.1), "ours, compile": short_of_memory(meter, 1)}
    sides["transformers, compiled"] = pretended(meter, 0.2)
    monkeypatch.setattr(Bench, "compiled_sides", lambda self: sides)
    with pytest.raises(RuntimeError, match="ours, compile, decoder depth 2: OutOfMemoryError"):
        gpu_steps.compiled(bench, SMALL)
    timed = [side for side, r in bench.report.group("vit_tiny", "compiled").items() if r.timing]
    assert timed == ["ours, graph", "transformers, compiled"]
    assert bench.report.notes == ["vit_tiny, compiled, decoder depth 2: ours, compile did not fit with 2 clips."]


@pytest.mark.long
def test_nothing_of_a_side_that_failed_or_of_a_group_is_left():
    models, weights, living = [], [], []

    def build(shape, device, weights_of_all):
        models.append(weakref.ref(model := nn.Linear(2, 2)))
        weights.append(weakref.ref(weights_of_all))
        return Step(model, lambda: model(torch.ones(2)).sum().detach(), ())

    def fails(shape, device, weights):
        step = build(shape, device, weights)

        def run():
            raise RuntimeError(f"with {step.model}")

        return replace(step, run=run)

    def clear():
        gc.collect()
        living.append(sum(ref() is not None for ref in models))

    meter = FakeMeter()
    meter.clear = clear
    sides = {"ours, eager": build, "transformers": fails, "published": build}
    sides = {name: Side(lambda *a, weights, b=b: b(*a, weights), tolerance=1e9) for name, b in sides.items()}
    contest(bench_on(meter), sides).run(1)
    # before and after each side, and at the end
    assert living == [0, 1, 1, 1, 1, 2, 0]
    assert [ref() for ref in weights] == [None] * 3


def test_ours_by_every_engine_and_the_rivals_give_the_same_losses(monkeypatch):
    """The real sides in float32, and in bfloat16 the one whose weights are."""
    pytest.importorskip("transformers")
    asked = []
    for name in ("set_recompute", "set_attention", "make_engine"):
        plain = getattr(steps, name)
        monkeypatch.setattr(steps, name, lambda *a, f=plain: asked.append([x for x in a if type(x) is str]) or f(*a))
    bench = bench_on(FakeMeter(), attention="sdpa")
    gpu_steps.step(bench, SMALL)
    ours = [["none"], ["sdpa"], ["eager"]], [["none"], ["sdpa"], ["graph"]], [["norms"], ["sdpa"], ["graph"]]
    assert asked == [one for side in ours for one in side]
    results = bench.report.group("vit_tiny", "step")
    assert {side: r.failure for side, r in results.items()} == dict.fromkeys(bench.sides(), "")
    assert len(results) == 6
    wanted = results["ours, eager"].losses
    assert list(wanted) == sorted(wanted, reverse=True)  # it learns
    for side, r in results.items():
        rough = side == "transformers, bfloat16 weights"
        assert difference(r.losses, wanted) < (2e-2 if rough else 1e-5), side
        assert rough == (difference(r.losses, wanted) > 1e-4)
        assert r.timing.repeats == 4
    assert results["ours, eager"].estimated_bytes > 0
    assert results["published"].estimated_bytes is None


def test_a_failure_of_ours_fails_the_section(monkeypatch):
    meter = FakeMeter()
    sides = {"ours, eager": pretended(meter, 0.1), "ours, graph": pretended(meter, 0.1, fails_at=1)}
    monkeypatch.setattr(Bench, "sides", lambda self: sides)
    bench = bench_on(meter)
    with pytest.raises(RuntimeError, match="^ours, graph, decoder depth 2: RuntimeError: on purpose$"):
        gpu_steps.step(bench, SMALL)
    assert bench.report.group("vit_tiny", "step")["ours, eager"].timing is not None


@pytest.mark.parametrize(("engine", "more"), [("eager", set()), ("graph", {"weight"}), ("compile", {"weight"})])
def test_an_engine_gets_what_the_training_loop_gives_it(monkeypatch, engine, more):
    given = []

    class Spy(train.engine.Engine):
        def micro_batch(self, inputs, share):
            given.append((set(inputs), share))
            super().micro_batch(inputs, share)

    Spy.fixed = engine != "eager"
    monkeypatch.setattr(steps, "make_engine", lambda name, *others: Spy(*others))
    assert steps.our_step(SMALL, CPU, engine=engine).run().isfinite()
    assert given == [({"frames", "keys"} | more, 1.0)]


def test_compiled_sides_are_compiled(monkeypatch):
    pytest.importorskip("transformers")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append((type(f).__name__, how["backend"])) or f)
    bench = bench_on(FakeMeter())
    gpu_steps.compiled(bench, SMALL)
    assert compiled == [("PretrainObjective", "inductor"), ("VideoMAEForPreTraining", "eager")]
    assert {side: r.failure for side, r in bench.report.group("vit_tiny", "compiled").items()} == dict.fromkeys(
        ("ours, graph", "transformers", "ours, compile", "transformers, compiled"), ""
    )


@pytest.mark.long
def test_compiled_sides_run_compiled(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(train.engine, "Compiled", partial(train.engine.Compiled, backend="aot_eager"))
    bench = bench_on(FakeMeter())
    gpu_steps.compiled(bench, SMALL)
    results = bench.report.group("vit_tiny", "compiled").values()
    assert [r.failure for r in results] == [""] * 4
    assert max(difference(r.losses, next(iter(results)).losses) for r in results) < 1e-5


@pytest.mark.long
def test_memory_and_depths_are_measured_with_the_clips_that_had_room(monkeypatch):
    asked, estimate = [], gpu_steps.estimate
    monkeypatch.setattr(gpu_steps, "estimate", lambda work, clips: asked.append((work, clips)) or estimate(work, clips))
    bench = bench_on(FakeMeter())
    bench.report.clips["vit_tiny"] = 1
    gpu_steps.memory(bench, SMALL)
    found = bench.report.group("vit_tiny", "memory")
    assert list(found) == [f"ours, eager, {name}" for name in ("none", "norms", "mlp", "block")]
    assert [(work.recompute, work.bytes_each, work.decoder_depth, clips) for work, clips in asked] == [
        (name, 4, 2, 1) for name in ("none", "norms", "mlp", "block")
    ]
    assert {r.estimated_bytes for r in found.values()} == {estimate(*asked[0]).peak}  # weights, with one clip
    gpu_steps.depths(bench, SMALL)
    deep = [r for r in bench.report.results.values() if r.group == "depth"]
    assert [(r.side, r.depth) for r in deep] == [(s, d) for d in (1, 2, 4, 8) for s in ("ours, graph", "published")]
    assert {r.clips for r in (*found.values(), *deep)} == {1}
    assert all(r.timing and not r.failure for r in (*found.values(), *deep))


def test_the_number_of_clips_is_that_of_the_rule():
    """With an H200's memory, and with that of a GPU of 24 GB."""
    bench = bench_on(FakeMeter(free=149 * 10**9))
    sizes = ("vit_small", "vit_base", "vit_large", "vit_huge")
    assert [bench.clips(shape_of(size)) for size in sizes] == [64, 64, 32, 16]
    bench = bench_on(FakeMeter(free=24 * 10**9))
    assert [bench.clips(shape_of(size)) for size in sizes] == [32, 8, 1, 1]
    bench.report.clips["vit_base"] = 4
    assert bench.clips(shape_of("vit_base")) == 4


def test_stated_operations_are_those_of_the_formula():
    for size in ("vit_small", "vit_base", "vit_large", "vit_huge"):
        shape, depth = shape_of(size, 1), DECODER_DEPTHS[size]
        assert stated_gmac(size) == pytest.approx(counted_gmac(shape, depth), rel=0.01)
        every_cube = (shape.num_cubes - shape.num_visible) * shape.cube_values * shape.width
        counted = expected_flops(shape, "published", depth)[0] / 2 - every_cube
        assert counted_gmac(shape, depth) == pytest.approx(counted / 1e9, rel=1e-9)
    assert stated_gmac("vit_huge") == pytest.approx(234.8, abs=0.1)


def test_turns_give_what_was_measured_before_a_failure_to_no_one():
    meter, failures = FakeMeter(), {}
    step = pretended(meter, 0.1, fails_at=5).build(SMALL, CPU, nn.Linear(20, 20))
    assert turns({"a": step}, meter, failures, rounds=3) == {}
    assert failures == {"a": "RuntimeError: on purpose"}
