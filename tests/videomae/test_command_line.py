"""What commands share: errors of one line, help, and the end of a pipe."""

import subprocess
import sys

import pytest

from videomae.command_line import Parser


def parser():
    made = Parser("prog", "What it\ndoes.\n\n    set in  " + "word " * 30)
    made.add_argument("name", metavar="NAME")
    made.add_argument("--codec", choices=("h264-fast", "jpeg"), help="how it is stored")
    made.add_argument("--sizes", nargs="+", choices=("vit_small", "vit_base", "vit_large"), help="of models")
    made.add_argument("--workers", type=int, metavar="N")
    return made


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--wokers", "3"], "no flag --wokers (did you mean --workers?); --help lists all"),
        (["--worker=3", "x"], "no flag --worker (did you mean --workers?); --help lists all"),
        (["x", "--zzz"], "no flag --zzz; --help lists all"),
        (["x", "--codec", "jpg"], "--codec must be one of h264-fast, jpeg; got jpg (did you mean jpeg?)"),
        (["x", "--workers", "many"], "--workers: invalid int value: 'many'"),
        ([], "the following arguments are required: NAME"),
    ],
    ids=str,
)
def test_refuses_in_one_line_with_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"prog: error: {says}\n"


def test_reads_what_is_right():
    given = parser().parse_args(["x", "--codec", "jpeg", "--sizes", "vit_small", "vit_base", "--workers", "-1"])
    assert (given.name, given.codec, given.sizes, given.workers) == ("x", "jpeg", ["vit_small", "vit_base"], -1)
    assert parser().parse_args(["--", "--name"]).name == "--name"


def test_help_is_calm():
    lines = parser().format_help().splitlines()
    assert lines[0] == "usage: python -m prog NAME [--flag VALUE ...]"
    assert lines[2] == "What it does."
    assert lines[4].startswith("    set in  word word")
    assert lines[5].startswith(" " * 12 + "word")
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "  --codec h264-fast|jpeg  how it is stored" in text
    assert "of models: vit_small, vit_base, vit_large" in text


PIPED = """
import sys
sys.path.insert(0, {root!r})
from videomae.command_line import run_main, show
def main():
    for i in range(100_000):
        print(i)
    return 0
{start}
"""


@pytest.mark.long
@pytest.mark.parametrize("start", ["run_main(main)", "show('line\\n' * 100_000)"], ids=["run", "show"])
def test_ends_quietly_where_nobody_reads(start, request):
    code = PIPED.format(root=str(request.config.rootpath), start=start)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait() == 141
    assert errors == ""
