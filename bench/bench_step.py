"""One pre-training step of ViT-S on a CPU in float32: this project and `transformers` in turn, same weights, same
clips.

    pytest bench/bench_step.py --benchmark-only

A step is forward, loss, backward and a fused AdamW update of 16 x 224 x 224 clips, 90 % tube mask, decoder depth 4. The
float video that `transformers` takes is made beforehand and not counted; ours starts from the uint8 frames.
Also a command, to measure one side's peak memory in a process of its own: python bench/bench_step.py
{ours,transformers}
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kernels
import videomae
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from videomae import masking

BATCH, ROUNDS = 4, 7


def clips_and_mask():
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (BATCH, 16, 224, 224, 3), dtype=torch.uint8)
    return frames, masking.tube((8, 14, 14), 0.9, keys=torch.arange(BATCH))


def our_step() -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_small", decoder_depth=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    frames, mask = clips_and_mask()

    def step() -> torch.Tensor:
        loss = kernels.pixel_loss(model(frames, mask), frames, mask.masked)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def transformers_step(weights: torch.nn.Module | None = None) -> Callable[[], torch.Tensor]:
    """weights: one of our models, whose weights it starts from."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        decoder_hidden_size=192,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=768,
        use_mean_pooling=False,
        layer_norm_eps=1e-6,
    )
    model = transformers.VideoMAEForPreTraining(config)
    if weights is not None:
        from videomae.hugging_face import from_official

        model.load_state_dict(from_official(weights.state_dict()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    frames, mask = clips_and_mask()
    video = ((frames.float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 1, 4, 2, 3)
    video, hidden = video.contiguous(), mask.to_bool()

    def step() -> torch.Tensor:
        loss = model(pixel_values=video, bool_masked_pos=hidden).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.benchmark(group="step, ViT-S, float32, CPU")
def test_step_is_faster_than_transformers(benchmark, capsys):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, ours = our_step()
    theirs = transformers_step(model)
    times: dict[str, list[float]] = {"ours": [], "transformers": []}

    def both_in_turn() -> None:
        losses = []
        for name, step in (("ours", ours), ("transformers", theirs)):
            begin = time.perf_counter()
            losses.append(step())
            times[name].append(time.perf_counter() - begin)
        # the same computation, or the comparison means nothing
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)

    benchmark.pedantic(both_in_turn, rounds=ROUNDS, warmup_rounds=2)
    ratios = [b / a for a, b in zip(*(t[2:] for t in times.values()), strict=True)]
    ratio = statistics.median(ratios)
    medians = {name: statistics.median(t[2:]) for name, t in times.items()}
    benchmark.extra_info.update(ratio=ratio, batch=BATCH, threads=torch.get_num_threads(), **medians)
    with capsys.disabled():
        print(
            f"\nViT-S step, {BATCH} clips, {torch.get_num_threads()} threads: ours {medians['ours']:.3f} s, "
            f"transformers {medians['transformers']:.3f} s; median ratio {ratio:.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f} over {ROUNDS} rounds)"
        )
    assert ratio >= 1.10


@pytest.mark.benchmark(group="peak memory, ViT-S, float32, CPU")
def test_step_needs_less_memory_than_transformers(benchmark, capsys):
    pytest.importorskip("transformers")

    def measure() -> dict[str, float]:
        out = {}
        for side in ("ours", "transformers"):
            command = [sys.executable, __file__, side]
            out[side] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return out

    peaks = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(peaks)
    with capsys.disabled():
        print(
            "\npeak memory above the idle process: "
            f"ours {peaks['ours']:.0f} MB, transformers {peaks['transformers']:.0f} MB"
        )
    assert peaks["ours"] < peaks["transformers"]


def _peak_mb() -> float:
    # not getrusage: its maximum includes the parent's memory at the fork
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


if __name__ == "__main__":
    side = sys.argv[1]
    if side == "transformers":
        import transformers  # noqa: F401 - its import is not the step's memory
    idle = _peak_mb()
    run = our_step()[1] if side == "ours" else transformers_step()
    for _ in range(3):
        run()
    print(_peak_mb() - idle)
    os._exit(0)
