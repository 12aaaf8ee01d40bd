"""How long a call takes and how much memory it needs: the one place where benches and the tuner measure.

On a GPU the calls are captured into a CUDA graph, one after the other over several sets of inputs that do not fit the
cache together, and the graph is replayed between events: no time of Python's is in the figure. Every call keeps its
results until the same set's next turn, so that outputs leave the cache too. Elsewhere a clock is read around calls.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# four times an H200's cache of 60 MB: what a set left there is gone when its turn comes again
ROTATED_BYTES = 240_000_000
MOST_SETS = 64
# one replay: long enough that its start and the events' resolution, some microseconds, do not count
REPLAY_SECONDS = 2e-3


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and quartiles over the repeats, and how they were taken."""

    median: float
    low: float
    high: float
    repeats: int
    how: str  # graph, events or clock; after "events:" why the calls could not be captured


def summary(microseconds: Sequence[float], how: str) -> Timing:
    """Median and quartiles of at least two samples."""
    low, median, high = statistics.quantiles(microseconds, n=4, method="inclusive")
    return Timing(median, low, high, len(microseconds), how)


def num_sets(read_bytes: int, device: torch.device) -> int:
    """How many sets of inputs, of which a call reads so many bytes each, exceed ROTATED_BYTES; two on a CPU."""
    if device.type != "cuda":
        return 2
    return min(MOST_SETS, max(2, ROTATED_BYTES // max(1, read_bytes) + 1))


def measure(
    sets: Sequence[Any],
    run: Callable[[Any], Any],
    *,
    device: torch.device,
    prepare: Callable[[Any], Any] | None = None,
    seconds: float = 0.2,
) -> Timing:
    """Time run(prepared set), in turn over the sets, for about so many seconds; prepare's time does not count.

    Both run on one stream, so that autograd starts a captured backward pass where its forward pass ran.
    """
    if device.type != "cuda":
        return _by_clock([prepare(s) if prepare else s for s in sets], run, seconds)
    torch.cuda.synchronize(device)
    stream = _stream(device)
    with torch.cuda.stream(stream):
        prepared = [prepare(s) if prepare else s for s in sets]
        for one in prepared:
            run(one)
        estimate = _elapsed(stream, lambda: [run(one) for one in prepared], 2)[-1]
        passes = max(1, min(64, math.ceil(REPLAY_SECONDS / estimate)))
        try:
            graph = _captured(prepared, run, passes, stream)
        except RuntimeError as error:
            torch.cuda.synchronize(device)
            repeats = max(5, min(100, int(seconds / estimate)))
            samples = _elapsed(stream, lambda: [run(one) for one in prepared], repeats)
            return _per_call(samples, len(prepared), f"events: {str(error).splitlines()[0]}")
        warm = _elapsed(stream, graph.replay, 3)[-1]
        samples = _elapsed(stream, graph.replay, max(10, min(200, int(seconds / warm))))
        return _per_call(samples, len(prepared) * passes, "graph")


def _captured(prepared: Sequence[Any], run: Callable[[Any], Any], passes: int, stream: Any) -> Any:
    """A graph of that many passes over the sets. RuntimeError when something in run cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = [None] * len(prepared)
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(passes):
            for i, one in enumerate(prepared):
                kept[i] = run(one)
    return graph


def _elapsed(stream: Any, call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds on the device of every repeat."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record(stream)
        call()
        end.record(stream)
    stream.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


def _per_call(seconds: Sequence[float], calls: int, how: str) -> Timing:
    return summary([s / calls * 1e6 for s in seconds], how)


def _by_clock(prepared: Sequence[Any], run: Callable[[Any], Any], seconds: float) -> Timing:
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - begin < seconds and len(samples) < 200):
        one = prepared[len(samples) % len(prepared)]
        start = time.perf_counter()
        run(one)
        samples.append(time.perf_counter() - start)
    return _per_call(samples, 1, "clock")


@lru_cache
def _stream(device: torch.device) -> Any:
    # one for all measurements: freed memory can be used again on the stream that freed it only
    return torch.cuda.Stream(device)


def in_turn(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Call each once, in order, and give the seconds each took: a machine's slow moments then strike all alike."""
    seconds = {}
    for name, run in runs.items():
        begin = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - begin
    return seconds


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that run, which should have run before, takes above what is held already; None off a GPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    resting = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - resting
