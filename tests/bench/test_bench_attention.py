"""bench_attention's table: what is proposed, written and kept, and that `videomae.attention` goes by it."""

import json

import pytest
import torch

from bench import bench_attention, gpu
from bench.compare import Result, Setting, Work, results
from bench.report import Report, Section
from bench.shapes import TINY, shape_of
from bench.timing import Timing
from kernels import tiles
from kernels.tiles import Target
from tests.videomae.attention_packages import stand_in
from videomae import attention
from videomae.attention import Choice, choose
from videomae.model import SIZES

H200, A100 = Target("NVIDIA H200", 90, 132), Target("NVIDIA A100", 80, 108)
BEFORE = {
    H200.key: {
        "160x64": {"choice": "triton", "us": {"triton": 1.0, "sdpa": 2.0}},
        "400x64": {"choice": "sdpa", "us": {"sdpa": 2.0}},
    }
}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The table, of an H200, on which the test runs as far as videomae.attention knows."""
    path = tmp_path / "attention.json"
    path.write_text(json.dumps(BEFORE))
    monkeypatch.setattr(attention, "TABLE", path)
    forget()
    with tiles.assuming(H200):
        yield path
    forget()


def forget():
    attention._decide.cache_clear()
    attention.table.cache_clear()


def asked(length):
    return choose("auto", device=torch.device("cuda", 0), dtype=torch.bfloat16, length=length, head_width=64)


def result(size, shape, contender, us, part="forward+backward", failure=""):
    timing = None if failure else Timing(us, us, us, 5, "graph")
    return Result("attention", size, shape, part, contender, Work(1, 1), timing, failure=failure)


def found_for(size):
    encoder, decoder = bench_attention.sequences(shape_of(size))
    return [
        result(size, encoder.where, "ours", 60.0),
        result(size, encoder.where, "ours", 1.0, part="forward"),
        result(size, encoder.where, "eager", 80.0),
        result(size, encoder.where, "math", 10.0),
        result(size, encoder.where, "compile", 5.0),
        result(size, encoder.where, "flash", 0.0, failure="RuntimeError: no"),
        result(size, encoder.where, "flash-attn", 50.04),
        result(size, decoder.where, "eager", 900.0),
        result(size, decoder.where, "cudnn", 800.0),
        result(size, decoder.where, "triton", 2000.0),
    ]


def test_it_proposes_what_it_timed():
    assert bench_attention.proposal(found_for("vit_base"), [shape_of("vit_base")]) == {
        "160x64": {"choice": "flash-attn", "us": {"flash-attn": 50.0, "triton": 60.0, "sdpa": 80.0}},
        "1568x64": {"choice": "sdpa-cudnn", "us": {"sdpa-cudnn": 800.0, "sdpa": 900.0, "triton": 2000.0}},
    }
    assert bench_attention.proposal([], [shape_of("vit_base")]) == {}


@pytest.mark.long
def test_a_back_end_that_is_usable_is_timed_over_both_sequences(monkeypatch):
    stand_in(monkeypatch, "flash-attn")
    for one in bench_attention.contests(TINY, Setting.cpu()):
        by_name = {r.contender: r for r in results(one, Setting.cpu(), seconds=0.0) if r.part == "forward+backward"}
        assert by_name["flash-attn"].failure == ""
        assert {"eager", "flash", "cudnn"} <= set(by_name)
        assert ("ours" in by_name) != ("triton" in by_name)


def test_times_of_two_sizes_are_not_mixed():
    large = [r for r in found_for("vit_large") if r.contender != "flash-attn"]
    shapes = [shape_of("vit_base"), shape_of("vit_large"), shape_of("vit_huge")]
    table = bench_attention.proposal(found_for("vit_base") + large + found_for("vit_huge"), shapes)
    assert list(table) == ["160x64", "1568x64", "160x80", "1568x80"]
    assert table["160x64"] == {"choice": "triton", "us": {"triton": 60.0, "sdpa": 80.0}}


def test_what_is_kept_stands_beside_other_gpus_and_shapes(kept):
    assert asked(160) == Choice("triton", "measured on NVIDIA H200")
    found = {"160x64": {"choice": "sdpa", "us": {"sdpa": 1.0}}, "1568x64": {"choice": "sdpa", "us": {"sdpa": 1.0}}}
    bench_attention.keep({H200.key: found}, kept)
    bench_attention.keep({A100.key: found}, kept)
    forget()
    assert attention.table() == {H200.key: BEFORE[H200.key] | found, A100.key: found}
    assert asked(160) == Choice("sdpa", "measured on NVIDIA H200")


def test_a_run_on_a_gpu_writes_its_proposal_and_keeps_it_when_asked(kept, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "OPS", {"attention": lambda shape, setting: found_for(shape.size)})
    report, shapes = Report({}), [shape_of("vit_base"), shape_of("vit_huge")]
    assert gpu.keep_attention(report) == "attention: nothing was timed, nothing kept"
    planned = gpu.sections(["attention"], report, tmp_path, shapes, Setting.gpu(), 1.0)
    gpu.run_sections(planned, report, tmp_path / "run", 1.0)
    written = json.loads((tmp_path / "run" / "attention.json").read_text())
    assert written == report.attention == {H200.key: bench_attention.proposal(report.results, shapes)}
    assert list(written[H200.key]) == ["160x64", "1568x64", "160x80", "1568x80"]
    report.sections.append(Section("tests", "failed"))
    assert "not kept" in gpu.keep_attention(report)
    assert json.loads(kept.read_text()) == BEFORE
    report.sections.pop()
    assert gpu.keep_attention(report) == f"attention: kept in {kept}"
    assert json.loads(kept.read_text()) == {H200.key: BEFORE[H200.key] | written[H200.key]}


def test_the_heads_of_a_decoder_are_as_wide_as_its_encoder_s():
    for name in ("vit_small", "vit_base", "vit_large", "vit_huge"):
        size = SIZES[name]
        encoder, decoder = bench_attention.sequences(shape_of(name))
        assert (encoder.length, encoder.heads, encoder.head_width) == (160, size.heads, size.width // size.heads)
        assert (decoder.length, decoder.heads, decoder.head_width) == (1568, size.decoder_heads, encoder.head_width)
