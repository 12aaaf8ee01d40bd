"""The mutations of `tests.mutate_kernels` still apply: at least six to every kernel, each to a line that is there."""

import re
from pathlib import Path

import pytest

from tests.mutate_kernels import MUTATIONS, ROOT, mutate

KERNELS = {
    f"{file.stem}.{function}"
    for file in (ROOT / "kernels").glob("*.py")
    for function in re.findall(r"^@triton\.jit.*\ndef (\w+)", Path(file).read_text(), re.MULTILINE)
}


def test_every_kernel_has_at_least_six():
    assert {name: len(pairs) >= 6 for name, pairs in MUTATIONS.items()} == dict.fromkeys(KERNELS, True)


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_changes_its_line(name):
    op, function = name.split(".")
    source = (ROOT / "kernels" / f"{op}.py").read_text()
    for old, new in MUTATIONS[name]:
        assert mutate(source, function, old, new) != source
