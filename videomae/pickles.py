"""A look at a pickle before it is loaded: what would hold, or fill, the machine is refused.

torch.load with weights_only=True runs no code of a file, and can yet be held by it. It searches its own message, which
quotes the file, in a time that grows with the message's square: 80 s for a name of 100 kB. A tuple that holds the one
before it twice, 40 times over, is a few hundred bytes, and 2^40 steps to hash. Python's punycode takes 40 s for 60 kB.
Here opcodes are followed, and only counted: 1.5 us each, some 30 for every tensor of a checkpoint.
"""

import mmap
import pickletools
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

from kernels.launch import check

_OPCODES = 1 << 20  # 30,000 tensors' worth, and 2 s to look at
_TAKEN = 1 << 25  # values that all steps together may take, each with what is in it
_NAME = 200  # characters of module and name
_LEGACY = 5  # pickles at the head of a file from before PyTorch 1.6
_DTYPE = 3  # characters: f8, c16
_LATIN = ("latin1", "latin-1")  # how pickles of protocol 2 say bytes
_ENCODE, _BYTEARRAY, _NUMPY_DTYPE = "_codecs.encode", "builtins.bytearray", "numpy.dtype"


def check_file(path: Path) -> None:
    """ValueError where the pickles in a file that torch.save wrote would hold whoever loads it."""
    with open(path, "rb") as file:
        check(file.read(1) != b"", "it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] == b"PK\x03\x04":
                check_pickle(_in_zip(path))
                return
            # older files are pickles one after another, then numbers; a map never reads past its end
            for _ in range(_LEGACY):
                check_pickle(data)


def _in_zip(path: Path) -> BytesIO:
    """The pickle that torch.load will find."""
    try:
        with ZipFile(path) as archive:
            # torch.save never packs: a megabyte could become a thousand
            stored = all(one.compress_type == ZIP_STORED for one in archive.infolist())
        check(stored, "its parts are packed")
        # torch's own reader, which may understand a damaged file otherwise than Python's
        return BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
    except (BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(f"it is no whole archive: {str(error)[:_NAME]}") from error


class _Value:
    """What is known of a value: how many it is made of, itself included, and where it comes from."""

    __slots__ = ("held", "items", "literal", "made_by", "name", "size")

    def __init__(self, size: int = 1, literal: Any = None, *, name: str = "", made_by: str = "") -> None:
        self.size, self.literal = size, literal
        self.name, self.made_by = name, made_by  # of a global; of what a global made
        self.items: tuple[_Value, ...] = ()  # of a tuple
        self.held = False  # by another value


_MARK = _Value()
_CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_CALLS = ("REDUCE", "NEWOBJ", "NEWOBJ_EX")
_GETS, _PUTS = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT")


def check_pickle(file: Any) -> None:
    """Look at the next pickle of a file in memory (BytesIO or mmap). Raises ValueError where it is damaged or would
    cost out of proportion."""
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            check(number < _OPCODES, f"it has more than {_OPCODES:,} steps")
            machine.step(opcode, argument)
    except (IndexError, KeyError) as error:
        raise ValueError("it takes what was never there") from error


class _Machine:
    """The stack and memo of a pickle, of values that are only counted."""

    def __init__(self) -> None:
        self._stack: list[_Value] = []
        self._memo: dict[int, _Value] = {}
        self._taken = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name, stack = opcode.name, self._stack
        if name == "MARK":
            stack.append(_MARK)
        elif name in _GETS:
            stack.append(self._memo[argument])
        elif name in _PUTS:
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            self._name(opcode, argument)
        elif name in _CALLS:
            self._call(opcode)
        elif name in _CHANGES:
            self._change(opcode)
        else:
            items = self._take(opcode)
            if opcode.stack_after:
                made = _Value(1 + sum(item.size for item in items), argument)
                made.items = items if "TUPLE" in name else ()
                stack.append(made)

    def _take(self, opcode: pickletools.OpcodeInfo, but: int = 0) -> tuple[_Value, ...]:
        """What the step takes off the stack, without the first few that it is declared to."""
        stack, wanted = self._stack, opcode.stack_before[but:]
        taken: list[_Value] = []
        if pickletools.stackslice in wanted:
            while (one := stack.pop()) is not _MARK:
                taken.append(one)
            wanted = wanted[: wanted.index(pickletools.markobject)]
        taken += [stack.pop() for _ in wanted]
        self._taken += sum(one.size for one in taken)
        check(self._taken <= _TAKEN, "its values hold each other too often")
        for one in taken:
            check(one is not _MARK, "its marks are not in order")
            one.held = True
        return tuple(reversed(taken))

    def _name(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        words = argument.split(" ") if opcode.name != "STACK_GLOBAL" else [one.literal for one in self._take(opcode)]
        if opcode.name == "INST":
            self._take(opcode)
        named = ".".join(map(str, words))
        check(len(named) <= _NAME, f"it names something of {len(named):,} characters")
        self._stack.append(_Value(name=named))

    def _call(self, opcode: pickletools.OpcodeInfo) -> None:
        callee, *arguments = self._take(opcode)
        # torch quotes whatever else is called
        check(callee.name != "", "it calls what is no name")
        given = arguments[0].items
        if callee.name == _ENCODE:
            right = len(given) == 2 and given[1].literal in _LATIN
            check(right, f"it calls {_ENCODE} for other than bytes")
        check(callee.name != _BYTEARRAY, f"it holds {_BYTEARRAY}")
        if callee.name == _NUMPY_DTYPE:
            first = given[0].literal if given else None
            check(isinstance(first, str) and len(first) <= _DTYPE, "it holds a NumPy type that is no number's")
        size = callee.size + sum(one.size for one in arguments)
        self._stack.append(_Value(size, made_by=callee.name))

    def _change(self, opcode: pickletools.OpcodeInfo) -> None:
        items, target = self._take(opcode, but=1), self._stack[-1]
        # whoever holds it has counted it; pickles finish a value before they put it into another
        check(not target.held and target is not _MARK, "it changes a value that another holds")
        if target.made_by == _NUMPY_DTYPE:
            numbers = [one.literal for state in items for one in state.items if isinstance(one.literal, int)]
            check(all(-64 <= number <= 64 for number in numbers), "it holds a NumPy type that is no number's")
        target.size += sum(one.size for one in items)
