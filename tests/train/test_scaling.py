"""What a step takes on so many GPUs: against what was counted and measured, and arithmetic of its own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from train.memory import Workload
from train.scaling import (
    DECODED,
    GPUS,
    VIDEO_BYTES,
    Cluster,
    Operations,
    Rate,
    _starts,
    clips_of_core,
    exchange,
    operations,
    predict,
    ring,
)
from videomae.blocks import RECOMPUTE
from videomae.masking import counts
from videomae.model import SIZES, Input

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
COUNTS = counts("tube", (8, 14, 14), 0.9)
BASE = Workload(SIZES["vit_base"], Input(), COUNTS, 4, 94_210_944)
LARGE = Workload(SIZES["vit_large"], Input(), COUNTS, 12, 342_996_992)
H200 = GPUS["h200"]


@pytest.mark.parametrize(("name", "work"), [("vit_base", BASE), ("vit_large", LARGE)])
def test_counts_the_operations_and_kernels_of_the_results(name, work):
    counted = json.loads((RESULTS / "traffic.json").read_text())["sizes"][name]["ours"]
    assert operations(work).total / 1e9 == pytest.approx(counted["all"]["gigaflops_per_clip"], rel=1e-4)
    assert _starts(work) == counted["launches"]


@pytest.mark.long
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_counts_the_operations_and_kernels_that_a_step_is_seen_to_do(recompute):
    import torch

    from bench.shapes import Shape
    from bench.steps import our_step
    from bench.traffic import count

    shape = Shape("vit_tiny", 2, 64, 4, 64)
    seen = count(lambda: our_step(shape, torch.device("cpu"), torch.bfloat16, recompute=recompute)).total
    work = Workload(SIZES["vit_tiny"], Input(), COUNTS, 2, 0, recompute=recompute)
    assert 2 * operations(work).total == pytest.approx(seen.flops, rel=1e-4)
    assert _starts(work) == pytest.approx(seen.launches, abs=2)


def test_counts_a_classifier_whose_cubes_are_all_visible():
    cubes, width, depth = 1568, 768, 12
    work = Workload(SIZES["vit_base"], Input(), COUNTS._replace(visible=cubes, masked=0, decoded=0, predicted=0), 0, 0)
    products, attended = depth * 12 * cubes * width**2, depth * 2 * cubes**2 * width
    found = operations(work)
    assert found.forward == 2 * (1536 * cubes * width + products + attended)
    assert found.backward == 2 * (1536 * cubes * width + 2 * products) + 5 * attended
    assert Operations(1.0, 2.0, 1.0).backward_share == 0.75


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_ring_sends_what_one_that_is_played_sends(gpus):
    # chunk c of process p is p + 10 c; each hands one chunk to the next in every round
    held = [[p + 10 * c for c in range(gpus)] for p in range(gpus)]
    sent = [0] * gpus
    for adds, rounds in ((True, range(gpus - 1)), (False, range(gpus - 1))):
        for turn in rounds:
            chunks = [(p - turn + (not adds)) % gpus for p in range(gpus)]
            moving = [held[p][chunks[p]] for p in range(gpus)]
            for p in range(gpus):
                to = (p + 1) % gpus
                held[to][chunks[p]] = moving[p] + (held[to][chunks[p]] if adds else 0)
                sent[p] += 1
    assert all(row == [sum(range(gpus)) + 10 * c * gpus for c in range(gpus)] for row in held)
    assert sent == [2 * ring(gpus, gpus)] * gpus


def told(gpus, parallel="ddp", accumulation=1, forward=0.0, backward=0.0, work=BASE, **cluster):
    return exchange(
        Cluster(H200, gpus, **cluster), parallel, work, forward=forward, backward=backward, accumulation=accumulation
    )


def test_the_slowest_link_sets_the_pace():
    gradients = 4 * 94_210_944
    assert told(8).seconds == pytest.approx(2 * 7 / 8 * gradients / 450e9)
    assert told(16).seconds == pytest.approx(2 * 15 / 16 * gradients / 50e9)
    assert told(16, network=1e12).seconds == pytest.approx(2 * 15 / 16 * gradients / 450e9)
    assert told(1).seconds == told(1).waited == 0
    assert told(1024).sent < 2 * gradients


def test_a_backward_pass_hides_an_all_reduce_but_for_its_end():
    whole = told(16).seconds
    assert told(16).waited == whole
    assert told(16, backward=0.4 * whole).waited == pytest.approx(0.6 * whole)
    end = told(16, backward=2 * whole)
    assert end.waited == pytest.approx(whole * 25 * 2**20 / (4 * 94_210_944))
    assert end.hidden + end.waited == pytest.approx(whole)
    small = replace(BASE, num_parameters=1000)
    assert told(16, work=small, backward=1.0).waited == told(16, work=small).seconds


def test_fsdp_gathers_in_every_pass_and_scatters_once():
    once = 15 / 16 * 4 * 94_210_944
    one, three = told(16, "fsdp"), told(16, "fsdp", 3)
    assert (one.sent, three.sent) == pytest.approx((3 * once, 7 * once))
    assert one.sent == pytest.approx(1.5 * told(16).sent)
    assert (one.waited, three.waited) == pytest.approx((one.seconds, three.seconds))
    half = told(16, "fsdp", 3, forward=0.5 * once / 50e9, backward=0.5 * once / 50e9)
    assert half.waited == pytest.approx((3 * 0.5 + 2 * 0.5 + 1.5) * once / 50e9)
    # sixteen blocks: a first gather in every pass, and a last scatter
    hidden = told(16, "fsdp", 3, forward=1.0, backward=1.0)
    assert hidden.waited == pytest.approx(7 * once / 50e9 / 16)


def test_decoding_costs_what_was_measured():
    measured = json.loads((RESULTS / "loader.json").read_text())["one core"]
    for row in measured:
        assert DECODED[row["set"]][row["views"]] == pytest.approx(row["clips_per_second"], rel=1e-3)
        assert VIDEO_BYTES[row["set"]] == pytest.approx(row["bytes_per_video"], rel=1e-3)
    for files in DECODED:
        per_video = [views / clips_of_core(files, views) for views in (1, 3, 4, 8)]
        # each view adds as much time
        slope = (per_video[2] - per_video[0]) / 3
        assert per_video[1] == pytest.approx(per_video[2] - slope)
        assert per_video[3] == pytest.approx(per_video[2] + 4 * slope)


def test_a_step_is_as_long_as_its_parts():
    step = predict(Cluster(H200, 1), BASE, Rate(0.5), micro_batch=100, accumulation=2)
    clip = operations(BASE).total / (0.5 * 989.4e12)
    assert step.arithmetic == pytest.approx(200 * clip)
    assert step.update == pytest.approx(32 * 94_210_944 / (0.9 * 4.8e12))
    assert step.starts == step.data == step.exchange.seconds == 0
    assert step.seconds == pytest.approx(step.arithmetic + step.update)
    assert step.clips_per_second == pytest.approx(200 / step.seconds)


def test_a_measured_rate_replaces_the_estimated_one():
    step = predict(Cluster(H200, 1), BASE, Rate(clips_per_second=1000), micro_batch=100, accumulation=2)
    assert step.arithmetic == pytest.approx(0.2)


def test_a_small_micro_batch_waits_for_python():
    step = predict(Cluster(H200, 1), BASE, Rate(), micro_batch=1, accumulation=4)
    assert step.arithmetic + step.starts == pytest.approx(4 * 721 * 5e-6)
    assert step.breaks[0] == "kernel starts"
    assert predict(Cluster(H200, 1), BASE, Rate(), micro_batch=1, accumulation=4, eager=False).starts == 0


@pytest.mark.parametrize("gpus", [4, 8, 64])
def test_cores_that_are_too_few_set_the_rate(gpus):
    cluster = Cluster(H200, gpus, cores=32)
    step = predict(cluster, BASE, Rate(), micro_batch=32, accumulation=1, core_clips=10.0)
    # one for every process
    decoding = (32 - min(gpus, 8)) * cluster.machines
    assert step.clips_per_second == pytest.approx(decoding * 10)
    assert step.breaks == ("decoding", pytest.approx(step.data / step.seconds))
    assert predict(Cluster(H200, gpus), BASE, Rate(), micro_batch=32, accumulation=1, core_clips=10.0).data == 0


def test_fsdp_updates_a_share_of_the_weights():
    steps = [
        predict(Cluster(H200, 16), BASE, Rate(), micro_batch=8, accumulation=1, parallel=parallel)
        for parallel in ("ddp", "fsdp")
    ]
    assert steps[0].update == pytest.approx(16 * steps[1].update)


def test_more_gpus_are_never_slower_with_the_same_clips_on_each():
    rates = [
        predict(Cluster(H200, n), BASE, Rate(), micro_batch=64, accumulation=1).clips_per_second
        for n in (1, 8, 64, 1024, 4096)
    ]
    assert rates == sorted(rates)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cluster(H200, 0), "--gpus must be at least 1"),
        (lambda: Cluster(H200, 8, network=0), "--network must be positive"),
        (lambda: Cluster(H200, 8, network=float("nan")), "--network must be positive"),
        (lambda: Cluster(H200, 8, cores=0), "--cores must be at least 1"),
        (lambda: Rate(1.5), "--mfu must be above 0 and at most 1; got 1.5"),
        (lambda: Rate(float("nan")), "--mfu"),
        (lambda: Rate(clips_per_second=-1), "--clips-per-second must be positive"),
    ],
)
def test_refuses_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.long
def test_needs_no_processes():
    code = "import sys, train.scaling; print('torch.distributed.checkpoint' in sys.modules, 'tyro' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
