"""Every command of the project: its page of help, and what it says of a flag that is misspelt."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("train", "videomae", "bench", "kernels")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.startswith("bench_") and '__name__ == "__main__"' in path.read_text()
)
VERBS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]


def call(verb, *arguments, monkeypatch, capsys):
    """Exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [verb, *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        raise SystemExit(importlib.import_module(verb).main())
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_errors_name_the_nearest_flag(verb, monkeypatch, capsys):
    code, page, errors = call(verb, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, errors) == (0, "")
    lines = page.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: python -m {verb}")
    assert not re.search(r"[╭│╰\x1b\r]", page)
    flags = re.findall(r"^  (--[\w.-]+)", page, re.M)
    if not flags:
        return
    flag = max(flags, key=len)
    code, page, errors = call(verb, f"{flag}x", "1", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, page) == (2, "")
    assert errors.count("\n") == 1
    assert f"error: no flag {flag}x (did you mean {flag}?)" in errors


def test_every_command_ends_quietly_where_nobody_reads():
    for path in SOURCES:
        assert path.read_text().rstrip().endswith("    run_main(main)"), path
