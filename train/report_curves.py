"""Curves as inline SVG: thinned so that spikes stay, with axes, and the values that a hovering pointer is told."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from kernels.launch import check

_BINS = 400  # of a long curve; its least and greatest values are drawn for each: 800 points
LONGEST = 2 * _BINS  # points of a curve without bins
_WIDTH, _HEIGHT = 400, 220  # units of the drawing; a page shows it at about that many pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 30
# an axis that may be logarithmic is so when its greatest value is so many times what all but two per cent stay below
_SPIKE, _USUAL = 4, 0.98
_DOTS = 60  # a curve of so few points shows them
_FARTHEST = 1e300  # an axis reaches no farther: a diverged run's values may be the greatest floats
COLOURS = 8  # of the style; further curves take them again, dashed


class Thinned(NamedTuple):
    """A curve as it is drawn, float64 [n] each. middle: the value, or the median of a bin's; low and high: the least
    and the greatest. A bin without a number is nan: a gap. is_binned: whether there are bins."""

    steps: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray
    is_binned: bool


class Curve(NamedTuple):
    """One line of a chart."""

    label: str
    steps: np.ndarray
    values: np.ndarray  # nan where there is no number
    colour: int  # counted from 0


class Axis(NamedTuple):
    """Values from the drawing's lower edge to its upper one, and those with a line."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """0 at the lower edge, 1 at the upper."""
        if self.is_log:
            values = np.log10(np.maximum(values, 1e-300))
            low, high = math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return (values - low) / (high - low)


def thin(steps: np.ndarray, values: np.ndarray) -> Thinned:
    """Up to LONGEST points as they are; of more, each bin's median, least and greatest."""
    values = np.where(np.isfinite(values), values, np.nan)
    if len(steps) <= LONGEST:
        return Thinned(steps, values, values, values, False)
    edges = np.linspace(0, len(steps), _BINS + 1).astype(np.int64)
    parts = [values[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    parts = [part[np.isfinite(part)] for part in parts]

    def of_each(what: np.ufunc | type) -> np.ndarray:
        return np.array([what(part) if len(part) else np.nan for part in parts])

    middle, low, high = (of_each(function) for function in (np.median, np.min, np.max))  # type: ignore[arg-type]
    # a bin stands for its last step: the curve ends where the run does
    return Thinned(steps[edges[1:] - 1], middle, low, high, True)


def axis(values: np.ndarray, *, zero: bool = False, log: bool = False, most: float | None = None) -> Axis:
    """For finite values. zero: it begins there; log: it may be logarithmic, when few values are far above all others;
    most: its end, of a share or per cent."""
    if not len(values):
        return Axis(0.0, 1.0, (0.0, 0.5, 1.0))
    low, high = (min(max(float(value), -_FARTHEST), _FARTHEST) for value in (values.min(), values.max()))
    if log and low > 0 and high > _SPIKE * float(np.quantile(values, _USUAL, method="lower")):
        return Axis(low / 1.2, high * 1.2, _powers(low, high), True)
    if zero:
        low = min(low, 0.0)
    if most is not None:
        high = max(high, most)
    if high <= low:
        margin = abs(high) / 10 or 1.0
        low, high = low - (0 if zero and low == 0 else margin), high + margin
    margin = 0.05 * (high - low)
    step = _nice(max((high - low) / 5, 1 / _FARTHEST))
    low, high = low - (0 if zero and low == 0 else margin), high + (0 if most is not None else margin)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(n * step for n in range(first, last + 1)))


def _powers(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten, a few, and where there are hardly any twice and five times these."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0,)
    every = max(math.ceil((last - first) / 5), 1)
    return tuple(factor * 10.0**n for n in range(first, last + 1, every) for factor in factors)


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, not below."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def number_text(value: float) -> str:
    """Five digits at most, as in a table: 0.29489, 1,234, 1.3e-05."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        text = f"{value:,.0f}" if abs(value) >= 1e4 or value == int(value) else f"{value:,.{_digits(value)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.4g}"


def _digits(value: float) -> int:
    return max(4 - math.floor(math.log10(abs(value))), 0)


def _tick_text(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def draw(
    curves: Sequence[Curve],
    vertical: Axis,
    *,
    title: str,
    marks: Sequence[tuple[float, str, str]] = (),
) -> str:
    """An SVG element. marks: steps with a line of their own: the step, its class and what it says."""
    check(len(curves) > 0, "a chart needs a curve")
    thinned = [thin(curve.steps, curve.values) for curve in curves]
    last = max([float(kept.steps[-1]) for kept in thinned if len(kept.steps)], default=0.0)
    horizontal = axis(np.array([0.0, max(last, 1.0)]), zero=True, most=max(last, 1.0))
    lines = [_grid(vertical, horizontal), _marks(marks, horizontal)]
    lines += [_line(curve, kept, vertical, horizontal) for curve, kept in zip(curves, thinned, strict=True)]
    said = "; ".join(_said(curve) for curve in curves[:COLOURS])
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}. {said}")}" '
        f'data-area="{_LEFT} {_WIDTH - _RIGHT} {_WIDTH}" data-last="{horizontal.high:g}">'
        + "".join(lines)
        + f'<line class="pointer" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" visibility="hidden"/></svg>'
    )


def _x(steps: np.ndarray, horizontal: Axis) -> np.ndarray:
    return _LEFT + horizontal.place(steps) * (_WIDTH - _LEFT - _RIGHT)


def _y(values: np.ndarray, vertical: Axis) -> np.ndarray:
    # a value below a logarithmic axis stays in the picture
    return _HEIGHT - _BOTTOM - np.clip(vertical.place(values), -0.01, 1.02) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(vertical: Axis, horizontal: Axis) -> str:
    out = []
    for value in vertical.ticks:
        y = float(_y(np.array([value]), vertical)[0])
        if _TOP - 1 <= y <= _HEIGHT - _BOTTOM + 1:
            out.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick_text(value)}</text>')
    bottom = _HEIGHT - _BOTTOM
    for value in horizontal.ticks:
        x = float(_x(np.array([value]), horizontal)[0])
        anchor = "end" if x > _WIDTH - _RIGHT - 8 else "middle"
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{_tick_text(value)}</text>')
    out.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">step</text>')
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    return "".join(out)


def _marks(marks: Sequence[tuple[float, str, str]], horizontal: Axis) -> str:
    out = []
    for step, kind, text in marks:
        x = float(_x(np.array([step]), horizontal)[0])
        out.append(
            f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
            f"<title>{escape(text)}</title></line>"
        )
    return "".join(out)


def _line(curve: Curve, kept: Thinned, vertical: Axis, horizontal: Axis) -> str:
    colour = f"c{curve.colour % COLOURS}" + (" dashed" if curve.colour // COLOURS % 2 else "")
    x = _x(kept.steps, horizontal)
    y = _y(kept.middle, vertical)
    there = np.isfinite(kept.middle)
    out = []
    if kept.is_binned:
        # a bin's least and greatest value as an upright line, one after another: a band
        band = zip(x[there], _y(kept.low[there], vertical), _y(kept.high[there], vertical), strict=True)
        out.append(f'<path class="band" d="{"".join(f"M{a:.1f} {b:.1f}V{c:.1f}" for a, b, c in band)}"/>')
    out.append(f'<path d="{_path(x, y)}"/>')
    if len(kept.steps) <= _DOTS:
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2"/>' for a, b in zip(x[there], y[there], strict=True)]
    columns = [kept.middle[there]] + ([kept.low[there], kept.high[there]] if kept.is_binned else [])
    points = [[f"{step:.0f}" for step in kept.steps[there]], *([f"{v:.4g}" for v in column] for column in columns)]
    data = "[" + ",".join(f"[{','.join(map(_json, column))}]" for column in points) + "]"
    return f'<g class="{colour}" data-label="{escape(curve.label)}" data-points="{data}">{"".join(out)}</g>'


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line through the points, with a gap at every nan."""
    out, pen_up = [], True
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(b):
            out.append(f"{'M' if pen_up else 'L'}{a:.1f} {b:.1f}")
        pen_up = not math.isfinite(b)
    return "".join(out)


def _json(text: str) -> str:
    return json.dumps(float(text) if "." in text or "e" in text else int(text))


def _said(curve: Curve) -> str:
    """For those who do not see it."""
    kept = np.isfinite(curve.values)
    if not kept.any():
        return f"{curve.label}: no value"
    values, steps = curve.values[kept], curve.steps[kept]
    return (
        f"{curve.label}: {number_text(values[0])} at step {steps[0]:,.0f}, {number_text(values[-1])} at step "
        f"{steps[-1]:,.0f}, from {number_text(values.min())} to {number_text(values.max())}"
    )
