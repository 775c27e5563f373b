"""A heat map of hit rates: layers down, forwards across."""

import json

from moe_runtime.report.markup import Markup, joined, tag
from moe_runtime.report.svg import LEFT, RIGHT, WIDTH, drawing, horizontal_axis, number, path
from moe_runtime.trace_fields import Array

# From misses to hits, told apart in grey and by colour-blind readers too.
_COLOURS = (
    "#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70",
    "#7ad151", "#bddf26", "#fde725",
)  # fmt: skip
_MOST_HEIGHT, _MOST_ROW, _LEAST_ROW = 420, 22, 6
_LEAST_LABEL = 11  # pixels between two names of layers


def heat_map(
    hits_LB: Array, misses_LB: Array, *, forwards_per_bin: int, num_forwards: int
) -> Markup:
    """Each cell is one layer in `forwards_per_bin` forwards; where nothing was asked for, none."""
    num_layers, num_bins = hits_LB.shape
    row = max(_LEAST_ROW, min(_MOST_ROW, _MOST_HEIGHT / num_layers))
    # The last bin may stand for fewer forwards than the others.
    across = (WIDTH - LEFT - RIGHT) / num_forwards * forwards_per_bin
    asked = hits_LB + misses_LB
    boxes: dict[str, list[tuple[float, float, float, float]]] = {c: [] for c in _COLOURS}
    for layer in range(num_layers):
        for column in range(num_bins):
            if asked[layer, column]:
                share = hits_LB[layer, column] / asked[layer, column]
                x = LEFT + column * across
                width = min(across, WIDTH - RIGHT - x)
                boxes[colour(share)].append((x, layer * row, width, row))
    cells = [tag("path", d=path(b), fill=c, class_="cells") for c, b in boxes.items() if b]
    every = -(-_LEAST_LABEL // int(row))
    names = [
        tag("text", f"layer {layer}", x=LEFT - 8, y=number((layer + 0.5) * row + 4), class_="row")
        for layer in range(0, num_layers, every)
    ]
    data = {
        "left": LEFT,
        "row": row,
        "across": across,
        "forwards": forwards_per_bin,
        "last": num_forwards,
        "hits": hits_LB.astype(int).tolist(),
        "misses": misses_LB.astype(int).tolist(),
    }
    height = num_layers * row
    return tag(
        "figure",
        drawing(
            height + 24,
            *cells,
            *names,
            horizontal_axis(height + 2, 0, num_forwards, unit="forward"),
            label=f"hit rate of {num_layers} layers over {num_forwards} forwards",
            class_="heat",
            data_cells=json.dumps(data, separators=(",", ":")),
        ),
        tag("figcaption", _legend(), tag("output", "")),
    )


def colour(share: float) -> str:
    """Of a hit rate from 0 to 1."""
    return _COLOURS[round(share * (len(_COLOURS) - 1))]


def _legend() -> Markup:
    squares = [tag("i", style=f"background:{each}") for each in _COLOURS]
    return tag("span", "0 % ", joined(squares), " 100 % of a layer's experts held", class_="scale")
