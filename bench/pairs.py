"""What the benches of single ops share as tests: on a CPU the reference beside `transformers`, in turn; on a GPU a
table of every contender."""

import os
import statistics
from functools import partial
from typing import Any

import pytest
import torch

from bench.compare import Contender, Contest, Inputs, Result, Setting, answers, checked, part_of, results
from bench.timing import in_turn

ROUNDS, WARM = 11, 3
SIZES = ("vit_base", "vit_large")

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the kernels are measured instead")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def beside_transformers(benchmark: Any, capsys: Any, contest: Contest, theirs: Contender, inputs: Inputs) -> None:
    """Forward and backward of "ours" and of theirs over the same inputs: the same values, then medians in turn."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ours = contest.contenders["ours"]
    error = checked(answers(ours, inputs, torch.float32), answers(theirs, inputs, torch.float32), 1e-4)
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    runs = {}
    for name, contender in zip(times, (ours, theirs), strict=True):
        prepare, run = part_of("forward+backward", contender, torch.float32)
        runs[name] = partial(run, prepare(inputs))

    def both_in_turn() -> None:
        for name, seconds in in_turn(runs).items():
            times[name].append(seconds)

    benchmark.pedantic(both_in_turn, rounds=ROUNDS, warmup_rounds=WARM)
    taken = {name: samples[WARM:] for name, samples in times.items()}
    ratios = [b / a for a, b in zip(*taken.values(), strict=True)]
    medians = {name: statistics.median(samples) for name, samples in taken.items()}
    ratio = statistics.median(ratios)
    benchmark.extra_info.update(ratio=ratio, error=error, threads=torch.get_num_threads(), **medians)
    with capsys.disabled():
        print(
            f"\n{contest.op}, {contest.size}, {contest.shape}, float32, {torch.get_num_threads()} threads, forward and "
            f"backward: ours {medians['ours'] * 1e3:.1f} ms, transformers {medians['transformers'] * 1e3:.1f} ms; "
            f"median ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {ROUNDS} rounds)"
        )


def beside_each_other(benchmark: Any, capsys: Any, contests: list[Contest]) -> None:
    """Every contender of these contests on the GPU; fails when ours does, or when its values differ."""
    found: list[Result] = []
    benchmark.pedantic(lambda: found.extend(r for c in contests for r in results(c, Setting.gpu())), rounds=1)
    with capsys.disabled():
        print()
        for r in found:
            us = f"{r.timing.median:10.1f} us ({r.timing.low:.1f} to {r.timing.high:.1f})" if r.timing else r.failure
            print(f"{r.op} {r.size} {r.shape} {r.part:<16} {r.contender:<10} {us}")
    key = "{0.shape} {0.part} {0.contender}"
    benchmark.extra_info.update({key.format(r): r.timing.median for r in found if r.timing})
    assert [r.failure for r in found if r.contender == "ours" and r.failure] == []
