"""Pieces of charts as inline SVG, in units of one pixel at the page's full width."""

import math
from collections.abc import Iterable, Sequence

from moe_runtime.report.markup import Markup, tag

WIDTH = 960
LEFT, RIGHT = 150, 16  # room for the names of rows, and for the last label of an axis


def drawing(height: float, *parts: Markup, label: str, **attributes: object) -> Markup:
    """A chart that grows with the page; `label` is read to who does not see it."""
    return tag(
        "svg",
        tag("title", label),
        *parts,
        viewBox=f"0 0 {WIDTH} {number(height)}",
        role="img",
        **attributes,
    )


def number(value: float) -> str:
    """As short as a tenth of a pixel allows."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def path(boxes: Iterable[tuple[float, float, float, float]]) -> str:
    """Boxes (x, y, width, height) as the data of one path: far shorter than as many elements.

    Both ends are absolute, so that neighbours meet however they are rounded.
    """
    return "".join(
        f"M{number(x)} {number(y)}H{number(x + w)}V{number(y + h)}H{number(x)}z"
        for x, y, w, h in boxes
    )


def line(points: Sequence[tuple[float, float]]) -> str:
    """The data of a path through `points`."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) if points else ""


def horizontal_axis(y: float, low: float, high: float, *, unit: str) -> Markup:
    """Ticks at round numbers from LEFT to WIDTH - RIGHT, for values from `low` to `high`."""
    parts = [tag("path", d=f"M{LEFT} {number(y)}H{WIDTH - RIGHT}", class_="axis")]
    for value in round_ticks(low, high):
        x = LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        parts.append(tag("path", d=f"M{number(x)} {number(y)}v4", class_="axis"))
        parts.append(tag("text", f"{value:g}", x=number(x), y=number(y + 17), class_="tick"))
    parts.append(tag("text", unit, x=LEFT - 8, y=number(y + 17), class_="row"))
    return tag("g", *parts)


def round_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    span = high - low
    if not span > 0.0:
        return []
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next((factor for factor in (1, 2, 5) if span / (step * factor) <= most - 1), 10)
    first = math.ceil(low / step - 1e-9)
    return [count * step for count in range(first, math.floor(high / step + 1e-9) + 1)]
