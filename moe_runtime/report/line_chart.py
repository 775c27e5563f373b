"""One quantity over a run, as a stepped line."""

from collections.abc import Sequence

from moe_runtime.report.markup import Markup, tag
from moe_runtime.report.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    drawing,
    horizontal_axis,
    line,
    number,
    round_ticks,
)

_HEIGHT = 110


def line_chart(
    values: Sequence[float | None],
    *,
    width: float,
    last: float,
    unit: str,
    label: str,
    highest: float | None = None,
) -> Markup:
    """Value `i` holds from `i * width` to the next, or to `last`; where None, there is none.

    `highest` is the top of the scale; without it, the largest value.
    """
    known = [value for value in values if value is not None]
    top = highest if highest is not None else max(known, default=0.0) * 1.05
    if not top > 0.0:
        top = 1.0
    across = (WIDTH - LEFT - RIGHT) / last
    parts = []
    for tick in round_ticks(0.0, top, most=4):
        y = 6 + _HEIGHT * (1 - tick / top)
        parts.append(tag("path", d=f"M{LEFT} {number(y)}H{WIDTH - RIGHT}", class_="grid"))
        parts.append(tag("text", f"{tick:g}", x=LEFT - 8, y=number(y + 4), class_="row"))
    points: list[tuple[float, float]] = []
    data = ""
    for index, value in enumerate(values):
        if value is None:
            data, points = data + line(points), []
            continue
        y = 6 + _HEIGHT * (1 - min(value, top) / top)
        begin, end = index * width, min((index + 1) * width, last)
        points += [(LEFT + begin * across, y), (LEFT + max(begin, end) * across, y)]
    data += line(points)
    return drawing(
        _HEIGHT + 32,
        *parts,
        tag("path", d=data, class_="line"),
        horizontal_axis(_HEIGHT + 8, 0.0, last, unit=unit),
        label=label,
    )
