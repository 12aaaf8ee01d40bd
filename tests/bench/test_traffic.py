"""What bench.traffic counts: against sums by hand, and against the same count around real steps of every side."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import kernels
from bench import bench_traffic
from bench.bench_traffic import Assumed, expected_flops, floor_seconds, markdown
from bench.compare import Work
from bench.shapes import Shape
from bench.steps import our_step, published_step, transformers_step
from bench.traffic import Call, Counter, CudaAutocast, count, fakes, kernel_work, measured
from kernels.launch import Launch
from videomae import masking
from videomae.blocks import set_recompute

# 2 x 3 x 3 cubes, 10 visible and 8 masked
SMALL = Shape("vit_tiny", clips=2, width=64, heads=4, decoder_width=64, frames=4, side=48, ratio=0.5)
CPU = torch.device("cpu")
BUILDS = {"ours": our_step, "transformers": transformers_step, "published": published_step}


def built(side: str, **others):
    if side == "transformers":
        pytest.importorskip("transformers")
    return partial(BUILDS[side], SMALL, CPU, **others)


def calls_of(run, *shapes, dtype=torch.float32, autocast=None):
    """The calls of run(*leaves of these shapes) and of its backward pass."""
    with fakes(), Counter() as counter:
        leaves = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        with CudaAutocast():
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                out = run(*leaves)
            out.backward(torch.empty_like(out))
    return counter.calls


def rows(calls, *names):
    return [(c.name, c.work.reads, c.work.writes, c.work.flops) for c in calls if c.name in names]


def test_a_linear_layer_is_three_products_and_a_sum():
    R, D, F = 6, 8, 10
    x, w, b, y = 4 * R * D, 4 * F * D, 4 * F, 4 * R * F
    product = 2 * R * D * F
    calls = calls_of(functional.linear, (R, D), (F, D), (F,))
    assert rows(calls, "addmm", "mm", "sum") == [
        ("addmm", x + w + b, y, product),
        ("mm", y + w, x, product),
        ("mm", y + x, w, product),
        ("sum", y, b, 0),
    ]
    assert [c.launches for c in calls] == [1] * len(calls)
    assert {c.name for c in calls} == {"addmm", "mm", "sum"}  # transposes and views are no calls


def test_an_expanded_dimension_is_read_once_and_a_view_for_what_it_has():
    calls = calls_of(lambda x, row: x[:, 1:3] + row.expand(6, 2), (6, 8), (1, 2))
    assert rows(calls, "add") == [("add", 4 * (12 + 2), 4 * 12, 0)]


def test_layer_norm_reads_and_writes_everything_once():
    R, D = 6, 8
    row, vector, statistics = 4 * R * D, 4 * D, 2 * 4 * R
    calls = calls_of(lambda x, w, b: functional.layer_norm(x, (D,), w, b), (R, D), (D,), (D,))
    assert rows(calls, "native_layer_norm", "native_layer_norm_backward") == [
        ("native_layer_norm", row + 2 * vector, row + statistics, 0),
        ("native_layer_norm_backward", 2 * row + statistics + 2 * vector, row + 2 * vector, 0),
    ]


def test_attention_is_one_op_and_keeps_the_sums():
    B, A, L, K, d = 2, 3, 5, 7, 16
    q, kv, sums = 4 * B * A * L * d, 4 * B * A * K * d, 4 * B * A * L
    product = 2 * B * A * L * K * d
    calls = calls_of(functional.scaled_dot_product_attention, (B, A, L, d), (B, A, K, d), (B, A, K, d))
    forward, backward = (c for c in calls if "attention" in c.name)
    assert (forward.work, forward.rate) == (Work(q + 2 * kv, q + sums, 2 * product), "attention")
    assert (backward.work, backward.rate) == (Work(3 * q + 2 * kv + sums, q + 2 * kv, 5 * product), "attention")
    assert (forward.backward, backward.backward) == (False, True)


@pytest.mark.parametrize("numbers", [fakes, nullcontext], ids=["fake", "real"])
def test_a_boolean_index_is_a_nonzero_and_a_gather_both_ways(numbers):
    B, N, D, picked = 2, 9, 4, 6
    index, taken = 8 * 2 * picked, 4 * picked * D
    with numbers(), Counter() as counter:
        x = torch.zeros(B, N, D, requires_grad=True)
        hidden = torch.zeros(B, N, dtype=torch.bool)
        hidden[:, 3:] = True
        counter.know(hidden, B * (N - 3))
        out = x[~hidden]
        assert out.shape == (picked, D)
        before = counter.live
        out.backward(torch.ones_like(out))
    assert rows(counter.calls, "nonzero", "index", "new_zeros", "index_put") == [
        ("nonzero", B * N, index, 0),
        ("index", taken + index, taken, 0),
        ("new_zeros", 0, 4 * B * N * D, 0),
        ("nonzero", B * N, index, 0),
        ("index_put", 2 * taken + index, taken, 0),
    ]
    assert counter.peak == before + taken + 4 * B * N * D  # written into the zeros


@pytest.mark.parametrize("scaled", [False, True])
def test_fused_adamw_reads_four_tensors_and_writes_three(scaled):
    with fakes(), Counter() as counter:
        weight = nn.Parameter(torch.empty(100, 7))
        optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
        for _ in range(2):
            counter.calls.clear()
            weight.grad = torch.empty_like(weight)
            if scaled:
                optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
            optimizer.step()
    (call,) = [c for c in counter.calls if c.name == "_fused_adamw_"]
    size, scalar = 4 * 700, 4
    # the step's number, and of a scaled one the scale and whether there was an inf
    assert call.work == Work(4 * size + scalar * (3 if scaled else 1), size * (4 if scaled else 3))


def test_a_copy_over_a_tensor_does_not_read_it_and_an_addition_to_it_does():
    calls = [c for c in calls_of(lambda x, y: torch.empty(8).copy_(x).add_(y), (8,), (8,)) if not c.backward]
    assert rows(calls, "copy_", "add_") == [("copy_", 32, 32, 0), ("add_", 64, 32, 0)]


def pixel_work():
    """Predictions, masks and clips of SMALL, in bytes."""
    masked = SMALL.clips * SMALL.num_masked
    return masked, masked * SMALL.cube_values


def test_pixel_loss_reads_the_masked_cubes_and_writes_the_gradient():
    masked, pixels = pixel_work()

    def run(pred):
        frames = torch.empty(2, 4, 48, 48, 3, dtype=torch.uint8)
        mask = masking.tube(SMALL.grid, SMALL.ratio, keys=torch.arange(2))
        return kernels.pixel_loss(pred, frames, mask.masked)

    calls = calls_of(run, (2, SMALL.num_masked, SMALL.cube_values), dtype=torch.bfloat16)
    sums = 4 * masked
    assert rows(calls, "videomae::pixel_loss", "videomae::pixel_loss_rescale") == [
        ("videomae::pixel_loss", sums, 4, 0),  # the sum over the cubes' losses
        ("videomae::pixel_loss", pixels + 2 * pixels + 8 * masked, 2 * pixels + sums, 0),
        ("videomae::pixel_loss_rescale", 4, 0, 0),
    ]


def test_cube_embed_reads_the_visible_cubes_in_both_directions():
    D, K, V = 64, SMALL.cube_values, SMALL.clips * SMALL.num_visible
    pixels, tokens, index, positions, weight = V * K, 4 * V * D, 8 * V, 4 * SMALL.num_cubes * D, 4 * D * K

    def run(weight, bias):
        frames = torch.empty(2, 4, 48, 48, 3, dtype=torch.uint8)
        mask = masking.tube(SMALL.grid, SMALL.ratio, keys=torch.arange(2))
        return kernels.cube_embed(frames, weight, bias, torch.empty(SMALL.num_cubes, D), mask.visible)

    forward, backward = rows(
        calls_of(run, (D, 3, 2, 16, 16), (D,)), "videomae::cube_embed", "videomae::cube_embed_backward"
    )
    fold = weight + 4 * D + 4 * 6  # weight, bias and the normalisation in; folded weight and bias out
    assert forward[1] == fold + pixels + index + weight + 4 * D + positions
    assert forward[2] == weight + 4 * D + tokens
    # the sums of every part of the rows are written, read, and written as the gradient: one part here
    assert backward[1] == pixels + index + tokens + (weight + 4 * D + 4 * 6)
    assert backward[2] == 2 * (weight + 4 * D)
    assert forward[3] == backward[3] == 2 * V * K * D


def test_bias_gelu_and_layer_norm_add_their_sums_over_the_programs():
    R, D, half = 40, 64, 2
    row = half * R * D
    calls = calls_of(kernels.bias_gelu, (R, D), (D,), dtype=torch.bfloat16)
    part = 4 * (R // 4) * D  # a program for every 4 rows, up to 528
    name = "videomae::bias_gelu"
    assert rows(calls, name) == [(name, row + half * D, row, 0)]
    assert rows(calls, name + "_backward") == [
        (name + "_backward", part, 4 * D, 0),
        (name + "_backward", 4 * D, half * D, 0),
        (name + "_backward", 2 * row + half * D, row + part, 0),
    ]

    def added(x, residual, weight, bias, x_bias):
        return kernels.layer_norm(x, residual, weight, bias, x_bias=x_bias)[0]

    calls = calls_of(added, (R, D), (R, D), (D,), (D,), (D,), dtype=torch.bfloat16)
    name = "videomae::layer_norm"
    assert rows(calls, name) == [(name, 2 * row + 3 * half * D, 2 * row + 8 * R, 0)]
    assert rows(calls, name + "_backward")[-1] == (name + "_backward", 2 * row + half * D + 8 * R, row + 3 * part, 0)


def test_decoder_input_writes_the_sequence_and_sums_it_back():
    B, V, M, E = 2, 10, 8, 32
    visible, masked, table = 4 * B * V * E, 4 * B * M * E, 4 * (V + M) * E

    def run(tokens, token):
        mask = masking.tube(SMALL.grid, SMALL.ratio, keys=torch.arange(B))
        return kernels.decoder_input(tokens, token, torch.empty(V + M, E), mask.visible, mask.masked)

    calls = calls_of(run, (B, V, E), (E,))
    name = "videomae::decoder_input"
    assert rows(calls, name) == [(name, visible + 4 * E + table + 8 * B * (V + M), visible + masked, 0)]
    part = 4 * 2 * E  # a program for every clip's 8 masked tokens
    assert rows(calls, name + "_backward")[-1] == (name + "_backward", visible + masked, visible + part, 0)


def test_split_heads_joins_gradients_as_it_sums_them():
    B, L, A, d = 2, 10, 3, 16
    row = 4 * B * L * A * d

    def run(qkv, bias):
        q, k, v = kernels.split_heads(qkv, bias)
        return q + k + v

    calls = calls_of(run, (B, L, 3, A, d), (3 * A * d,))
    name = "videomae::join_heads"
    part = 4 * (B * L // 4) * 3 * A * d  # a program for every 4 tokens
    assert rows(calls, name)[-1] == (name, 3 * row, 3 * row + part, 0)
    assert not rows(calls, "cat", "stack", "sum")


def test_our_attention_writes_packed_gradients():
    B, V, A, d = 2, 10, 3, 16
    token, sums, product = 4 * B * V * A * d, 4 * B * A * V, 2 * B * A * V * V * d
    calls = [c for c in calls_of(kernels.attention, (B, V, 3, A, d)) if "attention" in c.name]
    assert [(c.name, c.work, c.rate, c.launches) for c in calls] == [
        ("videomae::attention", Work(3 * token, token + sums, 2 * product), "attention", 1),
        ("videomae::attention_backward", Work(5 * token + sums, 3 * token, 5 * product), "attention", 1),
    ]


def test_a_kernel_or_argument_without_a_rule_is_an_error():
    def _mystery_kernel(x): ...

    def start(fn, **arguments):
        return Launch(SimpleNamespace(fn=fn, arg_names=list(arguments)), (1,), tuple(arguments.values()), {})

    with pytest.raises(ValueError, match=r"no rule for what kernel test_traffic\._mystery_kernel does with \['x'\]"):
        kernel_work(start(_mystery_kernel, x=torch.empty(3)))
    known = start(sys.modules["kernels.bias_gelu"]._forward_kernel.fn, x=None, b=None, y=None, z=torch.empty(3))
    with pytest.raises(ValueError, match=r"no rule for what kernel bias_gelu\._forward_kernel does with \['z'\]"):
        kernel_work(known)


def test_autocast_keeps_a_weights_copy_and_casts_the_rest_every_time():
    def run(x, w):
        return functional.linear(functional.linear(x, w), w)

    calls = calls_of(run, (6, 8), (8, 8), autocast=torch.bfloat16)
    forward = [c for c in calls if not c.backward]
    assert [(c.name, c.work.reads, c.work.writes) for c in forward] == [
        ("_to_copy", 4 * 48, 2 * 48),
        ("_to_copy", 4 * 64, 2 * 64),
        ("mm", 2 * (48 + 64), 2 * 48),
        ("mm", 2 * (48 + 64), 2 * 48),
    ]
    # both gradients of the copy are added up and cast back together
    back = [(c.name, c.work.reads, c.work.writes) for c in calls if c.backward and c.name in ("add", "_to_copy")]
    assert sorted(back) == [("_to_copy", 2 * 48, 4 * 48), ("_to_copy", 2 * 64, 4 * 64), ("add", 2 * 128, 2 * 64)]


def test_autocast_has_cudas_lists():
    seen = {}

    def run(x):
        half = x @ x
        seen["matmul"] = half.dtype
        seen["layer_norm"] = functional.layer_norm(half, (8,)).dtype
        seen["softmax"] = half.softmax(-1).dtype
        seen["pow"] = (half**2).dtype
        seen["sum"] = half.sum().dtype
        seen["gelu"] = functional.gelu(half).dtype
        seen["cat"] = torch.cat((half, x)).dtype
        seen["cat of halves"] = torch.cat((half, half)).dtype
        seen["conv3d"] = functional.conv3d(x.view(1, 1, 2, 4, 8), x.new_empty(1, 1, 1, 1, 1)).dtype
        return functional.mse_loss(half, half.detach())

    calls_of(run, (8, 8), autocast=torch.float16)
    assert {name for name, dtype in seen.items() if dtype == torch.float16} == {
        "matmul", "gelu", "cat of halves", "conv3d",
    }  # fmt: skip
    assert {dtype for dtype in seen.values() if dtype != torch.float16} == {torch.float32}


def test_float16_softmax_needs_no_cast_before_it_and_bfloat16_does():
    def casts(dtype):
        calls = calls_of(lambda x: (x @ x).softmax(-1), (8, 8), autocast=dtype)
        return [c.name for c in calls if not c.backward].count("_to_copy")

    assert (casts(torch.float16), casts(torch.bfloat16)) == (1, 2)


def test_the_peak_is_the_largest_sum_of_what_lives():
    with fakes(), Counter() as counter:
        x = torch.empty(1000)
        before = counter.live
        y = x + 1
        z = y * 2
        del y
        w = z * 2
        assert counter.live - before == 8000
        assert counter.peak == 4000 * 3
        del z, w
        assert counter.live == before == 4000


@pytest.mark.parametrize("side", BUILDS)
def test_fake_and_real_steps_count_the_same(side):
    """Every op with its bytes, part and direction, peak memory, and what rests: without kernels and autocast, which a
    CPU does not have."""
    build = built(side)
    fake = count(build, with_kernels=False)
    with Counter() as counter:
        real = measured(build(), counter)
    assert len(fake.calls) > 150
    for got, wanted in zip(fake.calls, real.calls, strict=True):
        assert got == wanted
    # of the squared errors PyTorch's mse_loss keeps the memory, not only their mean
    kept = 0 if side == "ours" else 4 * SMALL.clips * SMALL.num_masked * SMALL.cube_values - 4
    assert (fake.resting_bytes, fake.peak_bytes) == (real.resting_bytes, real.peak_bytes - kept)


@pytest.mark.long
def test_kernels_that_run_count_as_those_that_do_not(bare_kernel_device):
    """Ours on real tensors in float32, its kernels in Triton's interpreter."""
    if bare_kernel_device != "cpu":
        pytest.skip("bench/bench_traffic.py does this on a GPU")
    tiny = replace(SMALL, clips=1, frames=2, side=32)
    fake = count(partial(our_step, tiny, CPU))
    step = our_step(tiny, CPU)
    with Counter() as counter:
        real = measured(step, counter)
    assert real.calls == fake.calls
    assert real.peak_bytes == pytest.approx(fake.peak_bytes, rel=1e-3)


@pytest.mark.parametrize("side", BUILDS)
def test_the_parts_are_found_and_operations_are_those_of_the_formula(side):
    autocast = torch.float16 if side == "published" else torch.bfloat16
    traffic = count(built(side, autocast=autocast))
    parts = traffic.by(lambda c: c.part)
    assert parts.keys() == {"batch", "embedding", "encoder", "decoder", "loss", "optimiser"}
    assert sum(part.bytes for part in parts.values()) == traffic.total.bytes
    directions = {key for key in traffic.by(lambda c: (c.part, c.backward)) if key[1]}
    assert directions == {(part, True) for part in ("embedding", "encoder", "decoder", "loss")}
    forward, step = expected_flops(SMALL, side, decoder_depth=2)
    assert traffic.total.flops / SMALL.clips == pytest.approx(step, rel=1e-3)
    assert sum(c.work.flops for c in traffic.calls if not c.backward) / SMALL.clips == pytest.approx(forward, rel=1e-3)
    size = SMALL.clips * 4 * 48 * 48 * 3
    arrived = size + SMALL.clips * 8 if side == "ours" else 4 * size + SMALL.clips * SMALL.num_cubes
    assert traffic.calls[0] == Call("batch", "batch", False, Work(0, arrived), 2, "memory")


def test_ours_runs_its_kernels_and_recomputation_moves_more():
    def with_recompute():
        step = built("ours", autocast=torch.bfloat16)()
        set_recompute(step.model, "block")
        return step

    plain, again = count(built("ours", autocast=torch.bfloat16)), count(with_recompute)
    names = {c.name for c in plain.calls if c.name.startswith("videomae::")}
    ops = ("cube_embed", "decoder_input", "layer_norm", "bias_gelu")
    assert names >= {f"videomae::{op}{way}" for op in ops for way in ("", "_backward")}
    assert again.total.bytes > plain.total.bytes
    # what is computed anew belongs to the part that needs it
    assert again.by(lambda c: c.part)["encoder"].bytes > plain.by(lambda c: c.part)["encoder"].bytes


def test_no_fake_tensor_stays_behind():
    count(built("ours", autocast=torch.bfloat16))
    loss = our_step(SMALL, CPU).run()
    assert type(loss) is torch.Tensor
    assert loss.isfinite()


def test_a_floor_is_the_longer_of_bytes_and_operations_of_every_op():
    def call(reads, flops, rate):
        return Call("", "", False, Work(reads, 0, flops), 1, rate)

    calls = [call(4300, 0, "memory"), call(4300, 7900, "matmul"), call(43, 790_000, "matmul")]
    calls.append(call(0, 4_000, "attention"))
    assert floor_seconds(calls, Assumed()) == pytest.approx(1e-9 + 1e-9 + 1e-9 + 1e-11)


def test_the_page_is_what_the_numbers_say():
    raw = json.loads((bench_traffic.RESULTS / "traffic.json").read_text())
    assert (bench_traffic.RESULTS / "traffic.md").read_text() == markdown(raw)


@pytest.mark.long
def test_the_numbers_are_those_of_this_tree():
    """`pytest bench/bench_traffic.py --benchmark-only` writes them anew."""
    pytest.importorskip("transformers")
    raw = json.loads((bench_traffic.RESULTS / "traffic.json").read_text())
    assert raw == bench_traffic.record(bench_traffic.counted(), Assumed())
