"""Boxes with a class, and a score or a person, one a row: in memory, and as the csv files of AVA and of one's own.

A file of one's own begins with a line of column names, `path,second,x1,y1,x2,y2,label` and at most one of score and
person after them, in any order and case; its labels may be names. AVA's files have none: video, second, x1, y1, x2, y2,
class, and an eighth that is the person in annotations and the score in detections.
"""

import csv
import io
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from kernels.launch import check

_AVA = ("video", "second", "x1", "y1", "x2", "y2", "label")
_CORNERS = ("x1", "y1", "x2", "y2")
_BESIDE = ("score", "person")
_HEADER = ("path", *_AVA[1:])
_MARK = b"\xef\xbb\xbf"  # of UTF-8, as spreadsheets write it
_BLOCK = 1 << 25  # bytes read at once: what is held beside the rows themselves
_WRITTEN = 1 << 17  # rows written at once
_TOLERANCE = 1e-3  # corners that were rounded end a little outside of the frame
_MOST = (1 << 31) - 1  # of an id
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_SHOWN = 5  # classes in a message
_PLACES = 5  # decimals of corners and scores in a file


@dataclass(frozen=True, eq=False)
class BoxRows:
    """Columns of N rows. ValueError where they do not fit together.

    names: the videos. video: int [N], the place in names. second: float64 [N]. box: float64 [N, 4] as x1, y1, x2, y2,
    fractions of the frame. label: int [N], the class's id. score: float64 [N]; person: int [N]. classes: the names
    by label, where the file has names.
    """

    names: tuple[Hashable, ...]
    video: np.ndarray
    second: np.ndarray
    box: np.ndarray
    label: np.ndarray
    score: np.ndarray | None = None
    person: np.ndarray | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.video)
        check(self.box.shape == (count, 4), f"box must be [{count}, 4]; got {[*self.box.shape]}")
        for name in ("video", "second", "label", *_BESIDE):
            column = getattr(self, name)
            check(column is None or column.shape == (count,), f"{name} must be [{count}] as video is")
        known = count == 0 or 0 <= self.video.min() <= self.video.max() < len(self.names)
        check(known, f"video must be in [0, {len(self.names)}), the places in names")

    def __len__(self) -> int:
        return len(self.video)


class _Layout(NamedTuple):
    """The columns of a file in their order, the line its rows begin in, and whether labels may be names."""

    columns: tuple[str, ...]
    first: int
    named: bool


def read_rows(
    path: str | Path, *, score: bool | None = None, classes: Mapping[str, int] | Sequence[str] | None = None
) -> BoxRows:
    """The rows of a csv file, in its order.

    score: whether the last of a file without column names is a score; if not, an eighth is a person. With column names
    they say it; True then only demands a score. classes: ids by name, or names whose place is their id; without it,
    names are numbered from 0 in alphabetical order. Names are those of `label` where one of them is no whole number.

    ValueError with the file and the line where it is no such file: another number of columns, what is no number,
    corners outside of [0, 1] by more than 0.001, a score that is not finite, or, without scores, an x2 that is not
    above x1 or a y2 not above y1. Detections may have such a box: the protocol ignores it.
    """
    path = Path(path).expanduser()
    with path.open("rb") as file:
        layout = _layout(path, file, score)
        file.seek(0)
        parts = [_parse(path, layout, *block) for block in _blocks(file, layout.first)]
    check(sum(len(part["second"]) for part in parts) > 0, f"{path} has no rows")
    names, video = _joined([part["video"] for part in parts])
    labels, known = _labels(path, layout, [part["label"] for part in parts], classes)
    beside = {name: _together(parts, name) for name in _BESIDE if name in layout.columns}
    return BoxRows(names, video, _together(parts, "second"), _together(parts, "box"), labels, classes=known, **beside)


def _together(parts: list[dict[str, Any]], name: str) -> np.ndarray:
    """A column of all parts; they let go of theirs, as all of a large file would be held twice."""
    return np.concatenate([part.pop(name) for part in parts])


def _layout(path: Path, file: BinaryIO, score: bool | None) -> _Layout:
    """Which columns a file has, by its first line that is not empty."""
    number, first = 0, b""
    for number, line in enumerate(file, 1):
        first = line.removeprefix(_MARK).strip() if number == 1 else line.strip()
        if first:
            break
    check(first != b"", f"{path} is empty")
    try:
        fields = [name.strip() for name in next(csv.reader([first.decode()]))]
        lower = [name.lower() for name in fields]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}:{number} is no line of boxes: {error}") from error
    if names_columns(fields):
        return _Layout(_named_columns(f"{path}:{number}", lower, score), number + 1, named=True)
    count, wanted = len(fields), f"7 or 8 columns separated by commas, {','.join(_AVA)} and one more"
    check(count in (7, 8), f"{path}:{number} must have {wanted}; it has {count}")
    told = score is not None or count == 7
    first_line = f"begin with a line of column names, {','.join(_HEADER)} and score or person"
    rest = "if the file is AVA's, give its folder (in Python, score=True or False)"
    check(told, f"{path}:{number} has 8 columns without names: {first_line}; {rest}")
    check(count == 8 or not score, f"{path}:{number} must have a score, which is its eighth column; it has 7")
    return _Layout((*_AVA, "score" if score else "person")[:count], number, named=False)


def names_columns(fields: Sequence[str]) -> bool:
    """Whether a file's first line has the names of its columns."""
    return not {"second", "x1"}.isdisjoint(name.strip().lower() for name in fields)


def line_of(path: Path, row: int) -> int:
    """The line, from 1 on, that a row stands in, from 0 on: empty lines and one of column names are no rows."""
    lines = csv_lines(1, path.read_bytes().removeprefix(_MARK))
    first, fields = next(lines)
    rows = lines if names_columns(fields) else itertools.chain([(first, fields)], lines)
    return next(itertools.islice((line for line, _ in rows), row, None))


def _named_columns(where: str, fields: list[str], score: bool | None) -> tuple[str, ...]:
    columns = tuple("video" if name == "path" else name for name in fields)
    right = set(columns) >= set(_AVA) and set(columns) <= {*_AVA, *_BESIDE} and len(set(columns)) == len(columns)
    wanted = f"{','.join(_HEADER)} and at most score and person"
    check(right, f"{where} must name the columns {wanted}; it is `{','.join(fields)[:80]}`")
    check(not score or "score" in columns, f"{where} must name a column score; it is `{','.join(fields)[:80]}`")
    return columns


def _blocks(file: BinaryIO, first: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines from the one of this number on, some MB at once, with the number of each block's first line."""
    for _ in range(first - 1):
        file.readline()
    number, first_bytes = first, file.read(len(_MARK)) if first == 1 else b""
    rest = b"" if first_bytes == _MARK else first_bytes
    while block := file.read(_BLOCK):
        block = rest + block
        end = block.rfind(b"\n") + 1
        rest = block[end:]
        if end:
            yield number, block[:end]
            number += block.count(b"\n", 0, end)
    if rest:
        yield number, rest


def _parse(path: Path, layout: _Layout, number: int, block: bytes) -> dict[str, Any]:
    """The columns of a block; video, and label where it may be a name, as texts and the place of each row's in them."""
    import pandas

    kinds: dict[str, Any] = dict.fromkeys(layout.columns, "float64")
    # a column too many goes into one that must stay empty
    kinds |= {"video": object, "more": object}
    if layout.named:
        kinds["label"] = object
    columns = list(kinds)
    try:
        _check_first(layout, block)
        # "nan" and "NA" are no numbers, and may be videos
        table = pandas.read_csv(
            io.BytesIO(block), header=None, names=columns, dtype=kinds, na_filter=False, index_col=False
        )
        check(not any(pandas.unique(table["more"])), "a line has too many columns")
    except (ValueError, OverflowError, csv.Error) as error:
        raise ValueError(_unreadable(path, layout, number, block, error)) from error
    found: dict[str, Any] = {name: table[name].to_numpy() for name in kinds if kinds[name] is not object}
    whole = [name for name in ("label", "person") if name in found]
    found["box"] = np.stack([found.pop(name) for name in _CORNERS], 1)
    for name in ("video", "label") if layout.named else ("video",):
        codes, texts = pandas.factorize(table[name])
        found[name] = (list(texts), codes.astype(np.int32))
    if (wrong := _wrong_row(found)) is not None:
        row, why = wrong
        raise ValueError(f"{path}:{_line_of(row, number, block)}: {why}")
    return found | {name: found[name].astype(np.int32) for name in whole}


def _check_first(layout: _Layout, block: bytes) -> None:
    """What pandas would let pass: too much in its first line, and a column of True and False alone."""
    fields = next((row for _, row in csv_lines(1, block)), [])
    check(len(fields) in (0, len(layout.columns)), "a line has too many columns")
    check(all(_is_readable(layout, *one) for one in zip(layout.columns, fields, strict=False)), "no number")


def _is_readable(layout: _Layout, name: str, text: str) -> bool:
    is_text = name == "video" or (name == "label" and layout.named)
    return is_text or _NUMBER.fullmatch(text) is not None


def csv_lines(number: int, block: bytes) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not empty, as fields, and their numbers."""
    text = io.TextIOWrapper(io.BytesIO(block), encoding="utf-8", errors="surrogateescape")
    for place, line in enumerate(text, number):
        if line.strip():
            yield place, next(csv.reader([line]), [])


def _unreadable(path: Path, layout: _Layout, number: int, block: bytes, error: Exception) -> str:
    """What is wrong with a block that pandas cannot read, by its first such line."""
    place = number - 1
    try:
        for place, fields in csv_lines(number, block):
            "".join(fields).encode()
            if len(fields) != len(layout.columns):
                return (
                    f"{path}:{place} must have {len(layout.columns)} columns separated by commas; it has {len(fields)}"
                )
            for name, text in zip(layout.columns, fields, strict=True):
                if not _is_readable(layout, name, text):
                    rule = "" if layout.named else f" (the first line may name the columns: {','.join(_HEADER)})"
                    return f"{path}:{place}: {name} must be a number; it is `{text[:80]}`{rule}"
    except UnicodeEncodeError:
        return f"{path}:{place} is no line of boxes: not text in UTF-8"
    except csv.Error as other:
        return f"{path}:{place + 1} is no line of boxes: {other}"
    return f"{path}:{number} and after: {' '.join(str(error).split())}"


def _is_id(text: str) -> bool:
    if _NUMBER.fullmatch(text) is None:
        return False
    value = float(text)
    return value.is_integer() and 0 <= value <= _MOST


def _wrong_row(found: Mapping[str, Any]) -> tuple[int, str] | None:
    """The first row of a block that is wrong, and why."""
    box, names = found["box"], found["video"][0]
    empty = np.array([not name.strip() for name in names], bool)
    second, whole = found["second"], [name for name in ("label", "person") if isinstance(found.get(name), np.ndarray)]
    # written so that what is not finite is wrong
    rules = [
        (~empty[found["video"][1]], "a video", None),
        ((second >= 0) & (second < np.inf), "a finite second of 0 or above", second),
        (((box >= -_TOLERANCE) & (box <= 1 + _TOLERANCE)).all(1), "corners in [0, 1], fractions of the frame", box),
    ]
    if "score" in found:
        rules.append((np.isfinite(found["score"]), "a finite score", found["score"]))
    else:
        rules.append(((box[:, 2:] > box[:, :2]).all(1), "x2 above x1 and y2 above y1", box))
    for name in whole:
        ids = found[name]
        least = 0 if name == "label" else -_MOST
        rules.append(((ids >= least) & (ids <= _MOST) & (ids == np.rint(ids)), f"a whole number as {name}", ids))
    wrong = [(int(right.argmin()), right, what, values) for right, what, values in rules if not right.all()]
    if not wrong:
        return None
    row, right, what, values = min(wrong, key=lambda one: one[0])
    got = "" if values is None else f"; got {', '.join(map(str, np.atleast_1d(values[row]).tolist()))}"
    return row, f"there must be {what}{got}{_also(int((~right).sum()) - 1)}"


def _also(lines: int) -> str:
    """How many more, of those that were read until now."""
    return f" ({lines:,} more line{'s' * (lines > 1)} like that)" if lines else ""


def _line_of(row: int, number: int, block: bytes) -> int:
    return next(place for count, (place, _) in enumerate(csv_lines(number, block)) if count == row)


def _joined(parts: Sequence[tuple[list[str], np.ndarray]]) -> tuple[tuple[str, ...], np.ndarray]:
    """All texts, in the order in which they come first, and int32 [N], the place of each row's among them."""
    places: dict[str, int] = {}
    columns = []
    for texts, codes in parts:
        columns.append(np.array([places.setdefault(text, len(places)) for text in texts], np.int32)[codes])
    return tuple(places), np.concatenate(columns) if columns else np.empty(0, np.int32)


def _labels(
    path: Path, layout: _Layout, parts: list[Any], classes: Mapping[str, int] | Sequence[str] | None
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """int32 [N], the ids, and the classes' names by id where these are known."""
    names = None if classes is None or isinstance(classes, Mapping) else tuple(classes)
    if not layout.named:
        return np.concatenate(parts), names
    texts, codes = _joined(parts)
    bare = [text.strip() for text in texts]
    are_ids = all(_is_id(text) for text in bare)
    if classes is None and not are_ids:
        names = tuple(sorted(set(bare)))
    known = classes if isinstance(classes, Mapping) else {name: number for number, name in enumerate(names or ())}
    ids = [known.get(name, int(float(name)) if _is_id(name) else -1) for name in bare]
    most = len(names) if names is not None else _MOST + 1
    right = np.array([name != "" and 0 <= number < most for name, number in zip(bare, ids, strict=True)], bool)
    if not right.all():
        first = int(right.argmin())
        where = f"{path}:{_line_with(path, layout, texts[first])}"
        also = _also(int((~right[codes]).sum()) - 1)
        raise ValueError(f"{where}: label must be a class; it is `{bare[first][:80]}`{also}{_known(classes)}")
    return np.array(ids, np.int32)[codes], names


def _known(classes: Mapping[str, int] | Sequence[str] | None) -> str:
    if classes is None:
        return ""
    names = list(classes)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    whence = "of classes.txt, the training set or the weights"
    return f"; the classes, {whence}, are {', '.join(names[:_SHOWN])}{more}"


def _line_with(path: Path, layout: _Layout, label: str) -> int:
    column = layout.columns.index("label")
    lines = csv_lines(1, path.read_bytes())
    return next((place for place, fields in lines if place >= layout.first and fields[column] == label), layout.first)


def write_rows(path: str | Path, rows: BoxRows, *, header: bool = False) -> None:
    """Write rows in their order, whole or not at all: AVA's csv (RECIPES H.6), or with a line of column names.

    Whole seconds have four digits, others as many as they need; corners and scores have 5 decimals. Without names of
    columns a person is written where there is no score, as only one of them can be the eighth; with them, both are,
    and classes by name if rows has these. ValueError, before anything is written, for what would not be read back.
    """
    _check_writable(rows, header)
    path = Path(path).expanduser()
    beside = [name for name in _BESIDE if getattr(rows, name) is not None]
    beside = beside if header else beside[:1]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write((",".join((*_HEADER, *beside)) + "\n").encode() if header else b"")
            videos = _texts([_quoted(str(name)) for name in rows.names])
            for start in range(0, len(rows), _WRITTEN):
                file.write(_lines_of(rows, slice(start, start + _WRITTEN), videos, beside, header))

    from videomae.weight_files import write_atomically

    write_atomically(path, write)


def _check_writable(rows: BoxRows, header: bool) -> None:
    check(len(rows) > 0, "there are no rows to write")
    for name in (*rows.names, *((rows.classes or ()) if header else ())):
        check(str(name).strip() != "" and len(str(name).splitlines()) == 1, f"{name!r} is no text of one line")
    named = header and rows.classes is not None
    known = not named or int(rows.label.max()) < len(rows.classes or ())
    check(rows.label.min() >= 0 and known, "labels must be 0 or above, and have names where there are some")
    check(bool(((rows.second >= 0) & (rows.second < np.inf)).all()), "seconds must be finite and not negative")
    inside = (rows.box >= -_TOLERANCE) & (rows.box <= 1 + _TOLERANCE)
    check(bool(inside.all()), "corners must be in [0, 1], fractions of the frame")
    check(rows.score is None or bool((np.abs(rows.score) < 1e9).all()), "scores must be finite, and below 1e9")


def _quoted(text: str) -> bytes:
    # and what would be taken for the mark of an encoding, or for the name of a column
    if any(sign in text for sign in ',"\ufeff') or text != text.strip():
        text = '"' + text.replace('"', '""') + '"'
    return text.encode()


def _lines_of(rows: BoxRows, part: slice, videos: np.ndarray, beside: Sequence[str], header: bool) -> bytes:
    """Lines of text, put together by columns of bytes: 0 stands where a text is shorter than others, and is dropped."""
    named = rows.classes if header else None
    columns = [videos[rows.video[part]], _each(rows.second[part], _second)]
    columns += [_decimals(corner) for corner in rows.box[part].T]
    columns.append(_each(rows.label[part], lambda label: _quoted(named[label]) if named else b"%d" % label))
    for name in beside:
        column = getattr(rows, name)[part]
        columns.append(_decimals(column) if name == "score" else _each(column, lambda person: b"%d" % person))
    comma, end = (np.full((len(columns[0]), 1), ord(sign), np.uint8) for sign in ",\n")
    bytes_of = np.concatenate([x for column in columns for x in (column, comma)][:-1] + [end], 1).reshape(-1)
    return bytes_of[bytes_of != 0].tobytes()


def _texts(texts: Sequence[bytes]) -> np.ndarray:
    """uint8 [N, longest], filled up with 0."""
    table = np.array(texts, np.bytes_)
    return table.view(np.uint8).reshape(len(texts), table.itemsize)


def _each(values: np.ndarray, write: Callable[[Any], bytes]) -> np.ndarray:
    different, place = np.unique(values, return_inverse=True)
    return _texts([write(value) for value in different.tolist()])[place]


def _second(value: float) -> bytes:
    return b"%04d" % int(value) if float(value).is_integer() else repr(float(value)).encode()


def _decimals(values: np.ndarray) -> np.ndarray:
    """The texts of numbers at 5 decimals."""
    units = np.rint(values.astype(np.float64) * 10**_PLACES).astype(np.int64)
    sizes = np.abs(units)
    width = max(len(str(sizes.max())), _PLACES + 1)
    text = np.zeros((len(units), width + 2), np.uint8)
    text[units < 0, 0] = ord("-")
    text[:, -_PLACES - 1] = ord(".")
    for place in range(width):
        # from the right; the whole part has no zeros before it
        digit = sizes // 10**place % 10 + ord("0")
        text[:, -1 - place - (place >= _PLACES)] = digit if place <= _PLACES else digit * (sizes >= 10**place)
    return text
