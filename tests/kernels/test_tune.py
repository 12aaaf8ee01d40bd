"""kernels.tune without a GPU: which tiles are tried, what is kept, and a whole run in Triton's interpreter."""

import json
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from bench.shapes import TINY, shape_of
from bench.timing import Timing
from kernels import tiles, tune, tune_jobs
from kernels.launch import recording
from kernels.tune import Trial, beats, merged, same
from kernels.tune_jobs import candidates, is_valid, jobs, select

CPU = torch.device("cpu")
META_SIZES = ("vit_small", "vit_base", "vit_large", "vit_huge")
TARGETS = (tiles.Target("sm_80", 80, 108), tiles.Target("NVIDIA H200", 90, 132), tiles.Target("sm_120", 120, 170))


def timing(median, spread=0.0):
    return Timing(median, median - spread, median + spread, 9, "graph")


def all_jobs() -> Iterator[tune.Job]:
    for target in TARGETS:
        for size in META_SIZES:
            yield from jobs(shape_of(size), target, CPU)


@pytest.mark.long
def test_every_candidate_is_valid_and_the_default_is_first():
    for job in all_jobs():
        tried = candidates(job.op, job.default)
        assert tried[0] == job.default
        assert 2 <= len(tried) <= 16
        for tile in tried:
            assert set(tile) == set(job.default), job.op
            assert is_valid(tile), (job.op, tile)
            assert all(value & (value - 1) == 0 for k, value in tile.items() if k not in ("PROGRAMS", "num_stages"))
            assert tried.count(tile) == 1


@pytest.mark.parametrize(
    "tile", [{"ROWS": 3}, {"ROWS": 0}, {"COLS": 8}, {"num_warps": 32}, {"num_stages": 0}, {"PROGRAMS": 0}]
)
def test_what_no_kernel_can_take_is_not_valid(tile):
    assert not is_valid(tile)


def test_jobs_cover_every_op_that_asks_for_a_tile():
    ops = {job.op for job in jobs(TINY, TARGETS[1], CPU)}
    pairs = ("cube_embed", "decoder_input", "layer_norm", "bias_gelu", "attention")
    assert ops == {f"{op}.{part}" for op in pairs for part in ("forward", "backward")} | {
        "pixel_loss",
        "split_heads.backward",
    }


def test_the_op_asks_for_the_tile_under_the_jobs_key(monkeypatch):
    """The entry that is written is the one that is read."""
    asked = []

    def spy(op, default, device, dtype, **sizes):
        asked.append((op, tiles.shape_key(dtype, **sizes)))
        return real(op, default, device, dtype, **sizes)

    real = tiles.tile
    for name in ("cube_embed", "decoder_input", "pixel_loss", "layer_norm", "bias_gelu", "attention", "split_heads"):
        monkeypatch.setattr(import_module(f"kernels.{name}"), "tile", spy)
    for job in jobs(TINY, TARGETS[1], CPU):
        with recording():
            inputs = job.make(0)
            asked.clear()
            job.run(*inputs)
        assert asked == [(job.op, job.key)]


def test_select_names_ops_and_drops_repeated_entries():
    found = [job for size in META_SIZES for job in jobs(shape_of(size), TARGETS[1], CPU)]
    chosen = select(found, [])
    assert len(chosen) == len({(job.op, job.key) for job in found}) < len(found)
    assert {job.op for job in select(found, ["layer_norm", "attention.backward"])} == {
        "layer_norm.forward",
        "layer_norm.backward",
        "attention.backward",
    }
    with pytest.raises(ValueError, match="ops must be some of .*; got gelu"):
        select(found, ["gelu"])


def test_beats_needs_two_percent_and_quartiles_apart():
    assert beats(timing(97), timing(100))
    assert not beats(timing(99), timing(100))
    assert not beats(timing(97, spread=2), timing(100, spread=2))


def test_same_allows_rounding_and_nothing_more():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert same([x.bfloat16()], [(x * (1 + 1e-3)).bfloat16()])
    assert same([x], [x * (1 + 1e-6)])
    assert not same([x], [x * (1 + 1e-3)])
    assert not same([x.bfloat16()], [(x * 1.05).bfloat16()])
    assert not same([x * float("nan")], [x])


def test_merged_keeps_what_it_did_not_measure():
    table = {"A": {"op": {"k1": {"ROWS": 1}, "k2": {"ROWS": 2}}}, "B": {"op": {"k1": {"ROWS": 4}}}}
    new = merged(table, "A", {("op", "k1"): None, ("op", "k3"): {"ROWS": 8}})
    assert new == {"A": {"op": {"k2": {"ROWS": 2}, "k3": {"ROWS": 8}}}, "B": {"op": {"k1": {"ROWS": 4}}}}
    assert table["A"]["op"]["k1"] == {"ROWS": 1}
    assert merged({"A": {"op": {"k1": {"ROWS": 1}}}}, "A", {("op", "k1"): None}) == {}


@pytest.fixture
def by_rows(monkeypatch):
    """A clock that says a call takes as long as its tile has ROWS, by the tile that `trying` put in force."""

    def measure(sets, run, *, device, seconds):
        run(sets[0])
        tile = tiles._trial[1]
        if tile.get("num_warps") == 8:
            raise RuntimeError("out of resource: shared memory")
        return timing(float(tile.get("ROWS", 1)))

    monkeypatch.setattr(tune, "measure", measure)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU, not interpreted")
@pytest.mark.parametrize("op", ["layer_norm.forward", "layer_norm.backward", "decoder_input.forward", "pixel_loss"])
def test_a_run_writes_the_fastest_that_is_right(op, by_rows, tmp_path, capsys):
    path = tmp_path / "tiles.json"
    path.write_text('{"other": {"x": {"y": {"ROWS": 1}}}}')
    wanted = select(jobs(TINY, tiles.INTERPRETER, CPU, torch.float32), [op])[:1]
    found = tune.tune(wanted, "some GPU", CPU, lambda: False, path)
    table = json.loads(path.read_text())
    assert table["other"] == {"x": {"y": {"ROWS": 1}}}
    (job,) = wanted
    if "ROWS" in job.default:
        fastest = min(candidates(op, job.default), key=lambda t: t["ROWS"] if t["num_warps"] != 8 else 1e9)
        assert found == {(op, job.key): fastest}
        assert table["some GPU"] == {op: {job.key: fastest}}
    else:
        assert found == {(op, job.key): None}
        assert "some GPU" not in table
    assert op in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU, not interpreted")
@pytest.mark.parametrize("op", sorted({job.op for job in jobs(TINY, tiles.INTERPRETER, CPU)}))
def test_every_op_runs_with_every_candidate(op):
    """In the interpreter all fit, and all give the default's values."""
    job = select(jobs(TINY, tiles.INTERPRETER, CPU, torch.float32), [op])[0]
    inputs = job.make(0)
    with tiles.trying(op, job.default):
        wanted = tune._tensors(job.run(*inputs))
    for tile in candidates(op, job.default)[1:4]:
        with tiles.trying(op, tile):
            assert same(tune._tensors(job.run(*inputs)), wanted), tile


def test_failures_are_named(by_rows):
    job = select(jobs(TINY, tiles.INTERPRETER, CPU, torch.float32), ["layer_norm.forward"])[0]
    with recording():  # nothing needs to run for this
        trial = tune.attempt(job, job.default | {"num_warps": 8}, [job.make(0)], None, CPU)
    assert trial.timing is None
    text = tune.line(job, [Trial(job.default, timing(1.0)), trial], None)
    assert '"num_warps": 8' in text
    assert "RuntimeError: out of resource: shared memory" in text


def test_nothing_is_measured_when_time_is_over(tmp_path, capsys):
    wanted = select(jobs(TINY, tiles.INTERPRETER, CPU), ["pixel_loss"])
    assert tune.tune(wanted, "some GPU", CPU, lambda: True, tmp_path / "tiles.json") == {}
    assert "time is over: pixel_loss bfloat16 K=1536 not measured" in capsys.readouterr().out
    assert not (tmp_path / "tiles.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_shipped_table_holds_valid_tiles():
    for ops in tiles.table().values():
        for shapes in ops.values():
            assert all(tune_jobs.is_valid(tile) for tile in shapes.values())
