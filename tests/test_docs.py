"""What README and docs/ say and a machine can check: every command by its own parser, every link, flag and name; and
all commands that need nothing, run."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import shutil
import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

from tests.videos import moving_frames, write_video
from train.detect_recipes import DETECT
from train.evaluation import EVALUATE
from train.features import FeaturesConfig
from train.finetune_recipes import FINETUNE
from train.flags import flags_of
from train.moco_recipes import MOCO
from train.probe_config import ProbeConfig
from train.recipes import PRETRAIN
from train.report import ReportConfig
from train.study_rows import StudyConfig
from train.study_tables import TABLES
from train.visualize import VisualizeConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ("kernels", "videomae", "train", "bench", "tests")
TRAININGS = ("train.pretrain", "train.moco", "train.finetune", "train.detect")
WITH_WORKERS = ("videomae.data.check", "train.evaluate", "train.predict", "train.probe", "train.features")
# what the pages' commands take for granted, and what is left behind for those after them
ORDER = ("quick-start", "pretraining", "visualize", "weights", "finetuning", "detection", "troubleshooting")
RUN = [page for name in ORDER for page in PAGES if page.stem == name]


class Block(NamedTuple):
    """A fenced block. kind: what stands behind the fence: sh, python, bash (a script), or nothing (output)."""

    page: Path
    kind: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Command(NamedTuple):
    """needs: what it wants that does not come with the project, as its comment says. said: what stands below it."""

    page: Path
    words: tuple[str, ...]
    needs: str
    said: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return self.words[self.words.index("-m") + 1] if "-m" in self.words else ""

    @property
    def arguments(self) -> list[str]:
        return list(self.words[self.words.index("-m") + 2 :])

    def __str__(self) -> str:
        return f"{self.page.name}: {shlex.join(self.words)}"


@cache
def text_of(page: Path) -> str:
    return page.read_text()


@cache
def blocks() -> tuple[Block, ...]:
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
    return tuple(
        Block(page, found[1], tuple(found[2].splitlines())) for page in PAGES for found in fence.finditer(text_of(page))
    )


def split(line: str) -> tuple[list[str], str]:
    """Words of a line of a shell, and its comment."""
    code, comment = re.fullmatch(r"(.*?)(?:(?:^|\s)#\s*(.*))?", line).groups()
    return shlex.split(code), comment or ""


def commands_in(block: Block) -> list[Command]:
    """Of a block of commands every line; of output, those behind a $. A comment that begins with `needs` is of its
    line or, where it has a line to itself, of those up to the next empty one."""
    found, needs, open_line = [], "", ""
    for number, line in enumerate(block.lines):
        if block.kind == "" and not line.startswith("$ "):
            continue
        line = f"{open_line}{line.removeprefix('$ ')}"
        open_line = f"{line[:-1]} " if line.endswith("\\") else ""
        words, comment = ([], "") if open_line else split(line)
        if not words and not open_line:
            needs = comment if comment.startswith("needs") else ""
        own = comment if comment.startswith("needs") else needs
        said = tuple(block.lines[number + 1 :]) if block.kind == "" else ()
        for part in " ".join(shlex.quote(word) for word in words).split(" '&&' ") if words else []:
            found.append(Command(block.page, tuple(shlex.split(part)), own, said))
    return found


@cache
def commands() -> tuple[Command, ...]:
    return tuple(command for block in blocks() if block.kind in ("", "sh") for command in commands_in(block))


def prose(page: Path) -> str:
    """Without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)


class Parsed(BaseException):
    """The command line was read."""


@pytest.fixture
def stop_when_parsed(monkeypatch):
    """A function that reads a command's words as the command does, and goes no further. whole: also the values of
    flags, which takes tyro a while; names and recipes are read in any case."""

    def parse(command: Command, *, whole: bool) -> None:
        real_cli, real_parse = tyro.cli, argparse.ArgumentParser.parse_args

        def cli(*given, **options):
            if whole:
                real_cli(*given, **options)
            raise Parsed

        def parse_args(self, args=None, namespace=None):
            real_parse(self, args, namespace)
            raise Parsed

        with monkeypatch.context() as patched:
            patched.setattr(tyro, "cli", cli)
            patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            patched.setattr(sys, "argv", [command.module, *command.arguments])
            importlib.import_module(command.module).main()

    return parse


def read_by_itself(command: Command, parse, capsys, *, whole: bool) -> None:
    try:
        parse(command, whole=whole)
    except Parsed:
        return
    except SystemExit:
        pytest.fail(f"{command}\n{capsys.readouterr().err}")
    pytest.fail(f"{command}: was not parsed")


def test_every_python_command_has_flags_and_recipes_that_exist(stop_when_parsed, capsys):
    found = [command for command in commands() if command.module]
    assert len(found) > 60
    for command in found:
        if command.words[0] == "pytest":
            continue
        assert command.words[0] in ("python", "torchrun"), command
        read_by_itself(command, stop_when_parsed, capsys, whole=False)


@pytest.mark.long
def test_every_python_command_has_values_that_fit(stop_when_parsed, capsys):
    for command in {command.words: command for command in commands() if command.module}.values():
        read_by_itself(command, stop_when_parsed, capsys, whole=True)


def test_every_other_command_is_known():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = set(re.findall(r"^([a-z0-9-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    for command in commands():
        first, *rest = command.words
        if first == "make":
            assert set(rest) <= targets, command
        elif first == "pytest":
            assert all((ROOT / word).exists() for word in rest if not word.startswith("-")), command
        elif first == "pip":
            assert set(re.findall(r"\[(.*)\]", rest[-1])) <= extras, command
        elif first in ("cmake", "ctest"):
            assert (ROOT / "CMakeLists.txt").is_file()
        else:
            assert command.module, command


def test_every_flag_in_the_text_exists():
    recipes = (*PRETRAIN.values(), *FINETUNE.values(), *DETECT.values(), *MOCO.values(), *EVALUATE.values())
    configs = [*{type(config): config for config in (recipe() for recipe in recipes)}.values()]
    configs += [ProbeConfig, FeaturesConfig, VisualizeConfig, ReportConfig, StudyConfig]
    known = {name for config in configs for flag in flags_of(config) for name in flag.names}
    for path in (path for folder in OWN for path in (ROOT / folder).rglob("*.py")):
        known |= set(re.findall(r"""["' ](--[a-z][a-z-]*)""", path.read_text()))
    # of torchrun, pytest, pip and docker
    known |= {
        "--nproc-per-node",
        "--nnodes",
        "--max-restarts",
        "--signals-to-handle",
        "--signal",
        "--requeue",
        "--logdir",
    }
    known |= {"--ntasks-per-node", "--help", "--help-all"}
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", prose(page)):
            for flag in re.findall(r"(?:^|\s)(--[a-z][\w.-]*)", code):
                assert flag in known, f"{page.name}: {flag}"


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).strip().replace(" ", "-")


def test_every_link_leads_somewhere():
    count = 0
    for page in (*PAGES, *sorted((ROOT / "results").rglob("*.md"))):
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", prose(to), re.M)
                assert anchor in map(slug, headings), f"{page.name}: {target}"
            count += 1
    assert count > 60


def test_every_page_is_in_the_index_and_in_the_readme():
    index, readme = (text_of(ROOT / name) for name in ("docs/README.md", "README.md"))
    for page in (ROOT / "docs").glob("[a-z]*.md"):
        assert f"({page.name})" in index, page.name
        assert f"(docs/{page.name})" in readme, page.name


def test_every_file_in_the_text_exists():
    for page in PAGES:
        for code in re.findall(r"`([^`\s]+)`", prose(page)):
            if re.fullmatch(rf"(?:{'|'.join(OWN)}|docs)/[\w/.-]+\.(?:py|md|csv|json|h)", code):
                assert (ROOT / code).is_file(), f"{page.name}: {code}"


def test_every_name_in_python_exists():
    for block in blocks():
        if block.kind != "python":
            continue
        names = {}
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Import):
                names |= {name.name: import_if_ours(name.name) for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = import_if_ours(node.module)
                for name in node.names:
                    assert module is None or hasattr(module, name.name), f"{block.page.name}: {name.name}"
                    names[name.name] = getattr(module, name.name, None)
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and names.get(node.value.id):
                assert hasattr(names[node.value.id], node.attr), f"{block.page.name}: {node.value.id}.{node.attr}"


def import_if_ours(name: str) -> object | None:
    assert importlib.util.find_spec(name.partition(".")[0]) or name.startswith("transformers"), name
    return importlib.import_module(name) if name.partition(".")[0] in OWN else None


def test_recipes_are_what_their_tables_say():
    text = text_of(ROOT / "docs" / "recipes.md")
    parts = re.split(r"^## ", text, flags=re.M)
    for title, recipes in (("Pre-training", PRETRAIN), ("Fine-tuning", FINETUNE), ("Detection", DETECT)):
        part = next(part for part in parts if part.startswith(title))
        rows = {
            row[0].strip("`"): row
            for row in (
                [*map(str.strip, line.split("|")[1:-1])] for line in part.splitlines() if line.startswith("| `")
            )
        }
        published = {name for name in recipes if not name.startswith("demo") and name != "tiny"}
        assert set(rows) == published
        for name, row in rows.items():
            config = recipes[name]()
            assert f"{config.epochs:g}" in " ".join(row[2:4]), name
            if title != "Detection":
                assert f"{config.batch_size:,}" in " ".join(row[2:4]), name
    for name in (*PRETRAIN, *MOCO, *FINETUNE, *DETECT, *EVALUATE):
        assert f"`{name}`" in text or name == "as-trained", name


def test_every_study_is_listed():
    rows = re.findall(r"^\| `([a-z]+)` \|", text_of(ROOT / "docs" / "studies.md"), re.M)
    assert set(rows) == {*TABLES, "ablations"}


def test_nothing_points_into_somebodys_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:work|tmp|root|home)/", text_of(page)), page.name


def test_what_needs_nothing_is_run():
    for command in commands():
        if not command.needs and command.page not in RUN:
            assert command.words[0] == "make" or command.module == "train.plan", command


@pytest.mark.long
def test_what_plans_say_is_what_they_print(capsys, monkeypatch):
    plans = [command for command in commands() if command.module == "train.plan" and command.said]
    assert len(plans) >= 5
    for command in plans:
        monkeypatch.setattr(sys, "argv", ["train.plan", *command.arguments])
        assert not importlib.import_module("train.plan").main()
        assert capsys.readouterr().out.strip() == "\n".join(command.said).strip(), command


def shortened(command: Command) -> list[str]:
    """A step of four videos of a training, and all in this process where that is possible."""
    alone = ("--workers", "1" if command.module == "videomae.data.check" else "0")
    steps = (("--steps", "1"), ("--batch-size", "4"), ("--log.tensorboard", "false"))
    known = dict.fromkeys(WITH_WORKERS, (alone,)) | dict.fromkeys(TRAININGS, (alone, *steps))
    changes = known.get(command.module, ())
    words = command.arguments
    for flag, value in changes if "--evaluate" not in words else (alone,):
        words = [*words[: words.index(flag)], *words[words.index(flag) + 2 :]] if flag in words else words
        words = [*words, flag, value]
    return words


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder to give commands in: the demo's videos, fewer, and `videos`, as the quick start has them."""
    from train import run

    for name, make in (("demo", run.make_demo), ("scenes", run.make_scenes)):
        few = partial(make, train=24, test=24)
        monkeypatch.setattr(run, make.__name__, few)
        few(tmp_path / "data" / name)
    for seed, name in enumerate(("arm_wrestling", "pancake_h264", "structuralize")):
        for split, file in (("train", "first"), ("test", "rest")):
            (tmp_path / "videos" / split / name).mkdir(parents=True)
            frames = moving_frames(30, seed=2 * seed + (split == "test"))
            write_video(tmp_path / "videos" / split / name / f"{file}.mp4", frames)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "demo_loss.csv", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python_of(page: Path) -> None:
    if importlib.util.find_spec("transformers"):
        exec("\n".join(block.text for block in blocks() if block.page == page and block.kind == "python"), {})


@pytest.mark.long
def test_commands_that_need_nothing_run_one_after_another(home, monkeypatch, capsys):
    first = Command(ROOT, ("python", "-m", "train.pretrain"), "")
    for command in (first, *(c for page in RUN for c in commands() if c.page == page and not c.needs)):
        if command.module in ("", "train.plan"):
            continue
        monkeypatch.setattr(sys, "argv", [command.module, *shortened(command)])
        try:
            code = importlib.import_module(command.module).main()
        except SystemExit as end:
            code = end.code
        assert not code, f"{command}\n{capsys.readouterr().err}"
        if command.module == "videomae.weights" and command.page.stem == "quick-start":
            run_python_of(command.page)
