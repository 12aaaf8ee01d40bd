"""Pictures in rows and columns, with words around them: what reconstructions and attention maps are drawn on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from train.font import drawable, font

_GAP, _FONT, _LINE = 6, 12, 16
_NARROWEST = 520  # sheet: notes are read in lines, not in words
_DARK, _PALE = "#000000", "#606060"


class Row(NamedTuple):
    """cells: uint8 [h, w, 3], all of one size, for as many columns. captions: a line below each of them. is_first: of a
    group, with a gap above it."""

    label: str
    cells: Sequence[np.ndarray]
    captions: Sequence[str] = ()
    is_first: bool = False


def fitted(image: np.ndarray, least: int, most: int) -> np.ndarray:
    """uint8 [h, w, 3], enlarged a whole number of times, so that its pixels stay squares, until its short side has at
    least so many; or reduced a whole number of times until its long side has at most so many."""
    height, width = image.shape[:2]
    if min(height, width) < least:
        times = math.ceil(least / min(height, width))
        return image.repeat(times, axis=0).repeat(times, axis=1)
    times = math.ceil(max(height, width) / most)
    # never smaller than what is enlarged
    times = min(times, max(min(height, width) // least, 1))
    return image if times == 1 else np.asarray(Image.fromarray(np.ascontiguousarray(image)).reduce(times))


def draw_strip(title: str, headers: Sequence[str], rows: Sequence[Row], notes: Sequence[str] = ()) -> np.ndarray:
    """The sheet, uint8 [h, w, 3]: a title, a header for each column, the rows with their labels, and lines below; what
    is written may have several lines, and notes are broken into such. Columns are as wide as their headers need."""
    label_width = max(_width_of(row.label) for row in rows) + 2 * _GAP
    captions = [caption for row in rows for caption in row.captions]
    width = max(*(row.cells[0].shape[1] for row in rows), *map(_width_of, [*headers, *captions]))
    wide = max(label_width + len(headers) * (width + _GAP), _width_of(title) + 2 * _GAP, _NARROWEST)
    lefts = [label_width + column * (width + _GAP) for column in range(len(headers))]
    header_top = _GAP + _height_of(title) + _GAP
    top = header_top + max(map(_height_of, headers), default=0) + _GAP
    tops: list[int] = []
    for row in rows:
        top += 2 * _GAP if row.is_first and tops else 0
        tops.append(top)
        top += max(row.cells[0].shape[0] + (_LINE if row.captions else 0), _height_of(row.label)) + _GAP
    below = "\n".join(_broken(note, wide - 2 * _GAP) for note in notes)
    pen = _Pen(wide, top + _height_of(below) + _GAP)
    pen.write(_GAP, _GAP, title, _DARK)
    pen.write(_GAP, top, below, _PALE)
    for left, text in zip(lefts, headers, strict=True):
        pen.write(left, header_top, text, _PALE)
    for row, at in zip(rows, tops, strict=True):
        pen.write(_GAP, at, row.label, _DARK)
        for left, cell in zip(lefts, row.cells, strict=False):
            pen.paste(left, at, cell)
        for left, caption in zip(lefts, row.captions, strict=False):
            pen.write(left, at + row.cells[0].shape[0], caption, _PALE)
    return np.asarray(pen.sheet)


class _Pen:
    """A white sheet to be drawn on."""

    def __init__(self, width: int, height: int) -> None:
        self.sheet = Image.new("RGB", (width, height), "white")
        self._draw = ImageDraw.Draw(self.sheet)

    def write(self, left: int, top: int, text: str, colour: str) -> None:
        for number, line in enumerate(drawable(text).split("\n")):
            self._draw.text((left, top + number * _LINE), line, fill=colour, font=font(_FONT))

    def paste(self, left: int, top: int, image: np.ndarray) -> None:
        self.sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (left, top))


def _height_of(text: str) -> int:
    return (text.count("\n") + 1) * _LINE if text else 0


def _width_of(text: str) -> int:
    return max(math.ceil(font(_FONT).getlength(line)) for line in drawable(text).split("\n"))


def _broken(text: str, width: int) -> str:
    """In lines that are no wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if _width_of(longer) <= width or not lines[-1] else [lines[-1], word]
    return "\n".join(lines)
