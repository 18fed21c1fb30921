"""Plots as inline SVG, and feature maps as small pictures.

A plot has a title, units, a text alternative, and a tip for each mark (`data-tip`). Colours are classes (`teacher`,
`baseline`, `student`, `int8`), which the page's style sheet fills in for light, dark and paper. Every text goes through
`escape`. A picture of a map has one tile for each channel: zero is white, positive orange, negative blue.

Shapes: C channels, H x W the map.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 38
LABEL_HEIGHT = 15
"""Least distance of two labels, in the plot's own pixels."""

POSITIVE, NEGATIVE = (194, 65, 12), (29, 78, 216)
"""Colours of the largest and the smallest value."""

SIDE = 96
"""Photographs are shown at most this large, in pixels."""

_ids = count()


@dataclass(frozen=True)
class Point:
    """A labelled mark."""

    label: str
    kind: str
    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies, in pixels."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values inside."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them.

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`; of many, the powers alone.

    >>> log_ticks(0.9, 21)
    [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [value for value in found if low <= value <= high]
    return inside if len(inside) <= 6 else [v for v in inside if math.log10(v) == round(math.log10(v))] or inside[::3]


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str, most: float = math.inf) -> Markup:
    """Labelled marks, each kind in a shape of its own. A wide range of x is shown in a logarithmic scale.

    Args:
        title: what it shows.
        points: the marks.
        x_label: name and unit.
        y_label: name and unit.
        most: largest y that there can be.
    """
    xs, ys = [point.x for point in points], [point.y for point in points]
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    low_y, high_y = _room(min(ys), max(ys), 0.15, 0.02 * max(map(abs, ys)) or 1.0)
    low_y = max(low_y, 0.0) if min(ys) >= 0 else low_y
    if log:
        x_axis = Axis(min(xs) / 1.5, max(xs) * 2.5, LEFT, WIDTH - RIGHT, log=True)
    else:
        x_axis = Axis(0, max(xs) * 1.25, LEFT, WIDTH - RIGHT)
    y_axis = Axis(low_y, min(high_y, most), HEIGHT - BOTTOM, TOP)
    parts = _frame(x_axis, y_axis, x_label + (" (logarithmic)" if log else ""), y_label)
    ordered = sorted(points, key=lambda point: -point.y)
    places = _apart([y_axis(point.y) for point in ordered], TOP + 6, HEIGHT - BOTTOM - 6)
    for point, label_y in zip(ordered, places, strict=True):
        x, y = x_axis(point.x), y_axis(point.y)
        right_of_it = [x_axis(other.x) - x for other in points if abs(y_axis(other.y) - y) < LABEL_HEIGHT]
        left = x > 0.62 * WIDTH or (x > 0.3 * WIDTH and any(4 < gap < 70 for gap in right_of_it))
        text_x, anchor = (x - 11, "end") if left else (x + 11, "start")
        if abs(label_y - y) > 3:
            parts.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{text_x:.1f}" y2="{label_y:.1f}"/>')
        parts.append(
            f'<g class="{point.kind}" tabindex="0" data-tip="{escape(point.tip)}">{_mark(point.kind, x, y)}'
            f'<text class="name" x="{text_x:.1f}" y="{label_y + 4:.1f}" text-anchor="{anchor}">'
            f"{escape(point.label)}</text></g>"
        )
    told = "; ".join(point.tip for point in ordered)
    return _figure(title, f"{y_label} against {x_label}. {told}", parts)


def lines(
    title: str,
    series: Mapping[str, tuple[str, Sequence[float | None]]],
    y_label: str,
    *,
    level: tuple[str, str, float] | None = None,
    digits: int = 3,
    from_zero: bool = True,
) -> Markup:
    """Curves over passes 1, 2, 3, ...

    Args:
        title: what it shows.
        series: label -> (class, one value a pass; None where there is none).
        y_label: name and unit.
        level: label, class and value of a horizontal line.
        digits: of a value in a tip.
        from_zero: let the scale begin at 0.
    """
    passes = max(len(values) for _, values in series.values())
    known = [value for _, values in series.values() for value in values if value is not None]
    known += [level[2]] if level else []
    low, high = _room(min(known), max(known), 0.08, 1e-9)
    y_axis = Axis(0 if from_zero else low, high, HEIGHT - BOTTOM, TOP + LABEL_HEIGHT * ((len(series) + 2) // 2))
    x_axis = Axis(1 if passes > 1 else 0, max(passes, 2), LEFT, WIDTH - RIGHT)
    parts = _frame(x_axis, y_axis, "pass", y_label)
    if level:
        y = y_axis(level[2])
        parts.append(f'<line class="{level[1]} level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for kind, values in series.values():
        placed = [(x_axis(place), y_axis(v)) for place, v in enumerate(values, 1) if v is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if len(placed) <= 40:
            parts += [f'<circle class="{kind} dot" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in placed]
    names = [(label, kind) for label, (kind, _) in series.items()] + (
        [(level[0], level[1] + " level")] if level else []
    )
    parts += _legend(names)
    parts += _hover(x_axis, passes, series, digits)
    last = "; ".join(_first_and_last(label, values, digits) for label, (_, values) in series.items())
    ends = f"{y_label} over {passes} pass(es). {last}" + (f"; {level[0]}: {level[2]:.{digits}g}" if level else "")
    return _figure(title, ends, parts)


def _first_and_last(label: str, values: Sequence[float | None], digits: int) -> str:
    """A curve in words. It need not have a value for every pass.

    >>> _first_and_last("student", [None, 50.0, None, 60.0], 3)
    'student: 50 after pass 2, 60 after pass 4'
    """
    known = [(place, value) for place, value in enumerate(values, 1) if value is not None]
    ends = dict.fromkeys([known[0], known[-1]]) if known else {}
    return f"{label}: " + (", ".join(f"{_number(v, digits)} after pass {place}" for place, v in ends) or "no value")


def bars(title: str, values: Sequence[float], x_label: str, y_label: str, kind: str = "student") -> Markup:
    """One bar a place, in the order given."""
    y_axis = Axis(0, max(*values, 1e-9) * 1.1, HEIGHT - BOTTOM, TOP)
    x_axis = Axis(0, len(values), LEFT, WIDTH - RIGHT)
    parts = _frame(x_axis, y_axis, x_label, y_label)
    width = (WIDTH - RIGHT - LEFT) / len(values)
    for place, value in enumerate(values):
        y = y_axis(value)
        box = f'x="{x_axis(place) + width * 0.1:.1f}" y="{y:.1f}" width="{width * 0.8:.2f}"'
        tip = f"{x_label.split(',', maxsplit=1)[0]} {place + 1}: {value:.3g}"
        parts.append(f'<rect class="{kind} bar" {box} height="{HEIGHT - BOTTOM - y:.1f}" data-tip="{escape(tip)}"/>')
    told = f"{y_label} from {min(values):.3g} to {max(values):.3g} over {len(values)} bars"
    return _figure(title, told, parts)


def heat(title: str, values: Sequence[Sequence[float]], unit: str) -> Markup:
    """A map of numbers: the larger, the fuller the colour."""
    rows, columns = len(values), len(values[0])
    low, high = min(map(min, values)), max(map(max, values))
    side = min((WIDTH - LEFT - RIGHT) / columns, (HEIGHT - 50) / rows)
    left = (WIDTH - side * columns) / 2
    parts = []
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            strength = 0.08 + 0.92 * (value - low) / max(high - low, 1e-12)
            tip = f"row {y + 1}, column {x + 1}: {value:.3g} {unit}"
            box = f'x="{left + x * side:.1f}" y="{TOP + y * side:.1f}" width="{side:.2f}" height="{side:.2f}"'
            parts.append(f'<rect class="student heat" {box} fill-opacity="{strength:.2f}" data-tip="{escape(tip)}"/>')
    key = f"palest {low:.3g}, fullest {high:.3g} ({unit})"
    parts.append(f'<text class="label" x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(key)}</text>')
    return _figure(title, f"{rows} by {columns} places, from {low:.3g} to {high:.3g} {unit}", parts)


def dumbbell(values: Sequence[tuple[str, float]], low: float) -> Markup:
    """Marks of several networks on one line from `low` to 100 %, for a row of a table (whose cells say the numbers)."""
    axis = Axis(low, 100, 6, 154)
    places = [axis(value) for _, value in values]
    span = f'<line class="lead" x1="{min(places):.1f}" x2="{max(places):.1f}" y1="9" y2="9"/>'
    marks = "".join(f'<g class="{kind}">{_mark(kind, axis(value), 9, 4)}</g>' for kind, value in values)
    return Markup(
        f'<svg class="row" viewBox="0 0 160 18" width="160" height="18" aria-hidden="true">{span}{marks}</svg>'
    )


# -- parts


def _figure(title: str, alternative: str, parts: Sequence[str]) -> Markup:
    name = f"plot{next(_ids)}"
    inside = "".join(parts)
    return Markup(
        f'<figure class="plot"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}t {name}d">'
        f'<title id="{name}t">{escape(title)}</title><desc id="{name}d">{escape(alternative)}</desc>'
        f"{inside}</svg></figure>"
    )


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[str]:
    """Grid, ticks and names of the axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value in x_axis.ticks():
        if x_label == "pass" and value != int(value):
            continue
        x = x_axis(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{_tick(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turn = f'transform="translate(10 {(TOP + bottom) / 2:.0f}) rotate(-90)"'
    parts.append(f'<text class="label" {turn} text-anchor="middle">{escape(y_label)}</text>')
    return parts


def _legend(names: Sequence[tuple[str, str]]) -> list[str]:
    """Line samples with their names, two a row, above the curves."""
    parts = []
    for place, (label, kind) in enumerate(names):
        x, y = LEFT + 6 + (place % 2) * (WIDTH - LEFT) / 2, TOP + 4 + place // 2 * LABEL_HEIGHT
        parts.append(f'<line class="{kind} sample" x1="{x:.0f}" x2="{x + 16:.0f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="label" x="{x + 21:.0f}" y="{y + 4}">{escape(label)}</text>')
    return parts


def _hover(
    x_axis: Axis, passes: int, series: Mapping[str, tuple[str, Sequence[float | None]]], digits: int
) -> list[str]:
    """A column over each pass, whose tip has all values."""
    half = (x_axis.end - x_axis.start) / max(passes - 1, 1) / 2
    parts = []
    for place in range(passes):
        values = [
            f"{label} {_number(values[place], digits)}"
            for label, (_, values) in series.items()
            if place < len(values) and values[place] is not None
        ]
        if not values:
            continue
        tip = f"pass {place + 1}: " + ", ".join(values)
        left = max(x_axis(place + 1) - half, x_axis.start)
        width = min(x_axis(place + 1) + half, x_axis.end) - left
        parts.append(
            f'<rect class="hover" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}" '
            f'data-tip="{escape(tip)}"/>'
        )
    return parts


def _mark(kind: str, x: float, y: float, size: float = 5.5) -> str:
    """Circle, square, diamond or triangle: kinds differ without colour too."""
    a, b, c = 1.3 * size, 2.3 * size, 2.6 * size
    if kind == "teacher":
        return f'<rect class="mark" x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"/>'
    if kind == "baseline":
        return f'<path class="mark" d="M{x:.1f} {y - a:.1f}l{a:.1f} {b:.1f}h{-c:.1f}z"/>'
    if kind == "int8":
        return f'<path class="mark" d="M{x:.1f} {y - a:.1f}l{a:.1f} {a:.1f}l{-a:.1f} {a:.1f}l{-a:.1f} {-a:.1f}z"/>'
    return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'


def _apart(places: Sequence[float], low: float, high: float) -> list[float]:
    """Sorted places, moved so that neighbours are `LABEL_HEIGHT` apart and all lie between `low` and `high`."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, low, moved[-1] + LABEL_HEIGHT if moved else low))
    for at in reversed(range(len(moved))):
        ceiling = high if at == len(moved) - 1 else moved[at + 1] - LABEL_HEIGHT
        moved[at] = min(moved[at], ceiling)
    return moved


def _room(low: float, high: float, share: float, least: float) -> tuple[float, float]:
    """Some air below and above."""
    air = max((high - low) * share, least)
    return low - air, high + air


def _tick(value: float) -> str:
    return f"{value:,.10g}" if abs(value) >= 0.001 or value == 0 else f"{value:.0e}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


# -- pictures


def coloured(values: np.ndarray, largest: float) -> np.ndarray:
    """Numbers as colours: (H, W) -> uint8 (H, W, 3); `largest` is the magnitude of full colour.

    >>> coloured(np.array([[0.0, 2.0]]), largest=2.0).tolist()
    [[[255, 255, 255], [194, 65, 12]]]
    """
    strength = np.clip(np.abs(values) / max(largest, 1e-12), 0, 1)[..., None]
    ends = np.where(values[..., None] >= 0, POSITIVE, NEGATIVE)
    colours: np.ndarray = np.rint(255 + strength * (ends - 255.0)).astype(np.uint8)
    return colours


def tiles(maps: Tensor, channels: Sequence[int], largest: float) -> np.ndarray:
    """The chosen channels of (C, H, W) side by side, a grey line between them: uint8 (H, n x (W + 1) - 1, 3)."""
    shown = [coloured(maps[channel].float().cpu().numpy(), largest) for channel in channels]
    line = np.full((maps.shape[1], 1, 3), 128, np.uint8)
    parts = [part for tile in shown for part in (tile, line)]
    return np.concatenate(parts[:-1], axis=1)


def strongest(maps: Tensor, count: int) -> list[int]:
    """The channels of (C, H, W) with the largest mean magnitude, strongest first."""
    order = maps.abs().mean(dim=(1, 2)).argsort(descending=True)
    return [int(channel) for channel in order[:count]]


def png(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a data URI, losslessly: for maps, which the page enlarges."""
    return _uri(Image.fromarray(pixels), "PNG")


def photograph(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a data URI: lossless where it is small, else a JPEG of at most `SIDE` pixels."""
    image = Image.fromarray(pixels)
    if max(image.size) <= SIDE:
        return _uri(image, "PNG")
    image.thumbnail((SIDE, SIDE))
    return _uri(image, "JPEG")


def _uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
