"""What the fuzzing feeds: originals that parse, changed by hypothesis in bytes, words or JSON values."""

import io
import json
import re
import zipfile
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

NUMBERS = (
    "0",
    "1",
    "-1",
    "7",
    "0902",
    "0.5",
    "-0.25",
    "1e9",
    "1e400",
    "-1e400",
    "nan",
    "inf",
    "1_000",
    "0x10",
    "٣",
    "²",
)
NUMBERS += ("2147483648", "9223372036854775808", "18446744073709551616", "9" * 400, "9" * 5000, "")
WORDS = (
    "a",
    "a.mp4",
    "../x.mp4",
    "../../outside/secret",
    "/etc/passwd",
    "a\0b",
    "\0",
    "x" * 5000,
    "ä",
    "\ufeff",
    " ",
    "-",
)
WORDS += (
    '"',
    '"a',
    '""',
    "a,b",
    "\r",
    "\u2028",
    "\x1c",
    "NaN",
    "True",
    "None",
    "path",
    "second",
    "label",
    "score",
    "{}",
)
WORDS += (
    "y" * 140_000,
    "~",
    "~nobody/x",
    "$HOME",
    "`id`",
    "$(id)",
    "; id",
    "%s%n",
    "{0.__class__}",
    "CON",
    "a/b/c",
    "s3://bucket/k.mp4",
    "https://h/a.mp4",
    "file:///etc/passwd",
    "x.tar::k@0",
    "x/files::../../outside/secret",
    ".",
    "..",
    "::",
    "@",
)
_BYTES = (
    b"\0",
    b"\xff",
    b"\xff\xfe",
    b"\x80",
    b"\n",
    b"\r\n",
    b'"',
    b",",
    b"[",
    b"{",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
)
# torch searches its own messages, which quote these, in a time that grows with their square
_BYTES += (b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 64, b"A" * 9000, b"[" * 5000, b'{"a":' * 4000, b" " * 9000)
# what json.dumps cannot write, or only slowly
_MARKS = {
    "@deep": "[" * 20_000 + "]" * 20_000,
    "@open": "[" * 20_000,
    "@long": "9" * 5000,
    "@half": "1" * 40 + "e400000",
}

words = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers().map(str), st.text(max_size=8))
_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**33, 2**40, 2**63, -(2**63), 2**64, 10**400]),
    st.floats(),
    st.sampled_from(WORDS),
    st.sampled_from(tuple(_MARKS)),
    st.text(max_size=5),
)
values = st.recursive(
    _leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def changed_bytes(draw, original: bytes) -> bytes:
    """Flipped, cut, spliced, overwritten or lengthened, one to three times."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(("flip", "flip", "set", "cut", "splice", "insert", "overwrite", "remove")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "splice":
            start, size = draw(st.integers(0, len(data))), draw(st.integers(0, 64))
            data[at : at + draw(st.integers(0, 64))] = data[start : start + size]
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            piece = draw(st.sampled_from(_BYTES))
            data[at : at + (len(piece) if kind == "overwrite" else 0)] = piece
    return bytes(data)


@st.composite
def changed_words(draw, original: str) -> bytes:
    """With one to three of its words or numbers replaced, or one of its lines repeated, dropped or lengthened."""
    text = original
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)) == 0:
            lines = text.split("\n")
            at = draw(st.integers(0, len(lines) - 1))
            lines[at : at + 1] = draw(
                st.sampled_from(([], [lines[at]] * 2, [lines[at] + ",1"], [lines[at] + " 1"], [""]))
            )
            text = "\n".join(lines)
        elif spans := [found.span() for found in re.finditer(r"[^,\s/:]+", text)]:
            start, end = draw(st.sampled_from(spans))
            text = text[:start] + draw(words) + text[end:]
    return as_bytes(text)


# nothing but hostile words in rows
tables = st.builds(
    lambda rows, sign: as_bytes("\n".join(sign.join(row) for row in rows)),
    st.lists(st.lists(words, max_size=9), max_size=6),
    st.sampled_from((",", " ", "\t", "/", ": ")),
)


def changed_text(original: str) -> st.SearchStrategy[bytes]:
    return st.one_of(changed_words(original), changed_words(original), changed_bytes(as_bytes(original)), tables)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where a JSON document has values, as tuples of keys; the whole is ()."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in _places(below, (*path, key)))]


def _with(value: Any, path: tuple, new: Any, *, drop: bool) -> Any:
    if not path:
        return new
    value = value.copy()
    if drop and len(path) == 1:
        del value[path[0]]
    else:
        value[path[0]] = _with(value[path[0]], path[1:], new, drop=drop)
    return value


def json_text(document: Any) -> str:
    text = json.dumps(document)
    for mark, meant in _MARKS.items():
        text = text.replace(f'"{mark}"', meant)
    return text


@st.composite
def changed_values(draw, original: Any) -> Any:
    """A JSON document of which one to three values are replaced or dropped."""
    document = original
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(document)))
        document = _with(document, place, draw(values), drop=draw(st.integers(0, 4)) == 0)
    return document


def changed_json(original: Any) -> st.SearchStrategy[bytes]:
    changed = changed_values(original).map(lambda document: as_bytes(json_text(document)))
    return st.one_of(changed, changed, changed_bytes(as_bytes(json.dumps(original))))


def changed_lines(rows: list[Any]) -> st.SearchStrategy[bytes]:
    """Of a file with a JSON document a line."""
    changed = changed_values(rows).map(
        lambda new: as_bytes("\n".join(map(json_text, new)) if isinstance(new, list) else json_text(new))
    )
    return st.one_of(changed, changed, changed_bytes(as_bytes("\n".join(map(json.dumps, rows)))))


def changed_zip(original: bytes, member: str, change: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """PyTorch's file with another member of that name's end, its sums right."""
    with zipfile.ZipFile(io.BytesIO(original)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]

    def packed(new: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for name, data in members:
                archive.writestr(name, new if name.endswith(member) else data)
        return out.getvalue()

    return change.map(packed)


def one_changed(files: Mapping[str, st.SearchStrategy[bytes]]) -> st.SearchStrategy[dict[str, bytes | None]]:
    """Of several files one or two are changed, or missing (None); the others stay as they are."""
    one = st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), _or_none(files[name])))
    return st.lists(one, min_size=1, max_size=2).map(dict)


def _or_none(strategy: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes | None]:
    return st.integers(0, 19).flatmap(lambda n: st.none() if n == 0 else strategy)
