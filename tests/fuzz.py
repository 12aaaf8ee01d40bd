"""Feed every parser inputs that are wrong: `python -m tests.fuzz [--inputs 50000] [--seed 0] [--out FILE] [NAME ...]`.

Each target (in `tests/fuzz_texts.py`, `fuzz_commands.py`, `fuzz_verbs.py` and `fuzz_files.py`) runs in a process of its
own with a bounded memory. An input is accepted, or refused by the error that the parser promises. Everything else is a
fault: another exception, 5 s of computing, an allocation out of proportion (tried, or 256 MB that it took), a class
unpickled that is no plain data, a file opened outside of the input's folder, a command or a connection begun, a crash.
The command prints a table and exits with 1 if there was a fault; the inputs are then in `--save`, each with its files
and its traceback. `--out` is a page of the figures.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 5.0  # of computing for one input: a busy machine does not count
_WALL = 60.0  # for one that waits
_ROOM = 1 << 30  # bytes of addresses that a process may ask for beside what it has
_MOST = 256 << 20  # bytes of memory that one input may take
_EACH = 3  # faults of a kind that are saved
# what torch, numpy and safetensors build tensors of; AdamW's index is checked by name in train/moments.py
_PLAIN = ("torch", "numpy", "collections", "_codecs", "argparse", "pathlib", "pathlib._local", "safetensors")
_PYTHON = (sys.prefix, os.path.realpath(sys.prefix))  # an environment may be a link to another
_COMMANDS = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "subprocess.Popen", "socket.connect")


class Target(ABC):
    """One parser: originals are made in `outside`, inputs are written to `root`, the one folder it may touch."""

    name: ClassVar[str]
    share: ClassVar[int]  # of the inputs
    refusals: ClassVar[tuple[type[BaseException], ...]] = (ValueError,)

    def __init__(self, root: Path, outside: Path) -> None:
        self.root, self.outside = root, outside

    @abstractmethod
    def inputs(self) -> st.SearchStrategy[Any]: ...

    def put(self, value: Any) -> None:  # noqa: B027 (a command line has no files)
        """Write the input's files."""

    @abstractmethod
    def parse(self, value: Any) -> None: ...

    def write(self, originals: Mapping[str, bytes], changed: Mapping[str, bytes | None]) -> None:
        """The originals, where they are not changed; None: the file is not there."""
        for name, data in {**originals, **changed}.items():
            path = self.root / name
            if data is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            else:
                path.unlink(missing_ok=True)


class Hung(BaseException):
    """An input that took too long: no `except Exception` may swallow it."""


class Guard:
    """Sees what a parser does beside parsing, by Python's audit events."""

    def __init__(self, root: Path) -> None:
        self._root, self._armed = str(root.resolve()), False
        self._readable = tuple(
            {str(ROOT), *_PYTHON, sys.base_prefix, "/proc", "/sys", "/dev", "/usr", "/etc/localtime"}
        )
        self.seen: list[str] = []
        sys.addaudithook(self._see)

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        self.seen, self._armed = [], True
        try:
            yield
        finally:
            self._armed = False

    def _see(self, event: str, arguments: tuple) -> None:
        if not self._armed:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            self._armed = False  # realpath shall not be seen
            self._open(os.path.realpath(os.fsdecode(arguments[0])), arguments[2])
            self._armed = True
        elif event in ("os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink"):
            if isinstance(arguments[0], str | bytes):
                self._armed = False
                self._change(event, os.path.realpath(os.fsdecode(arguments[0])), arguments)
                self._armed = True
        elif event == "pickle.find_class":
            if str(arguments[0]).split(".")[0] not in _PLAIN and arguments[0] not in _PLAIN:
                self.seen.append(f"unpickled {arguments[0]}.{arguments[1]}")
        elif event in _COMMANDS:
            self.seen.append(f"{event} {arguments[:2]}")

    def _change(self, event: str, path: str, arguments: tuple) -> None:
        # a package looks through its own folder while it is imported
        imports = event in ("os.listdir", "os.scandir") and path.startswith(_PYTHON)
        if not self._is_inside(path) and not imports:
            self.seen.append(f"{event} {arguments[:2]}")

    def _is_inside(self, path: str) -> bool:
        return path == self._root or path.startswith(self._root + "/")

    def _open(self, path: str, flags: int) -> None:
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and path != os.devnull
        if not self._is_inside(path) and (writes or not path.startswith(self._readable)):
            self.seen.append(f"{'wrote' if writes else 'opened'} {path}")


def attempt(target: Target, guard: Guard, value: Any) -> tuple[bool, str | None]:
    """Whether the input was accepted, and its fault."""
    faulthandler.dump_traceback_later(_WALL, exit=True, file=sys.__stderr__)
    before_alarm = signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with guard.armed():
            target.parse(value)
        accepted, fault = True, None
    except target.refusals as error:
        accepted, fault = False, _tried(error)
    except BaseException as error:
        accepted, fault = (
            False,
            f"{type(error).__name__}: {error}"[:500] + "\n" + "".join(traceback.format_exc()[-6000:]),
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before_alarm)
        faulthandler.cancel_dump_traceback_later()
    took = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if fault is None and took > _MOST:
        fault = f"Memory: took {took >> 20} MB"
    return accepted, fault or ("; ".join(guard.seen) or None)


def _tried(error: BaseException | None) -> str | None:
    """A refusal that came only because memory could not be had."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return f"Memory: tried: {error}"[:500] + "\n" + "".join(traceback.format_exception(error))[-6000:]
        error = error.__cause__ or error.__context__
    return None


def _kind(fault: str) -> str:
    """By which faults are counted: the error's type and the last line of ours that it went through."""
    ours = [line.strip() for line in fault.splitlines() if f'"{ROOT}/' in line and "/tests/" not in line]
    ours = [line for line in ours if "/.venv/" not in line]
    return f"{fault.split(':')[0].splitlines()[0][:120]} | {ours[-1] if ours else ''}"


def fuzz(target: Target, guard: Guard, count: int, seed: int, save: Path | None) -> dict[str, Any]:
    """Feed that many inputs; the row of the table, its faults by kind with the number of each."""
    found: dict[str, int] = {}
    row: dict[str, Any] = {"target": target.name, "inputs": 0, "refusals": 0, "accepted": 0, "faults": found}
    begin = time.monotonic()

    def feed(value: Any) -> None:
        if row["inputs"] >= count:
            return
        for path in target.root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        target.put(value)
        accepted, fault = attempt(target, guard, value)
        row["inputs"] += 1
        row["accepted" if accepted else "refusals"] += 1
        if fault is not None:
            kind = _kind(fault)
            found[kind] = found.get(kind, 0) + 1
            if save is not None and found[kind] <= _EACH:
                _save(save / f"{target.name}-{list(found).index(kind)}-{found[kind]}", target.root, value, fault)

    while row["inputs"] < count:
        # a round that found nothing new ends early; the next one begins elsewhere
        settings = hypothesis.settings(
            max_examples=count - row["inputs"],
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(seed)(settings(hypothesis.given(target.inputs())(feed)))()
        seed += 1_000_003
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def _save(folder: Path, root: Path, value: Any, fault: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root, folder / "files", symlinks=True)
    (folder / "input.txt").write_text(repr(value))
    (folder / "fault.txt").write_text(fault, errors="backslashreplace")


def targets() -> dict[str, type[Target]]:
    from tests.fuzz_commands import CommandLines
    from tests.fuzz_files import FILES
    from tests.fuzz_texts import TEXTS
    from tests.fuzz_verbs import VERBS

    return {target.name: target for target in (*TEXTS, CommandLines, *VERBS, *FILES)}


def _hang(*_: object) -> None:
    raise Hung(f"{_SECONDS:g} s of computing")


def _child(name: str, count: int, seed: int, save: Path) -> None:
    """One target, whose row goes to stdout."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        root, outside = Path(home) / "root", Path(home) / "outside"
        root.mkdir()
        outside.mkdir()
        target, guard = targets()[name](root, outside), Guard(root)
        # everything that is imported late, before memory is bounded
        fuzz(target, guard, 20, seed + 1, None)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.RLIM_INFINITY))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            row = fuzz(target, guard, count, seed, save)
        print(json.dumps(row), flush=True)


def run(name: str, count: int, seed: int, save: Path) -> dict[str, Any]:
    """One target in a process of its own."""
    command = [sys.executable, "-m", "tests.fuzz", name, "--child", "--inputs", str(count)]
    command += ["--seed", str(seed), "--save", str(save)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as home:
        environment |= {"TMPDIR": home, "HF_HOME": home}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        # it crashed, or waited for ever: its last input is still there
        for left in Path(home).glob("*/root"):
            _save(save / f"{name}-crash", left, None, done.stderr[-6000:])
    fault = f"crash, exit code {done.returncode}: {done.stderr[-2000:]}"
    return {"target": name, "inputs": 0, "refusals": 0, "accepted": 0, "faults": {fault: 1}, "seconds": 0.0}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = targets()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all")
    parser.add_argument("--inputs", type=int, default=50_000, help="over all targets that are named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=Path("fuzz-faults"), help="a folder for inputs with a fault")
    parser.add_argument("--out", type=Path, help="write the figures to this page")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.names or list(known)
    if options.child:
        _child(names[0], options.inputs, options.seed, options.save)
        return 0
    total, rows, begin = sum(known[name].share for name in names), [], time.monotonic()
    print(_HEAD)
    for name in names:
        row = run(name, -(-options.inputs * known[name].share // total), options.seed, options.save)
        rows.append(row)
        print(_line(row), flush=True)
    print(_line(_sum(rows)))
    faults = [f"{row['target']}: {count} x {kind}" for row in rows for kind, count in row["faults"].items()]
    print("\n".join(faults), end="\n" if faults else "")
    if options.out is not None:
        words = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "tests.fuzz", *words])
        options.out.write_text("\n".join(_page(rows, faults, command, time.monotonic() - begin)) + "\n")
    return 1 if faults else 0


_HEAD = "| target | inputs | refused | accepted | faults | seconds |\n|---|---|---|---|---|---|"


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {key: sum(row[key] for row in rows) for key in ("inputs", "refusals", "accepted", "seconds")}
    return {"target": "all", **counts, "faults": {row["target"]: sum(row["faults"].values()) for row in rows}}


def _page(rows: list[dict[str, Any]], faults: list[str], command: str, seconds: float) -> list[str]:
    from train.record import surroundings

    total, machine = _sum(rows), surroundings()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "av", "safetensors", "hypothesis"))
    return [
        "# Fuzzing",
        "",
        f"**{total['inputs']:,} inputs** to {len(rows)} parsers, {total['refusals']:,} of them refused as promised and "
        f"{total['accepted']:,} accepted. **{sum(total['faults'].values()):,} faults.**",
        "",
        *(_HEAD, *map(_line, rows), _line(total)),
        "",
        *(f"- {fault.replace(f'{ROOT}/', '')}" for fault in faults),
        *([""] if faults else []),
        f"A fault is whatever is neither: another exception, {_SECONDS:g} s of computing, {_MOST >> 20} MB taken or an "
        "allocation that fails, a class unpickled that is no plain data, a file opened outside of the input's folder, "
        "a command or a connection begun, a crash. Inputs are right ones, changed by hypothesis in bytes, words or "
        "values; refused: by the error that the parser promises, which a command says in one line with exit code 2.",
        "",
        f"Made by `{command}`: {seconds / 60:.1f} minutes on one core. {machine['system']}, "
        f"Python {machine['versions']['python']}, {versions}, commit {machine['commit']}.",
    ]


def _line(row: Mapping[str, Any]) -> str:
    counts = [f"{count:,}" for count in (row["inputs"], row["refusals"], row["accepted"], sum(row["faults"].values()))]
    return f"| {' | '.join([row['target'], *counts, format(row['seconds'], '.0f')])} |"


if __name__ == "__main__":
    sys.exit(main())
