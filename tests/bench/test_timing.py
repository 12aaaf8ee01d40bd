"""bench.timing on a CPU: the same code path as on a GPU but for who reads the clock."""

import time
from contextlib import contextmanager, nullcontext

import pytest
import torch

from bench.timing import MOST_SETS, ROTATED_BYTES, _stream, in_turn, measure, num_sets, peak_memory, summary

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_summary_gives_median_and_quartiles():
    timing = summary([5.0, 1.0, 2.0, 4.0, 3.0], "clock")
    assert (timing.low, timing.median, timing.high, timing.repeats) == (2.0, 3.0, 4.0, 5)


@pytest.mark.parametrize("size", [1 << 22, 15_728_640, ROTATED_BYTES, 10 * ROTATED_BYTES])
def test_num_sets_exceeds_the_cache_on_a_gpu(size):
    count = num_sets(size, GPU)
    assert count >= 2
    assert count * size > ROTATED_BYTES
    assert count == 2 or (count - 1) * size <= ROTATED_BYTES


def test_num_sets_is_bounded():
    assert num_sets(0, GPU) == num_sets(1, GPU) == MOST_SETS
    assert num_sets(1, CPU) == 2


def test_measure_times_run_and_not_prepare():
    seen = []

    def prepare(number):
        time.sleep(0.05)
        return 10 * number

    def run(number):
        seen.append(number)
        time.sleep(0.002)

    timing = measure([1, 2, 3], run, device=CPU, prepare=prepare, seconds=0.0)
    assert timing.how == "clock"
    assert timing.repeats == 5
    assert seen == [10, 20, 30, 10, 20]
    assert 2000 <= timing.low <= timing.median <= timing.high < 50_000


def test_in_turn_calls_each_once_in_order():
    order = []
    seconds = in_turn({"b": lambda: order.append("b"), "a": lambda: order.append("a")})
    assert order == ["b", "a"]
    assert list(seconds) == ["b", "a"]
    assert all(s >= 0 for s in seconds.values())


def test_peak_memory_is_unknown_off_a_gpu():
    assert peak_memory(lambda: torch.ones(10), CPU) is None


class FakeCuda:
    """Enough of torch.cuda for `measure`: an event takes the next tick, a graph records and replays calls."""

    def __init__(self):
        self.clock, self.replays, self.refuses = 0.0, 0, False

    def install(self, monkeypatch):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.at = fake.clock

            def elapsed_time(self, end):
                return end.at - self.at  # milliseconds

        class Graph:
            calls = 0

            def replay(self):
                fake.replays += 1
                fake.clock += self.calls

        @contextmanager
        def capture(graph, stream):
            before = fake.clock
            if fake.refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            yield
            graph.calls, fake.clock = fake.clock - before, before

        stream = type("Stream", (), {"__init__": lambda self, device: None, "synchronize": lambda self: None})
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": stream,
            "stream": lambda stream: nullcontext(),
            "synchronize": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        _stream.cache_clear()
        return self


@pytest.mark.parametrize("refuses", [False, True], ids=["captured", "not captured"])
def test_measure_divides_by_the_calls_of_a_replay(monkeypatch, refuses):
    fake = FakeCuda().install(monkeypatch)
    fake.refuses = refuses

    def run(number):
        fake.clock += number  # milliseconds: several passes make one replay

    timing = measure([0.1, 0.3], run, device=GPU)
    _stream.cache_clear()
    assert timing.median == pytest.approx(200)
    assert (fake.replays > 10) == (not refuses)
    expected = "events: operation not permitted when stream is capturing" if refuses else "graph"
    assert timing.how == expected


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
def test_measure_replays_a_graph_and_gives_its_memory_back():
    sets = [torch.randn(1 << 20, device=GPU, requires_grad=True) for _ in range(3)]

    def prepare(x):
        return x, (x * x).sum()

    timing = measure(sets, lambda p: torch.autograd.grad(p[1], p[0], retain_graph=True), device=GPU, prepare=prepare)
    assert timing.how == "graph"
    assert timing.median < 1000


@needs_gpu
def test_measure_says_when_it_could_not_capture():
    sets = [torch.randn(1000, device=GPU) for _ in range(2)]
    timing = measure(sets, lambda x: x.sum().item(), device=GPU, seconds=0.01)
    assert timing.how.startswith("events: ")
    torch.testing.assert_close((sets[0] + 1).sub(1), sets[0])  # the device is still in order


@needs_gpu
def test_peak_memory_counts_what_is_freed_again():
    x = torch.randn(1 << 20, device=GPU)
    assert peak_memory(lambda: (x + 1).sum(), GPU) >= 4 << 20
