"""What a training step of ViT-B and ViT-L moves, computes and keeps, beside `transformers` and the published way, and
the time that this takes at least on a GPU: counted on fake tensors, no GPU needed (the rules: bench/traffic.py).

    pytest bench/bench_traffic.py --benchmark-only

writes results/traffic.json, traffic.md and traffic_step.png. The batch is 64 clips of 16 x 224 x 224, 90 % tube mask.
`transformers` and `published` begin with the float video on the device: making it on the CPU is not counted, only its
arrival (9.6 MB a clip, where ours is 2.4) and every later reading of it.

A floor: for every op the longer of its bytes at the copy bandwidth and its operations at the rate of matrix products,
or of attention, summed up. Nothing is measured here.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.pairs import on_gpu
from bench.report import table
from bench.shapes import GPU_CLIPS, Shape, shape_of
from bench.steps import DECODER_DEPTHS, Step, our_step, published_step, transformers_step
from bench.traffic import Call, Counter, Traffic, count, measured
from videomae.blocks import set_attention
from videomae.model import SIZES

RESULTS = Path(__file__).with_name("results")
CLIPS = GPU_CLIPS
MODELS = {"vit_base": "ViT-B", "vit_large": "ViT-L"}
SIDES: dict[str, Callable[[Shape, torch.device], Step]] = {
    "ours": partial(our_step, autocast=torch.bfloat16),
    "transformers": partial(transformers_step, autocast=torch.bfloat16),
    "transformers, bfloat16 weights": partial(transformers_step, pure=torch.bfloat16),
    "published": partial(published_step, autocast=torch.float16),
}
HOW = {
    "ours": "autocast bfloat16, every kernel started from Python",
    "transformers": "VideoMAEForPreTraining, scaled_dot_product_attention, autocast bfloat16",
    "transformers, bfloat16 weights": "the same without autocast: weights, video and optimiser state in bfloat16",
    "published": "the official way over our weights, autocast float16 (bench/published.py)",
}
PARTS = ("decoder", "encoder", "loss", "embedding", "optimiser", "batch")
MEGA, GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Assumed:
    """Ceilings of an H200 as others state them, until bench.report.Ceilings has measured ones: bytes a second, read
    plus written, of a large copy; operations a second of a large bfloat16 matrix product."""

    copy: float = 4.3e12
    matmul: float = 790e12


# operations a second of attention with heads 64 wide and 1568 keys, in the best public kernels (300 to 450)
ATTENTION_RATE = 400e12


def floor_seconds(calls: Iterable[Call], ceilings: Any, attention: float = ATTENTION_RATE) -> float:
    """What the calls take at least. ceilings: Assumed or bench.report.Ceilings."""
    rates = {"matmul": ceilings.matmul, "attention": attention, "memory": ceilings.matmul}
    return sum(max(c.bytes / ceilings.copy, c.work.flops / rates[c.rate]) for c in calls)


def expected_flops(shape: Shape, side: str, decoder_depth: int) -> tuple[int, int]:
    """Operations a clip, forward and in the whole step, by the formula of DESIGN section 8 and what each side saves.

    Backward takes twice as much, but the embedding once (pixels need no gradient), and fused attention 5 products for
    2 forward: it computes the scores again. Ours embeds visible cubes only, and its last decoder layer has queries
    attend, project and pass the MLP for masked tokens only.
    """
    size, N, V, M, K = SIZES[shape.size], shape.num_cubes, shape.num_visible, shape.num_masked, shape.cube_values
    D, E = size.width, size.decoder_width
    embed = (V if side == "ours" else N) * K * D
    linear = size.depth * 12 * V * D**2 + V * D * E + decoder_depth * 12 * N * E**2 + M * E * K
    attention = size.depth * 2 * V**2 * D + decoder_depth * 2 * N**2 * E
    if side == "ours":
        linear -= 9 * V * E**2
        attention -= 2 * V * N * E
    backward = 2.0 if side == "published" else 2.5
    return 2 * (embed + linear + attention), int(2 * (2 * embed + 3 * linear + (1 + backward) * attention))


def summary(traffic: Traffic, clips: int, ceilings: Any) -> dict[str, Any]:
    """One side for the json file: totals of the step, by part, and by op, the most bytes first."""
    calls, total = traffic.calls, traffic.total
    floor = floor_seconds(calls, ceilings) / clips

    def row(chosen: list[Call]) -> dict[str, Any]:
        return {
            "megabytes_per_clip": round(sum(c.bytes for c in chosen) / clips / MEGA, 3),
            "gigaflops_per_clip": round(sum(c.work.flops for c in chosen) / clips / GIGA, 3),
            "launches": sum(c.launches for c in chosen),
            "floor_us_per_clip": round(floor_seconds(chosen, ceilings) / clips * 1e6, 2),
        }

    groups: dict[str, list[Call]] = {}
    for c in calls:
        groups.setdefault(c.name + (", backward" if c.backward else ""), []).append(c)
    ops = {name: row(chosen) for name, chosen in groups.items()}
    return {
        "bytes_per_step": total.bytes,
        "flops_per_step": total.flops,
        "launches": total.launches,
        "peak_bytes": traffic.peak_bytes,
        "resting_bytes": traffic.resting_bytes,
        "floor_clips_per_second": round(1 / floor),
        "all": row(list(calls)),
        "parts": {part: row([c for c in calls if c.part == part]) for part in PARTS},
        "ops": dict(sorted(ops.items(), key=lambda item: -item[1]["megabytes_per_clip"])),
    }


def record(found: dict[str, dict[str, Traffic]], ceilings: Any, clips: int = CLIPS) -> dict[str, Any]:
    """What goes into traffic.json."""
    rates = {"copy": ceilings.copy, "matmul": ceilings.matmul, "attention": ATTENTION_RATE}
    sizes = {s: {side: summary(t, clips, ceilings) for side, t in sides.items()} for s, sides in found.items()}
    return {"clips": clips, "per_second": rates, "sizes": sizes}


def markdown(raw: dict[str, Any]) -> str:
    """traffic.md."""
    copy, matmul, attention = (raw["per_second"][name] / 1e12 for name in ("copy", "matmul", "attention"))
    intro = f"""# What a training step moves and computes

Written by `pytest bench/bench_traffic.py --benchmark-only`. Counted op by op on fake tensors, not measured; the rules
are in `bench/traffic.py`. Forward, loss, backward and optimiser of {raw["clips"]} clips of 16 x 224 x 224, 90 % tube
mask; figures are per clip where nothing else is said.

![least time of a step by part](traffic_step.png)

HOW

Floor: for every op the longer of its bytes and its operations, summed up, at assumed ceilings of an H200:
{copy:.1f} TB/s, read plus written, {matmul:.0f} TFLOP/s in matrix products, {attention:.0f} TFLOP/s in fused attention.
Starting kernels costs nothing in it. Peak memory includes what rests: weights, optimiser state and batch; both, and
kernel starts, are of the whole step."""
    lines = intro.replace("HOW", "\n".join(f"- {side}: {how}." for side, how in HOW.items())).split("\n")
    for size, sides in raw["sizes"].items():
        depth = DECODER_DEPTHS[size]
        lines += ["", f"## {MODELS[size]}, decoder depth {depth}", "", *_side_table(sides)]
        lines += ["", "Floor by part, microseconds a clip (megabytes a clip):", "", *_part_table(sides)]
        lines += ["", "Ours, by op:", "", *_op_table(sides["ours"])]
    return "\n".join(lines) + "\n"


def _side_table(sides: dict[str, Any]) -> list[str]:
    head = "side|GB|times ours|GFLOP|kernel starts|peak GB|resting GB|floor ms|floor clips/s"
    rows = []
    for side, s in sides.items():
        times = s["bytes_per_step"] / sides["ours"]["bytes_per_step"]
        moved, flops = s["all"]["megabytes_per_clip"] / 1e3, s["all"]["gigaflops_per_clip"]
        memory = (f"{s[key] / GIGA:.2f}" for key in ("peak_bytes", "resting_bytes"))
        floor = f"{s['all']['floor_us_per_clip'] / 1e3:.3f}"
        row = (side, f"{moved:.2f}", f"{times:.2f}", f"{flops:.1f}", s["launches"], *memory, floor)
        rows.append((*row, s["floor_clips_per_second"]))
    return table(head, rows, " " + "r" * 8)


def _part_table(sides: dict[str, Any]) -> list[str]:
    def cell(row: dict[str, Any]) -> str:
        return f"{row['floor_us_per_clip']:.1f} ({row['megabytes_per_clip']:.1f})"

    rows = [(side, *(cell(s["parts"][p]) for p in PARTS), cell(s["all"])) for side, s in sides.items()]
    return table("side|" + "|".join(PARTS) + "|all", rows, " " + "r" * 7)


def _op_table(side: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in list(side["ops"].items())[:20]:
        share = row["megabytes_per_clip"] / side["all"]["megabytes_per_clip"]
        values = (f"{row['megabytes_per_clip']:.1f}", f"{share:.0%}", f"{row['gigaflops_per_clip']:.1f}")
        rows.append((f"`{name}`", *values, row["launches"], f"{row['floor_us_per_clip']:.1f}"))
    return table("op|MB|share|GFLOP|starts|floor us", rows, " " + "r" * 5)


def plot(raw: dict[str, Any], path: Path) -> None:
    """Stacked bars: the floor of a clip by part, a panel for every model, a bar for every side."""
    import matplotlib.pyplot as plt

    colours = dict(zip(PARTS, ("#1f5fa8", "#6aa6de", "#e08a2c", "#7cb36a", "#8c7fb8", "#b0b0b0"), strict=True))
    figure, axes = plt.subplots(len(raw["sizes"]), 1, figsize=(9, 2.6 * len(raw["sizes"]) + 0.8), squeeze=False)
    for axis, (size, sides) in zip(axes[:, 0], raw["sizes"].items(), strict=True):
        names = [side.replace(", ", ",\n") for side in sides]
        left = [0.0] * len(sides)
        for part in PARTS:
            wide = [s["parts"][part]["floor_us_per_clip"] / 1e3 for s in sides.values()]
            axis.barh(names, wide, left=left, color=colours[part], label=part, height=0.68)
            left = [a + b for a, b in zip(left, wide, strict=True)]
        for i, (s, end) in enumerate(zip(sides.values(), left, strict=True)):
            text = f"  {s['floor_clips_per_second']:,} clips/s\n  {s['all']['megabytes_per_clip'] / 1e3:.1f} GB a clip"
            axis.text(end, i, text, va="center", fontsize=8.5)
        axis.invert_yaxis()
        axis.set_xlim(0, max(left) * 1.17)
        axis.set_title(MODELS[size], loc="left", fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("least time of a training step, ms a clip, at an H200's assumed ceilings")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(PARTS), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.955))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def counted(clips: int = CLIPS) -> dict[str, dict[str, Traffic]]:
    """Every side of every model."""
    device = torch.device("cpu")
    shapes = {size: shape_of(size, clips) for size in MODELS}
    return {
        size: {side: count(partial(build, shape, device)) for side, build in SIDES.items()}
        for size, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Traffic]]:
    pytest.importorskip("transformers")
    return counted()


@pytest.mark.benchmark(group="traffic")
def test_the_report_is_written(benchmark, found):
    raw = benchmark.pedantic(record, (found, Assumed()), rounds=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "traffic.json").write_text(json.dumps(raw, indent=1) + "\n")
    (RESULTS / "traffic.md").write_text(markdown(raw))
    plot(raw, RESULTS / "traffic_step.png")


@pytest.mark.benchmark(group="traffic")
@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize("side", SIDES)
def test_operations_are_those_of_the_formula(benchmark, found, size, side):
    calls, shape = found[size][side].calls, shape_of(size, CLIPS)
    forward, step = expected_flops(shape, side, DECODER_DEPTHS[size])
    total = benchmark.pedantic(lambda: sum(c.work.flops for c in calls), rounds=1) / CLIPS
    assert sum(c.work.flops for c in calls if not c.backward) / CLIPS == pytest.approx(forward, rel=0.02)
    assert total == pytest.approx(step, rel=0.02)
    known = {("vit_base", "ours"): 33.8 - 0.43, ("vit_base", "transformers"): 35.4, ("vit_large", "ours"): 140.0}
    if (size, side) in known:
        assert forward / 2e9 == pytest.approx(known[size, side], rel=0.02)


@pytest.mark.benchmark(group="traffic")
@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize(("rival", "most"), [("transformers", 0.6), ("published", 0.35)])
def test_ours_moves_fewer_bytes(benchmark, capsys, found, size, rival, most):
    ours, theirs = (found[size][side].total.bytes / CLIPS for side in ("ours", rival))
    ratio = benchmark.pedantic(lambda: ours / theirs, rounds=1)
    with capsys.disabled():
        print(f"\n{size}: ours {ours / GIGA:.2f} GB a clip, {rival} {theirs / GIGA:.2f} GB; {ratio:.3f}, goal {most}")
    assert ratio <= most


@on_gpu
@pytest.mark.benchmark(group="traffic")
@pytest.mark.parametrize("side", SIDES)
def test_a_gpu_runs_the_ops_that_are_counted(benchmark, side):
    """The emulation of CUDA's autocast against CUDA, op by op: bytes, operations, and PyTorch's own peak."""
    shape = shape_of("vit_small", 8)
    fake = count(partial(SIDES[side], shape, torch.device("cpu")))
    step = SIDES[side](shape, torch.device("cuda"))
    set_attention(step.model, "sdpa")
    with Counter() as counter:
        real = benchmark.pedantic(measured, (step, counter), rounds=1)
    assert real.total.bytes == pytest.approx(fake.total.bytes, rel=0.03)
    assert real.total.flops == pytest.approx(fake.total.flops, rel=0.01)
    torch.cuda.reset_peak_memory_stats()
    step.run()
    assert torch.cuda.max_memory_allocated() == pytest.approx(fake.peak_bytes, rel=0.15)
