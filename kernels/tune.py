"""Measure tiles on this GPU and write the table that the ops read, `kernels/tiles.json`. Training never tunes.

    python -m kernels.tune                                            # ViT-S, B, L and H, all ops
    python -m kernels.tune --ops attention.backward cube_embed --sizes vit_base vit_large --minutes 5
    python -m kernels.tune --dry-run                                  # measure and print, write nothing

Run it in the repository's root: it measures as the benches do. For every op and shape the default tile and its
neighbours run on the same inputs. An entry is written when a candidate gives the default's values within rounding and
beats its time twice by more than 2 % and more than the spread; otherwise the shape's old entry goes. Entries of other
GPUs, ops and shapes stay.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from bench.shapes import GPU_CLIPS, Shape, shape_of
from bench.timing import Timing, measure, num_sets
from kernels import tiles
from kernels.tiles import Tile
from kernels.tune_jobs import Job, candidates, jobs, select
from videomae.command_line import Parser, run_main

PUBLISHED = ("vit_small", "vit_base", "vit_large", "vit_huge")
# a candidate must be faster by more than this, and by more than the spread
LEAST_GAIN = 0.02
# a batch that compiles to the code of a large one
COMPILE_CLIPS = 16


@dataclass(frozen=True)
class Trial:
    """A tile's time, or why it has none."""

    tile: Tile
    timing: Timing | None
    failure: str = ""


def _tensors(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def same(got: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    """Whether all are equal within rounding: relative errors up to one unit of their dtype, 2e-5 in float32 sums."""
    for one, other in zip(got, wanted, strict=True):
        scale = torch.linalg.vector_norm(other.double()).clamp_min(torch.finfo(torch.float32).tiny)
        error = torch.linalg.vector_norm(one.double() - other.double()) / scale
        if not error <= max(2e-5, torch.finfo(other.dtype).eps):  # so that nan is not the same
            return False
    return True


def beats(candidate: Timing, default: Timing) -> bool:
    """Faster by LEAST_GAIN, and with the middle halves of the samples apart."""
    return candidate.median < (1 - LEAST_GAIN) * default.median and candidate.high < default.low


def attempt(
    job: Job, tile: Tile, sets: Sequence[tuple], wanted: Iterable[Tensor] | None, device: torch.device
) -> Trial:
    """Run, compare with what is wanted, and time; a tile that cannot is named, with the reason."""
    with tiles.trying(job.op, tile):
        try:
            got = _tensors(job.run(*sets[0]))
            if wanted is not None and not same(got, wanted):
                return Trial(tile, None, "values differ from the default's")
            return Trial(tile, measure(sets, lambda inputs: job.run(*inputs), device=device, seconds=0.1))
        # too much shared memory, no such layout, ptxas: a tile that this GPU or this Triton cannot run
        except (TritonError, RuntimeError) as error:
            lines = str(error).strip().splitlines()
            return Trial(tile, None, f"{type(error).__name__}: {lines[0] if lines else ''}")


def tune_job(job: Job, device: torch.device, is_over: Callable[[], bool]) -> tuple[list[Trial], Tile | None] | None:
    """All trials, the default's first, and the tile for the table, if any; None when time ran out or the default
    failed."""
    sets = [job.make(seed) for seed in range(num_sets(job.read_bytes, device))]
    first = attempt(job, job.default, sets, None, device)
    if first.timing is None:
        print(f"{job.op} {job.key}: the default {job.default} failed: {first.failure}")
        return None
    with tiles.trying(job.op, job.default):
        wanted = _tensors(job.run(*sets[0]))
    trials = [first]
    for tile in candidates(job.op, job.default)[1:]:
        if is_over():
            return None
        trials.append(attempt(job, tile, sets, wanted, device))
    timed = [t for t in trials if t.timing is not None]
    best = min(timed, key=lambda t: t.timing.median if t.timing else float("inf"))
    if best is first or best.timing is None or not beats(best.timing, first.timing):
        return trials, None
    # once more, in turn: the best of many is partly luck
    again = [attempt(job, tile, sets, wanted, device).timing for tile in (job.default, best.tile)]
    confirmed = again[0] is not None and again[1] is not None and beats(again[1], again[0])
    return trials, best.tile if confirmed else None


def compile_one(shape: Shape, op: str, key: str, tile: Tile) -> None:
    """Start op once, so that Triton's cache on disk has it; what fails here is reported when it is measured."""
    device = torch.device("cuda")
    job = next(j for j in jobs(shape, tiles.target_of(device), device) if (j.op, j.key) == (op, key))
    with tiles.trying(op, tile):
        try:
            job.run(*job.make(0))
        except (TritonError, RuntimeError):
            return


def compile_all(wanted: Sequence[Job], seconds: float) -> None:
    """Every candidate, on all cores at once, for at most about so many seconds: compiling takes longer than measuring.

    Small batches do, as every multiple of 16 clips starts the same code.
    """
    tasks = [(shape_of(j.size, COMPILE_CLIPS), j.op, j.key, t) for j in wanted for t in candidates(j.op, j.default)]
    pool = ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=get_context("spawn"))
    done, late = wait([pool.submit(compile_one, *task) for task in tasks], timeout=seconds)
    pool.shutdown(cancel_futures=True)
    failures = [repr(future.exception()) for future in done if not future.cancelled() and future.exception()]
    if late or failures:
        print(f"compiled ahead only in part ({len(late)} late, {len(failures)} failed: {failures[:1]})")


def merged(table: dict[str, Any], gpu: str, found: dict[tuple[str, str], Tile | None]) -> dict[str, Any]:
    """The table with these entries of gpu, by op and key, put in, or taken out where None; nothing empty is left."""
    ops = {op: dict(shapes) for op, shapes in table.get(gpu, {}).items()}
    for (op, key), tile in found.items():
        shapes = ops.setdefault(op, {})
        shapes.pop(key, None)
        if tile is not None:
            shapes[key] = tile
    ops = {op: shapes for op, shapes in ops.items() if shapes}
    rest = {name: entries for name, entries in table.items() if name != gpu}
    return rest | ({gpu: ops} if ops else {})


def write_table(table: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    tiles.table.cache_clear()


def line(job: Job, trials: Sequence[Trial], chosen: Tile | None) -> str:
    """`layer_norm.forward bfloat16 D=768: 14.2 us; best 13.1 us {...}, kept`, and what failed."""
    timed = [t for t in trials if t.timing is not None]
    best = min(timed, key=lambda t: t.timing.median if t.timing else float("inf"))
    assert best.timing is not None
    assert trials[0].timing is not None
    verdict = "kept" if chosen is not None else "the default stays"
    text = f"{job.op:<24}{job.key:<28}{trials[0].timing.median:9.1f} us"
    text += f"  best {best.timing.median:9.1f} us  {json.dumps(best.tile)}: {verdict} ({best.timing.how})"
    failed = [f"    {json.dumps(t.tile)}: {t.failure}" for t in trials if t.timing is None]
    return "\n".join([text, *failed])


def tune(
    wanted: Sequence[Job], gpu: str, device: torch.device, is_over: Callable[[], bool], path: Path | None
) -> dict[tuple[str, str], Tile | None]:
    """What was found, by op and key; after every job it is merged into the table at path, unless that is None."""
    found: dict[tuple[str, str], Tile | None] = {}
    for i, job in enumerate(wanted):
        outcome = None if is_over() else tune_job(job, device, is_over)
        if is_over() and outcome is None:
            print(f"time is over: {', '.join(f'{j.op} {j.key}' for j in wanted[i:])} not measured")
            break
        if outcome is None:
            continue
        trials, found[job.op, job.key] = outcome
        print(line(job, trials, found[job.op, job.key]), flush=True)
        if path is not None:
            write_table(merged(json.loads(path.read_text()) if path.exists() else {}, gpu, found), path)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m kernels.tune", (__doc__ or "").strip())
    parser.add_argument("--ops", nargs="+", default=(), help="layer_norm, attention.backward, ...; all if not given")
    parser.add_argument("--sizes", nargs="+", choices=PUBLISHED, default=PUBLISHED, help="all if not given")
    parser.add_argument("--clips", type=int, default=GPU_CLIPS, help="in a batch")
    parser.add_argument("--minutes", type=float, default=10.0, help="nothing is begun later")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels.tune needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    device = torch.device("cuda")
    target = tiles.target_of(device)
    shapes = [shape_of(size, given.clips) for size in given.sizes]
    try:
        wanted = select([job for shape in shapes for job in jobs(shape, target, device)], given.ops)
    except ValueError as error:
        parser.error(str(error))
    compile_all(wanted, given.minutes * 60 / 3)
    print(f"{target.name}: {len(wanted)} shapes, compiled ahead in {time.perf_counter() - begin:.0f} s", flush=True)
    path = None if given.dry_run else tiles.TABLE
    tune(wanted, target.key, device, lambda: time.perf_counter() - begin > given.minutes * 60, path)
    print(f"{'nothing written' if path is None else path.name}, table {tiles.table_hash()}")
    return 0


if __name__ == "__main__":
    run_main(main)
