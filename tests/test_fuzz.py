"""The fuzzing, in short: half of the targets, with few inputs; and that the guard around them sees what it should."""

import os
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import strategies as st

from tests import fuzz
from tests.fuzz_texts import Lists


class Trial(fuzz.Target):
    """A parser that does what it is told."""

    name, share = "trial", 1
    does = staticmethod(lambda value: None)

    def inputs(self):
        return st.binary(max_size=4)

    def put(self, value):
        self.write({}, {"a": value})

    def parse(self, value):
        self.does(value)


class Spy:
    def __reduce__(self):
        return os.getpid, ()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """One for all: an audit hook cannot be taken away."""
    root = tmp_path_factory.mktemp("root")
    return Trial(root, tmp_path_factory.mktemp("outside")), fuzz.Guard(root)


def refuse(value):
    raise ValueError("no")


def escape(value):
    raise KeyError("lost")


def try_for_memory(value):
    try:
        np.empty(1 << 55, np.uint8)
    except MemoryError as error:
        raise ValueError("too large") from error


def look_up(value):
    with socket.socket() as one:
        one.settimeout(0.01)
        one.connect(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("does", "accepted", "fault"),
    [
        (lambda value: None, True, None),
        (refuse, False, None),
        (escape, False, "KeyError"),
        (try_for_memory, False, "Memory: tried"),
        (lambda value: open("/etc/hostname").close(), True, "opened /etc/hostname"),
        (lambda value: os.listdir("/etc"), True, "os.listdir"),
        (lambda value: pickle.loads(pickle.dumps(Spy())), True, "unpickled posix.getpid"),
        (lambda value: os.system("true"), True, "os.system"),
        (look_up, False, "ConnectionRefusedError"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_guard_tells_a_refusal_from_a_fault(guarded, does, accepted, fault):
    target, guard = guarded
    target.does = does
    found = fuzz.attempt(target, guard, b"")
    assert found[0] == accepted
    assert found[1] is None if fault is None else fault in found[1]


def test_an_input_that_takes_too_long_is_a_fault(guarded, monkeypatch):
    target, guard = guarded
    monkeypatch.setattr(fuzz, "_SECONDS", 0.05)

    def hang(value):
        while True:
            len(value)

    target.does = hang
    assert "Hung" in fuzz.attempt(target, guard, b"")[1]


def test_lists_are_accepted_or_refused(guarded):
    target, guard = guarded
    row = fuzz.fuzz(Lists(target.root, target.outside), guard, 30, 0, None)
    assert row["inputs"] == 30
    assert not row["faults"]


def test_it_counts_faults_by_kind_and_saves_the_first(guarded, tmp_path):
    target, guard = guarded
    target.does = lambda value: escape(value) if len(value) > 1 else refuse(value) if value else None
    row = fuzz.fuzz(target, guard, 40, 0, tmp_path)
    assert row["inputs"] == 40 == row["refusals"] + row["accepted"]
    assert row["accepted"] > 0
    ((kind, count),) = row["faults"].items()
    assert kind.startswith("KeyError")
    assert count > 3
    saved = sorted(path.name for path in tmp_path.iterdir())
    assert saved == ["trial-0-1", "trial-0-2", "trial-0-3"]
    value = eval((tmp_path / "trial-0-1" / "input.txt").read_text())
    assert (tmp_path / "trial-0-1" / "files" / "a").read_bytes() == value
    assert "lost" in (tmp_path / "trial-0-1" / "fault.txt").read_text()


@pytest.mark.long
def test_no_parser_does_anything_but_accept_or_refuse(tmp_path):
    # a process each, whose start takes longer than its inputs: the rest is for the command
    names = ("ava", "command lines", "checkpoints", "weights", "samples")
    command = [sys.executable, "-m", "tests.fuzz", *names, "--inputs", "300", "--seed", "7", "--save", str(tmp_path)]
    done = subprocess.run(command, cwd=fuzz.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
