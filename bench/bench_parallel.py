"""What several processes, and saving, cost a step: one process alone, the same one under DistributedDataParallel, and
while a checkpoint is being written beside it, in turn.

    pytest bench/bench_parallel.py --benchmark-only

ViT-S on a CPU in float32, ViT-B on a GPU in bfloat16; ratios of step times. A run that saves every 100 steps waits for
the copy into the host's memory once, and computes beside the writing for as long as that takes. Writes
results/parallel.json and parallel.md; `python -m bench.gpu --only parallel` measures the same on a GPU.
"""

import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from bench.shapes import CPU_CLIPS, GPU_CLIPS, Shape, shape_of
from bench.steps import OPTIM, RATE, clips_and_keys, model_of
from train import checkpoint
from train.engine import Engine, Parallel, make_parallel
from train.objective import PretrainObjective
from train.optim import PRECISIONS, Schedule, Updater

RESULTS = Path(__file__).with_name("results")
WARM_UP, ROUNDS, SAVE_EVERY = 2, 9, 100
GOAL = 0.02  # of a step's time, for each of the two
MOST = 0.15  # what must hold on any machine, however busy


@pytest.mark.benchmark(group="one process of several, and saving")
def test_several_processes_and_saving_cost_little(benchmark, capsys, tmp_path):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _one_process(device):
        sides = Sides(shape_for(device), device, tmp_path)
        benchmark.pedantic(sides.in_turn, rounds=ROUNDS, warmup_rounds=WARM_UP)
        figures = sides.figures()
    benchmark.extra_info.update(figures)
    _write(figures, RESULTS)
    with capsys.disabled():
        print("\n" + _page(figures))
    assert figures["ddp"]["median"] < 1 + MOST
    assert figures["save_share"] < MOST


def measure(shape: Shape, device: torch.device, folder: Path, *, rounds: int = ROUNDS) -> dict[str, Any]:
    """The figures, which are written to the folder as well. For bench.gpu."""
    with _one_process(device), tempfile.TemporaryDirectory() as scratch:
        sides = Sides(shape, device, Path(scratch))
        for _ in range(WARM_UP + rounds):
            sides.in_turn()
        figures = sides.figures()
    _write(figures, folder)
    return figures


def shape_for(device: torch.device) -> Shape:
    """Of the model and the clips that are timed there."""
    return shape_of("vit_base", GPU_CLIPS) if device.type == "cuda" else shape_of("vit_small", CPU_CLIPS)


@contextlib.contextmanager
def _one_process(device: torch.device) -> Iterator[None]:
    """A process group of this one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


class Sides:
    """The same step three ways."""

    def __init__(self, shape: Shape, device: torch.device, folder: Path) -> None:
        """folder: where checkpoints are written, and removed."""
        self._shape, self._device, self._folder = shape, device, folder
        self._inputs = dict(zip(("frames", "keys"), (x.to(device) for x in clips_and_keys(self._shape)), strict=True))
        _, _, alone = self._side(lambda objective, updater, _: Engine(objective, updater))
        _, _, ddp = self._side(lambda *parts: make_parallel("eager", *parts, stop=()))
        self._model, self._updater, writing = self._side(lambda objective, updater, _: Engine(objective, updater))
        self._engines: dict[str, Engine] = {"alone": alone, "ddp": ddp, "writing": writing}
        self._seconds: dict[str, list[float]] = {name: [] for name in (*self._engines, "copy", "write")}

    def _side(self, make: Callable[..., Engine]) -> tuple[torch.nn.Module, Updater, Engine]:
        torch.manual_seed(0)
        model = model_of(self._shape).to(self._device)
        precision = "bfloat16" if self._device.type == "cuda" else "float32"
        updater = Updater(model, OPTIM, Schedule(RATE, RATE, 0, 1), precision, self._device)
        objective = PretrainObjective(model, mask_ratio=self._shape.ratio, autocast=PRECISIONS[precision])
        return model, updater, make(objective, updater, model)

    def in_turn(self) -> None:
        losses = [self._timed("alone"), self._timed("ddp")]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)
        self._wait()
        begin = time.perf_counter()
        taken = checkpoint.take(
            1, {"model.safetensors": self._model}, self._updater.moments(), {"rng": torch.get_rng_state()}
        )
        self._seconds["copy"].append(time.perf_counter() - begin)
        writing = threading.Thread(target=self._write, args=(taken,))
        writing.start()
        self._timed("writing")
        writing.join()

    def _write(self, taken: checkpoint.Snapshot) -> None:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            begin = time.perf_counter()
            checkpoint.write(Path(folder), taken, checkpoint.Checkpointing())
            self._seconds["write"].append(time.perf_counter() - begin)

    def _timed(self, name: str) -> Tensor:
        engine, clips = self._engines[name], self._shape.clips
        self._wait()
        begin = time.perf_counter()
        engine.micro_batch(self._inputs, 1.0)
        # every clip is real
        values = engine.update(0, **({"real": clips, "clips": clips} if isinstance(engine, Parallel) else {}))
        self._wait()
        self._seconds[name].append(time.perf_counter() - begin)
        return values[0]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def figures(self) -> dict[str, Any]:
        seconds = {name: times[WARM_UP:] for name, times in self._seconds.items()}
        median = {name: statistics.median(times) for name, times in seconds.items()}
        ratios = {
            name: [b / a for a, b in zip(seconds["alone"], seconds[name], strict=True)] for name in ("ddp", "writing")
        }
        slower = max(statistics.median(ratios["writing"]) - 1, 0)
        gpu = torch.cuda.get_device_name() if self._device.type == "cuda" else None
        return {
            "device": gpu or f"CPU, {torch.get_num_threads()} threads",
            "model": self._shape.size,
            "clips": self._shape.clips,
            "rounds": len(seconds["alone"]),
            "torch": torch.__version__,
            "seconds": median,
            **{name: {"median": statistics.median(r), "least": min(r), "most": max(r)} for name, r in ratios.items()},
            "save_share": (median["copy"] + slower * median["write"]) / (SAVE_EVERY * median["alone"]),
        }


def _write(figures: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "parallel.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "parallel.md").write_text(_page(figures))


def _page(figures: dict[str, Any]) -> str:
    seconds = figures["seconds"]
    lines = [
        "# One process of several, and saving",
        "",
        "Written by `pytest bench/bench_parallel.py --benchmark-only`, or `python -m bench.gpu` on a GPU.",
        f"{figures['device']}, torch {figures['torch']}; {figures['model']}, {figures['clips']} clips of 16 x 224 x "
        "224;",
        f"medians of {figures['rounds']} runs in turn.",
        "",
        "| | s | times a process alone | from run to run |",
        "| --- | --- | --- | --- |",
        f"| a step of a process alone | {seconds['alone']:.3f} | | |",
    ]
    for name, title in (("ddp", "the same by DistributedDataParallel"), ("writing", "while a checkpoint is written")):
        ratio = figures[name]
        spread = f"{ratio['least']:.3f} to {ratio['most']:.3f}"
        lines.append(f"| {title} | {seconds[name]:.3f} | {ratio['median']:.3f} | {spread} |")
    lines += [
        f"| copying a checkpoint | {seconds['copy']:.3f} | | |",
        f"| writing it | {seconds['write']:.3f} | | |",
        "",
        f"A run that saves every {SAVE_EVERY} steps takes {100 * figures['save_share']:.2f} % longer: the copy, and "
        "steps that are slower while it writes.",
    ]
    return "\n".join([*lines, "", f"Asked for, on a GPU: {100 * GOAL:.0f} % at most for each.", ""])
