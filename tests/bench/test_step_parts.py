"""Our step by part, on a CPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import step_parts
from bench.bench_traffic import PARTS
from bench.compare import Setting
from bench.gpu_steps import Bench
from bench.page import Ceilings
from bench.shapes import Shape
from bench.step_parts import part_seconds
from bench.step_results import StepReport
from bench.steps import our_step
from bench.timing import Timing
from tests.bench.fake_meter import FakeMeter

SMALL = Shape("vit_tiny", clips=2, width=64, heads=4, decoder_width=64, frames=4, side=48, ratio=0.5)
CPU = torch.device("cpu")


def test_parts_are_timed_forward_and_backward():
    """By a clock that goes on with every op: the time of a part is the number of its ops."""
    step = our_step(SMALL, CPU)
    step.run()
    meter = FakeMeter()

    class Ticks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            meter.now += func.namespace != "profiler"
            return func(*args, **kwargs or {})

    with Ticks():
        begin = meter.now
        found = part_seconds(step, meter, repeats=2)
        total = (meter.now - begin) / 2
    both = {(part, back) for part in ("embedding", "encoder", "decoder", "loss") for back in (False, True)}
    assert found.keys() == both | {("batch", False), ("optimiser", False)}
    assert sum(found.values()) == total
    # the same model, now with twice the encoder's layers in the decoder
    assert found["decoder", True] > found["embedding", True]
    assert min(found.values()) > 0


def test_the_section_of_parts_writes_what_it_measured_before_it_counts(monkeypatch):
    saved = []
    bench = Bench(Setting.cpu(), FakeMeter(), StepReport(), lambda: saved.extend(bench.report.parts))
    bench.report.clips["vit_tiny"] = SMALL.clips
    ceilings = Ceilings(4e12, 8e14, Timing(1, 1, 1, 5, "events"), Timing(1, 1, 1, 5, "events"))
    monkeypatch.setattr(step_parts, "floors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_parts.parts(bench, SMALL, ceilings)
    (kept,) = bench.report.parts
    assert saved == [kept]
    assert kept.floors == {}
    monkeypatch.undo()
    step_parts.parts(bench, SMALL, ceilings)
    (kept,) = bench.report.parts
    assert kept.floors.keys() == kept.measured.keys() == {*PARTS, "masks"} - {"batch"}
    assert min(kept.floors.values()) > 0
