"""bench.gpu and the benches' rows on a CPU, at tiny shapes: everything but the clock and the kernels is the same."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import bench_parallel, gpu, gpu_steps
from bench.compare import Result, Setting, Work, checked, results
from bench.gpu import Task
from bench.issue import straight_count
from bench.page import Ceilings
from bench.report import Report, goals, markdown
from bench.shapes import TINY, shape_of
from bench.step_results import FirstStep
from bench.timing import Timing

SETTING = Setting.cpu()
ENVIRONMENT = os.environ | {"PYTHONPATH": str(gpu.ROOT)}
# no kernels of these on a CPU
ABSENT = {"cudnn", "efficient"}


def timing(us):
    return Timing(us, us, us, 5, "graph")


@pytest.fixture(scope="module")
def found():
    return {name: rows(TINY, SETTING) for name, rows in gpu.OPS.items()}


@pytest.mark.parametrize("op", gpu.OPS)
def test_every_contender_is_checked_and_timed(found, op):
    assert {r.contender for r in found[op]} >= {"ours", "eager", "compile"}
    for r in found[op]:
        assert r.op == op
        if r.contender in ABSENT:
            assert "RuntimeError" in r.failure
            continue
        assert r.failure == ""
        assert r.error <= 1e-4
        assert r.timing.median > 0
        assert r.returned_bytes > 0
        assert r.work.reads > 0
        assert r.work.writes > 0


@pytest.mark.parametrize("op", gpu.OPS)
def test_half_precision_passes_too(op, monkeypatch):
    half = replace(SETTING, dtype=torch.bfloat16)
    contest = next(iter(vars(gpu)[f"bench_{op}"].contests(TINY, half)))
    ours = [r for r in results(contest, half, seconds=0.0) if r.contender in ("ours", "eager")]
    assert [r.failure for r in ours] == [""] * len(ours)


def test_a_contender_that_is_wrong_gets_no_time(found):
    contest = gpu.bench_bias_gelu.contests(TINY, SETTING)[0]
    contest.contenders["wrong"] = lambda x, b: x + b
    contest.contenders["nan"] = lambda x, b: (x + b) * float("nan")
    by_name = {r.contender: r for r in results(contest, SETTING, seconds=0.0)}
    for name in ("wrong", "nan"):
        assert by_name[name].timing is None
        assert "values differ" in by_name[name].failure
    assert by_name["ours"].timing is not None


def test_checked_refuses_another_shape():
    with pytest.raises(ValueError, match=r"values differ: shape \(2,\), not \(1,\)"):
        checked([torch.ones(2)], [torch.ones(1)], 0.1)


def test_counted_bytes_are_those_of_the_published_shape():
    """ViT-B, 64 clips, bfloat16: x, residual, s and y of 64 * 160 * 768, and two statistics of each row."""
    contest = gpu.bench_layer_norm.contests(shape_of("vit_base"), replace(SETTING, dtype=torch.bfloat16))[0]
    work = contest.work["forward"]
    assert work.reads + work.writes == 4 * 2 * 64 * 160 * 768 + 8 * 64 * 160
    assert shape_of("vit_base").num_visible == 160
    assert shape_of("vit_huge").head_width == 80


def test_sections_are_independent_and_written(tmp_path, found, capsys):
    report = Report(gpu.environment(SETTING.device))

    def fails():
        raise RuntimeError("on purpose")

    planned = {"bad": Task(fails), "good": Task(lambda: report.results.extend(found["cube_embed"]), 12)}
    gpu.run_sections(planned, report, tmp_path, 1.0)
    assert [(s.name, s.status) for s in report.sections] == [("bad", "failed"), ("good", "done")]
    page = (tmp_path / "ops.md").read_text()
    assert "Kernel tests on this device: not run." in page
    assert "on purpose" in page
    assert "Traceback" in page
    assert "cube_embed tiny" in page
    assert "| good | done | 12 |" in page
    raw = json.loads((tmp_path / "ops.json").read_text())
    assert len(raw["results"]) == len(found["cube_embed"])
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__


def test_sections_are_skipped_by_name_when_time_is_over(tmp_path):
    report = Report({})
    gpu.run_sections({"late": Task(lambda: pytest.fail("must not run"))}, report, tmp_path, -1.0)
    assert [(s.name, s.status) for s in report.sections] == [("late", "skipped")]
    assert "### late: skipped" in (tmp_path / "ops.md").read_text()


def test_a_section_that_would_end_long_after_the_time_is_skipped_and_a_shorter_one_is_not(tmp_path):
    report, ran = Report({}), []
    planned = {
        "long": Task(lambda: ran.append("long"), 60 + gpu.OVERRUN + 1),
        "short": Task(lambda: ran.append("short"), 60 + gpu.OVERRUN - 1),
    }
    gpu.run_sections(planned, report, tmp_path, 1.0)
    assert ran == ["short"]
    assert [(s.name, s.status, s.expected) for s in report.sections] == [
        ("long", "skipped", 60 + gpu.OVERRUN + 1),
        ("short", "done", 60 + gpu.OVERRUN - 1),
    ]
    assert report.sections[0].detail == "of 1 minutes 60 s were left"


def test_a_device_that_a_kernel_broke_does_not_keep_results_from_being_written(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    report = Report({})
    gpu.run_sections({"bad": Task(broken), "late": Task(lambda: None)}, report, tmp_path, 1.0)
    assert [
        (s["name"], s["status"], s["left"]) for s in json.loads((tmp_path / "ops.json").read_text())["sections"]
    ] == [
        ("bad", "failed", None),
        ("late", "done", None),
    ]


def test_what_matters_most_comes_first():
    report = Report({})
    names = [*gpu.GROUPS["tests"], "ceilings", *gpu.STEPS, "attention", "layer_norm"]
    step_shapes = [shape_of(size) for size in gpu.STEP_SIZES]
    planned = gpu.sections(names, report, gpu.ROOT, step_shapes[:2], SETTING, 8.0, step_shapes=step_shapes)
    assert list(planned) == [
        *("tests", "ceilings", "step vit_base", "parts vit_base", "profile vit_base", "compiled vit_base"),
        *("attention vit_base", "attention vit_large", "layer_norm vit_base", "layer_norm vit_large"),
        *("step vit_large", "parallel vit_base", "memory vit_base", "depth vit_base", "first_step vit_base"),
        *("step vit_small", "step vit_huge", "compiled vit_large"),
    ]
    assert all(task.seconds > 0 for task in planned.values())
    assert planned["tests"].seconds == pytest.approx(8 * 60 * gpu.TESTS_SHARE)
    assert planned["compiled vit_large"].seconds > planned["compiled vit_base"].seconds
    # alone and late, every section but the tests ends within what one command may take
    assert max(task.seconds for task in planned.values()) < 480 + gpu.OVERRUN


@pytest.mark.long
def test_the_command_runs_sections_of_steps(tmp_path, monkeypatch, capsys):
    """On a CPU that is said to be a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Setting, "gpu", Setting.cpu)
    monkeypatch.setattr(gpu_steps, "MOST_CLIPS", 1)
    monkeypatch.setattr(gpu_steps, "COMPARED", 1)
    real = gpu.measure_ceilings
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: real(device, copy_bytes=1 << 16, side=64))
    monkeypatch.setattr(gpu, "first_step", lambda size, clips, attention: FirstStep(size, clips, attention, 1, 2, 3, 4))
    commands = []

    def profile(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 2, stderr="bench.step_profile needs a CUDA GPU")

    monkeypatch.setattr(gpu, "_output", lambda *_: None)
    monkeypatch.setattr(gpu.subprocess, "run", profile)
    only = "ceilings,parts,profile,first_step"
    assert gpu.main(["--only", only, "--sizes", "vit_tiny", "--out", str(tmp_path)]) == 1
    raw = json.loads((tmp_path / "step.json").read_text())
    names = ("ceilings", "parts vit_tiny", "profile vit_tiny", "first_step vit_tiny")
    assert [s["name"] for s in raw["sections"]] == list(names)
    assert [s["status"] for s in raw["sections"]] == ["done", "done", "failed", "done"]
    assert "bench.step_profile needs a CUDA GPU" in raw["sections"][2]["detail"]
    assert commands[0][1:] == [
        *("-m", "bench.step_profile", str(tmp_path / "profile.md")),
        *("--size", "vit_tiny", "--clips", "1", "--attention", "auto"),
    ]
    assert raw["parts"][0]["floors"]["decoder"] > 0
    assert not (tmp_path / "ops.md").exists()
    assert (tmp_path / "step_parts.png").exists()
    assert raw["first_steps"][0]["engine"] == "auto"
    assert "met         vit_tiny, 1 clips, auto" in capsys.readouterr().out


def test_one_process_of_several_is_a_section(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_parallel.measure, "__kwdefaults__", {"rounds": 1})
    report = Report({})
    planned = gpu.sections(["parallel"], report, tmp_path, [], SETTING, 8.0, step_shapes=[shape_of("vit_tiny", 1)])
    monkeypatch.setattr(gpu_steps.Bench, "clips", lambda *_: 1)
    gpu.run_sections(planned, report, tmp_path, 8.0)
    assert [(s.name, s.status) for s in report.sections] == [("parallel vit_tiny", "done")]
    raw = json.loads((tmp_path / "parallel.json").read_text())
    assert raw["clips"] == raw["rounds"] == 1
    assert raw["ddp"]["median"] > 0
    assert "takes" in (tmp_path / "parallel.md").read_text()


def test_it_imports_without_what_a_machine_for_measuring_may_lack(tmp_path):
    absent = ("tyro", "decord", "av", "tensorboard", "flash_attn", "xformers", "matplotlib", "transformers")
    code = f"import sys\nfor name in {absent}:\n    sys.modules[name] = None\n"
    code += "import bench.gpu, bench.first_step, bench.step_profile, bench.plot_step, bench.bench_traffic\n"
    code += "print('imported'); sys.exit(bench.step_profile.main(['profile.md']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr
    assert done.returncode == (0 if torch.cuda.is_available() else 2)


def test_planned_sections_run_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "OPS", {"layer_norm": gpu.OPS["layer_norm"]})
    real = gpu.measure_ceilings
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: real(device, copy_bytes=1 << 16, side=64))
    report = Report({})
    planned = gpu.sections(["ceilings", "layer_norm"], report, tmp_path, [TINY], SETTING, 1.0)
    assert list(planned) == ["ceilings", "layer_norm tiny"]
    gpu.run_sections(planned, report, tmp_path, 1.0)
    assert [s.status for s in report.sections] == ["done", "done"]
    assert report.ceilings.copy > 0
    assert "%" in markdown(report)


@pytest.mark.long
def test_red_tests_fail_their_section(tmp_path):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert False\n")
    with pytest.raises(RuntimeError, match=r"pytest exited with 1: 1 failed"):
        gpu.run_tests(tmp_path / "out", 60, targets=[str(tmp_path / "test_red.py")])
    assert "assert False" in (tmp_path / "out" / "tests.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_sections_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests,nonsense"])
    assert "'nonsense' is none of tests, ceilings, steps, ops, step, parts" in capsys.readouterr().err


def result(op, part, contender, us, **more):
    return Result(op, "vit_base", "R=1", part, contender, Work(2_000_000, 2_000_000), timing(us), **more)


CEILINGS = Ceilings(4e12, 8e14, timing(1), timing(1))


def test_goals_take_the_tighter_limit():
    free = goals([result("layer_norm", "forward", "ours", 1.25)], CEILINGS)
    bound = goals([result("layer_norm", "forward", "ours", 1.25, issue_us=1.2)], CEILINGS)
    assert [(g.met, g.measured[:4]) for g in free + bound] == [(False, "80% "), (True, "96% ")]
    assert goals([result("layer_norm", "forward", "ours", 1.0)], None)[0].met is None


def test_goals_take_the_fastest_rival():
    part = "forward+backward"
    timed = [result("attention", part, name, us) for name, us in (("ours", 10), ("flash", 14), ("cudnn", 12))]
    (goal,) = goals(timed, CEILINGS)
    assert goal.met is False
    assert goal.measured == "1.20 times, beside cudnn"
    (goal,) = goals(timed[:2], CEILINGS)
    assert goal.met is True


def test_a_failure_of_ours_meets_no_goal():
    failed = replace(result("pixel_loss", "forward+backward", "ours", 1), timing=None, failure="values differ")
    decided = goals([failed, result("pixel_loss", "forward+backward", "eager", 100)], CEILINGS)
    assert [g.met for g in decided] == [False, False, None]


def test_memory_goals():
    ours = result("pixel_loss", "forward+backward", "ours", 1, peak_bytes=10, returned_bytes=5)
    eager = result("pixel_loss", "forward+backward", "eager", 100, peak_bytes=51)
    assert [g.met for g in goals([ours, eager], CEILINGS)] == [True, True, True]
    assert [g.met for g in goals([ours, replace(eager, peak_bytes=50)], CEILINGS)] == [True, True, False]
    embed = [result("cube_embed", p, "ours", 1, peak_bytes=30, returned_bytes=15) for p in ("forward", "backward")]
    scratch = [g for g in goals(embed, CEILINGS) if "memory" in g.text]
    assert [g.met for g in scratch] == [True, True]


LISTING = """
.text._kernel:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/              @!P5 BRA `(.L_x_0) ;
        /*0020*/                   CALL.REL.NOINC `($slow) ;
        /*0030*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0040*/                   FMUL R1, R1, R1 ;
.L_x_1:
        /*0050*/                   FADD R1, R1, R1 ;
        /*0060*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0070*/               @P0 EXIT ;
        /*0080*/                   STG.E desc[UR4][R2.64], R1 ;
        /*0090*/                   NOP ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_straight_count_is_that_of_the_shortest_way():
    assert straight_count(LISTING) == 8  # LDG BRA FMUL FADD BRA.U EXIT STG EXIT
