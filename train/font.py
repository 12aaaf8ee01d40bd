"""The font of pictures: what matplotlib brings, as the imaging library's own has no letters but English ones."""

from functools import cache
from pathlib import Path

from PIL import ImageFont


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """size: pixels."""
    return ImageFont.truetype(_path(), size)


def drawable(text: str) -> str:
    """With a ? for letters that the font has not, as names of files may have."""
    return "".join(letter if letter == "\n" or ord(letter) in _letters() else "?" for letter in text)


def _path() -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _letters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_path())).get_charmap())
