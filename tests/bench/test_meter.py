"""What a meter asks of torch.cuda, by a stand-in for it; and that without a GPU there is a clock."""

import time

import pytest
import torch

from bench.meter import GpuMeter, Meter, meter_of


def test_without_a_gpu_it_is_a_clock():
    meter = meter_of(torch.device("cpu"))
    begin = meter.mark()
    time.sleep(0.01)
    assert 0.01 <= meter.seconds(begin, meter.mark()) < 1
    assert (type(meter), meter.how, meter.has_memory, meter.allocated(), meter.retries()) == (
        Meter,
        "clock",
        False,
        0,
        0,
    )
    assert meter.free() > 1 << 20


def test_on_a_gpu_it_reads_events_and_the_allocator(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(said)
            said.append("event")

        def synchronize(self):
            said.append("waited")

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)  # milliseconds

    answers = {"memory_allocated": 1, "memory_reserved": 2, "max_memory_allocated": 3, "mem_get_info": (4, 5)}
    answers |= {"memory_stats": {"num_alloc_retries": 6}}
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(cycles))
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda on, answer=answer: answer)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *on, name=name: said.append(name))
    meter = meter_of(device)
    assert isinstance(meter, GpuMeter)
    assert meter.seconds(meter.mark(), meter.mark()) == pytest.approx(1.0)
    assert said == ["event", "event", "waited"]
    assert [meter.allocated(), meter.reserved(), meter.peak(), meter.free(), meter.retries()] == [1, 2, 3, 4, 6]
    said.clear()
    meter.clear()
    meter.restart_peak()
    meter.keep_busy(0.5)
    assert said == ["synchronize", "empty_cache", "reset_peak_memory_stats", 1_050_000_000]
