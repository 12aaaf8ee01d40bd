"""Pictures of key frames: boxes, and beside them what the model says of each and what was annotated."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from train.font import drawable, font

# of the boxes, in turn; told apart on most pictures, and by those who tell red from green badly
_COLOURS = ("#ffb000", "#00b4d8", "#ff5d8f", "#8ac926", "#c77dff", "#ff7b00", "#2ec4b6", "#ffffff")
_LEAST, _GAP, _FONT = 448, 6, 13


class Boxed(NamedTuple):
    """One box of a key frame. box: fractions (x1, y1, x2, y2). best: classes with their scores, the likeliest first.
    annotated: its classes; None where nobody said."""

    box: np.ndarray
    best: Sequence[tuple[str, float]]
    annotated: Sequence[str] | None = None


def draw_boxes(image: np.ndarray, boxed: Sequence[Boxed], title: str) -> Image.Image:
    """The key frame, uint8 [h, w, 3], with numbered boxes, and below it a line or two for each. A small one is
    enlarged."""
    scale = max(_LEAST / max(image.shape[:2]), 1.0)
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    frame = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    lines = [line for number, one in enumerate(boxed) for line in _lines(number, one, size[0])]
    line_height = _FONT + 4
    sheet = Image.new("RGB", (size[0], line_height + 2 * _GAP + size[1] + _GAP + line_height * len(lines)), "#202020")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), _shortened(title, size[0]), fill="white", font=font(_FONT))
    top = line_height + 2 * _GAP
    sheet.paste(frame, (0, top))
    for number, one in enumerate(boxed):
        _draw_box(pen, number, one, top, size)
    for place, (text, colour) in enumerate(lines):
        pen.text((_GAP, top + size[1] + _GAP + place * line_height), text, fill=colour, font=font(_FONT))
    return sheet


def _draw_box(pen: ImageDraw.ImageDraw, number: int, one: Boxed, top: int, size: tuple[int, int]) -> None:
    x1, y1, x2, y2 = (float(side) * length for side, length in zip(one.box, (*size, *size), strict=True))
    colour = _COLOURS[number % len(_COLOURS)]
    pen.rectangle((x1, top + y1, max(x2 - 1, x1), top + max(y2 - 1, y1)), outline=colour, width=2)
    label = f"{number + 1} {one.best[0][0]} {one.best[0][1]:.2f}" if one.best else str(number + 1)
    label = _shortened(label, size[0] - 4)
    width = pen.textlength(label, font=font(_FONT)) + 4
    # inside the picture, also for a box at its edge
    height = _FONT + 4
    upper = y1 - height
    if upper < 0:
        # over a box that is large enough; else below it, where there is room
        is_flat = y2 - y1 < 2 * height and y2 + height <= size[1]
        upper = y2 if is_flat else 0
    left, upper = min(x1, size[0] - width), top + upper
    pen.rectangle((left, upper, left + width, upper + height), fill=colour)
    pen.text((left + 2, upper + 1), label, fill="black", font=font(_FONT))


def _lines(number: int, one: Boxed, width: int) -> list[tuple[str, str]]:
    """Text and colour."""
    said = ", ".join(f"{name} {score:.2f}" for name, score in one.best) or "nothing"
    lines = [(_shortened(f"{number + 1}  {said}", width), _COLOURS[number % len(_COLOURS)])]
    if one.annotated is not None:
        truth = ", ".join(one.annotated) or "nothing"
        lines.append((_shortened(f"    annotated: {truth}", width), "#b0b0b0"))
    return lines


def _shortened(text: str, width: int) -> str:
    """With an ellipsis where it is wider than the picture."""
    text = drawable(text.replace("\n", "?"))
    while text and font(_FONT).getlength(text) > width - 2 * _GAP:
        text = text[:-4] + "..." if len(text) > 4 else ""
    return text
