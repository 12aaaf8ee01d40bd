"""The ablation study: which runs its tables need, and what is made of their results."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train import study_ablations, study_pages, study_tables
from train.study_ablations import CHOSEN, EPOCHS, FINETUNE_RATES, Ablations
from train.study_ablations import LABELS as LABELLED
from train.study_records import read_records
from train.study_rows import StudyConfig
from train.study_tables import DEPTH, LABELS, MASKS, START, TABLES

FIGURE = r"(?<![\d.])\d+\.\d(?!\d)"


@pytest.fixture
def rendered(tmp_path, monkeypatch):
    """Lists of clips that nobody renders."""

    def make(folder: Path, *, look: str, test: int, **_) -> Path:
        folder = tmp_path / "data" / look
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in (("train", 4800), ("test", test)):
            (folder / f"{split}.csv").write_text("".join(f"{i}.mp4 {i % 24}\n" for i in range(count)))
        (folder / "classes.txt").write_text("".join(f"{i}\n" for i in range(24)))
        return folder / "train.csv"

    monkeypatch.setattr(study_ablations, "make_demo", make)


def study(tmp_path, *tables, **config):
    return Ablations(tables or tuple(TABLES.values()), StudyConfig("ablations", **config), tmp_path / "runs")


def asked(job):
    """The flags of a command; of a cube the first number."""
    arguments = job.arguments
    return {flag: arguments[i + 1] for i, flag in enumerate(arguments) if flag.startswith("--")}


def test_every_pre_training_runs_once_for_all_tables(rendered, tmp_path):
    jobs = study(tmp_path, seeds=1).jobs()
    commands = Counter(job.arguments for job in jobs)
    assert set(commands.values()) == {1}
    before = [job for job in jobs if not job.needs and job.arguments[0] != "train.finetune"]
    assert {job.name for job in before} == {
        f"{line.before.name}-0" for table in TABLES.values() for line in table.lines if line.before
    }
    outs = [asked(job)["--out"] for job in jobs]
    assert len(set(outs)) == len(outs)
    # table by table: a table's own commands stand together, those that it shares with one before it there
    place = {job.name: i for i, job in enumerate(jobs)}
    ends = [max(place[job.name] for job in study(tmp_path, table, seeds=1).jobs()) for table in TABLES.values()]
    assert ends == sorted(ends)
    # of a table pre-training comes first, the longest of it at once
    first = study(tmp_path, next(iter(TABLES.values())), seeds=1).jobs()
    trains = [job for job in first if job in before]
    assert first == jobs[: len(first)]
    assert first[: len(trains)] == sorted(trains, key=lambda job: -int(asked(job)["--steps"]))


def test_a_line_differs_from_the_method_in_what_it_says_alone(rendered, tmp_path):
    jobs = {job.name: asked(job) for job in study(tmp_path, MASKS, DEPTH, seeds=1).jobs()}
    usual = jobs["videomae-0"]
    assert (usual["--mask.ratio"], usual["--model.frames"]) == ("0.9", "16")
    for name, changed in {
        "tube-0.75-0": {"--mask.kind": "tube", "--mask.ratio": "0.75"},
        "frame-0.875-0": {"--mask.kind": "frame", "--mask.ratio": "0.875"},
        "depth-8-0": {"--model.decoder-depth": "8"},
    }.items():
        own = jobs[name]
        assert {flag: value for flag, value in own.items() if usual.get(flag) != value and flag != "--out"} == {
            flag: value for flag, value in changed.items() if usual.get(flag) != value
        }


def test_every_start_gets_the_same_labels_steps_and_rates(rendered, tmp_path):
    jobs = study(tmp_path, START, seeds=2).jobs()
    tuned = {}
    for job in jobs:
        if job.arguments[0] == "train.finetune":
            flags = asked(job)
            key = (flags["--data"], flags["--epochs"], flags["--model.frames"], flags["--validate-every"])
            tuned.setdefault(flags.get("--weights"), set()).add((*key, flags["--optim.base-lr"]))
    assert len({frozenset(of) for of in tuned.values()}) == 1
    assert len(tuned[None]) == len(FINETUNE_RATES)
    # two seeds of MoCo v3 and of VideoMAE, one of the others
    assert {Path(weights).name for weights in tuned if weights} == {
        *("moco-0", "moco-1", "videomae-0", "videomae-1", "image-0")
    }
    labelled = Path(next(iter(tuned[None]))[0])
    labels = [line.split()[1] for line in (labelled / "train.csv").read_text().splitlines()]
    assert set(Counter(labels).values()) == {504 // 24}


def write_result(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values) + "\n")


def pretend(study, top1, linear=50.0):
    """Results of all runs: top1 by title, of the line's seeds or of every rate; every run of another commit."""
    for table in study.tables:
        for line in table.lines:
            for seed in study.seeds(line):
                for i in study.rates(line):
                    value = top1[line.title] + (seed - (i != CHOSEN) * 10)
                    write_result(study.tune_run(line, i, seed) / "evaluations.jsonl", step=9, val_top1=value)
                if line.before is None:
                    continue
                accuracy = {"linear": {"top1": linear}}
                write_result(study.probe_run(line, seed) / "result.json", accuracy=accuracy)
                run = study.pretrain_run(line.before, seed)
                write_result(run / "metrics.jsonl", clips_per_second=200.0, loss=0.5)
                plan = {"steps": 60, "clips_per_step": 100, "peak_bytes": 5_000_000}
                write_result(run / "config.json", plan=plan, commit=f"{seed}abcdef", resumed=[{"commit": "5abcdef"}])


def written(study, out):
    """The page, after the study's tables were added to it."""
    said = study_pages.write(study, {job.name: 60.0 for job in study.jobs()}, out)
    assert any(str(out / "README.md") in line for line in said)
    return (out / "README.md").read_text()


def test_the_table_has_ours_beside_the_papers_and_says_which_order(rendered, tmp_path):
    ablations = study(tmp_path, START, seeds=3)
    titles = [line.title for line in START.lines]
    pretend(ablations, dict(zip(titles, (10.0, 30.0, 60.0, 59.5), strict=True)))
    rows = ablations.read(START)
    assert [row.tuned for row in rows] == [(10, 11, 12), (30,), (60, 61, 62), (59.5, 60.5, 61.5)]
    # 60 steps of 100 clips at 200 a second
    assert (rows[3].minutes, rows[3].peak) == (0.5, 5_000_000)
    page = written(ablations, tmp_path / "out")
    assert "| VideoMAE | 60.5 ± 1.0 | 59.5, 60.5, 61.5 | 50.0 ± 0.0 | 5 MB | 0.5 | 69.6 | 80.0 |" in page
    assert "| from scratch | 11.0 ± 1.0 | 10.0, 11.0, 12.0 | – | – | – | 32.6 | 68.8 |" in page
    # half a point is less than Student's t of 4 degrees of freedom by the error of a difference: 2.776 * (2 / 3) ** 0.5
    assert "commits 0abcdef, 1abcdef, 2abcdef, 5abcdef." in page
    assert "VideoMAE over MoCo v3: -0.5 points, **not as in the paper**, within its 95 % interval (± 2.3)." in page
    assert "MoCo v3 over from scratch: +50.0 points, as in the paper." in page
    assert "VideoMAE over image-inflated (ImageMAE): +30.5 points, as in the paper, one seed." in page


def test_another_order_is_said(rendered, tmp_path):
    ablations = study(tmp_path, LABELS, MASKS, seeds=2)
    values = {line.title: 50.0 for line in LABELS.lines} | {line.title: 40.0 for line in MASKS.lines}
    pretend(ablations, values | {"tube 75 %": 90.0, "frame 87.5 %": 40.02})
    page = written(ablations, tmp_path / "out")
    assert "not the paper's experiments" in page
    assert "tube 90 % over tube 75 %: -50.0 points, **not as in the paper**." in page
    # what a table does not show is neither order
    assert "tube 90 % over random 90 %: +0.0 points, a tie, within its 95 % interval (± 3.0)." in page
    assert "random 90 % over frame 87.5 %: -0.0 points, a tie" in page
    record = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert record["rows"][1]["top1"] == [40, 41]
    # the table's own runs: five lines of two seeds, each pre-trained, fine-tuned, probed
    assert len(record["runs"]) == 30
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 5000 for name in ("masks", "labels"))


def test_a_reason_stands_below_its_table(rendered, tmp_path, monkeypatch):
    masks = replace(MASKS, why="Clips this small hold less that is the same everywhere.")
    monkeypatch.setitem(study_tables.TABLES, "masks", masks)
    ablations = study(tmp_path, masks, seeds=2)
    pretend(ablations, {line.title: 40.0 for line in MASKS.lines})
    assert masks.why in written(ablations, tmp_path / "out")


def test_tables_that_are_run_one_by_one_come_together_on_a_page(rendered, tmp_path):
    out = tmp_path / "out"
    for table, value in ((MASKS, 40.0), (DEPTH, 60.0)):
        ablations = study(tmp_path, table, seeds=1)
        pretend(ablations, {line.title: value for line in table.lines})
        page = written(ablations, out)
    assert page.index("## What is hidden") < page.index("## Decoder depth")
    assert "| tube 75 % | 40.0 | 40.0 | 50.0 | 68.0 | 79.8 |" in page
    assert "| 8 | 60.0 | 60.0 | 50.0 | 0.500 | 5 MB | 0.5 | 69.3 | 79.7 | 23.7 GB |" in page
    # five masks and three depths more, each pre-trained, fine-tuned and probed, a minute each
    assert "24 in all, 0.4 hours of one core" in page


def test_a_record_of_other_lines_is_refused_by_name(rendered, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ablations = study(tmp_path, MASKS, seeds=1)
    pretend(ablations, {line.title: 40.0 for line in MASKS.lines})
    written(ablations, out)
    monkeypatch.setitem(study_tables.TABLES, "masks", replace(MASKS, lines=MASKS.lines[:2]))
    with pytest.raises(ValueError, match=r"masks.json has other lines .* `python -m train.study masks` again"):
        read_records(out)
    (out / "masks.json").write_text("")
    with pytest.raises(ValueError, match=r"masks.json is no record of this study .*again"):
        read_records(out)
    (out / "masks.json").write_text('{"rows": []}')
    monkeypatch.setitem(study_tables.TABLES, "masks", replace(MASKS, lines=()))
    with pytest.raises(ValueError, match=r"masks.json is no record of this study .*again"):
        read_records(out)


@pytest.mark.long
def test_a_table_is_made_by_its_command_and_made_again_from_what_is_there(tmp_path):
    words = ["study", "loss", "--seeds", "1", "--steps", "2", "--epochs", "0.2", "--labels", "24", "--jobs", "2"]
    command = [sys.executable, "-m", f"train.{words[0]}", *words[1:]]
    command += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    first, again = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert "\n12 of 12 runs done before" in again.stdout
    page = (tmp_path / "out" / "ablations" / "README.md").read_text()
    assert "pixels as they are, MSE" in page


def test_fewer_labels_are_seen_more_often(rendered, tmp_path):
    jobs = [asked(job) for job in study(tmp_path, LABELS, seeds=1).jobs() if job.arguments[0] == "train.finetune"]
    clips = {len((Path(flags["--data"]) / "train.csv").read_text().splitlines()) for flags in jobs}
    assert clips == {96, 252, 1008}
    seen = [
        float(flags["--epochs"]) * len((Path(flags["--data"]) / "train.csv").read_text().splitlines()) for flags in jobs
    ]
    assert seen == pytest.approx([LABELLED * EPOCHS] * 9, rel=1e-4)


def test_the_committed_page_says_what_its_records_hold_and_why_an_order_differs(tmp_path):
    results = ROOT / "results" / "ablations"
    records = read_records(results)
    assert records
    page = (results / "README.md").read_text()
    for record in records:
        table = record.table
        assert study_pages.section(record) in page
        assert (results / f"{table.name}.png").exists()
        means = {row.line.title: row.mean for row in record.rows}
        others = [pair for pair in table.order if means[pair[0]] <= means[pair[1]] - 0.05]
        assert not others or len(table.why) > 40, f"{table.name}: {others} are not in the paper's order; why?"


@pytest.mark.parametrize("page", ["README.md", "docs/studies.md"])
def test_the_documentation_has_the_figures_of_the_records(page):
    tables = re.findall(FIGURE, (ROOT / "results" / "ablations" / "README.md").read_text())
    text = (ROOT / page).read_text()
    if page == "docs/studies.md":
        text = text[text.index("How training starts") :]  # all of it is about these tables
    else:
        text = "\n".join(line for line in text.splitlines() if "MoCo v3" in line and "±" in line)
    figures = re.findall(FIGURE, text)
    assert len(figures) >= 4
    assert [figure for figure in figures if figure not in tables] == []
