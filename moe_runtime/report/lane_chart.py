"""When each lane of a run was busy: over the whole of it, and in its last forwards."""

from collections.abc import Mapping, Sequence

from moe_runtime.recording.run_record import (
    COPY,
    DENSE,
    DISK,
    EXPERTS,
    GARBAGE,
    LANES,
    PLAN,
    WAIT,
    RunRecord,
)
from moe_runtime.report.markup import Markup, tag
from moe_runtime.report.svg import LEFT, RIGHT, WIDTH, drawing, horizontal_axis, number, path

NAMES = {
    DENSE: "dense layers",
    EXPERTS: "experts",
    PLAN: "cache",
    WAIT: "waiting for disk",
    DISK: "disk reads",
    COPY: "copies to the GPU",
    GARBAGE: "Python's collector",
}
_ROW, _GAP = 26, 8
_FORWARDS_SHOWN = 3


def lanes_of(record: RunRecord) -> list[str]:
    """Those with something in them; there are no copies where no GPU is."""
    return [lane for lane in LANES if record.lane_seconds[lane] > 0.0]


def lanes_overview(record: RunRecord) -> Markup:
    """The share of each stretch of time that a lane was busy, as the height of its row."""
    seconds = max(record.seconds, 1e-9)
    lanes = lanes_of(record)
    across = (WIDTH - LEFT - RIGHT) / seconds
    rows = []
    for index, lane in enumerate(lanes):
        floor = index * (_ROW + _GAP) + _ROW
        boxes = []
        for number_, busy in enumerate(record.lane_seconds_S[lane]):
            begin = number_ * record.bin_seconds
            # The last stretch may be cut short by the end.
            width = min(record.bin_seconds, seconds - begin)
            if busy > 0.0 and width > 0.0:
                height = _ROW * min(1.0, busy / width)
                boxes.append((LEFT + begin * across, floor - height, width * across, height))
        rows.append(_row(lane, floor, boxes, record.lane_seconds[lane] / seconds))
    height = len(lanes) * (_ROW + _GAP)
    return drawing(
        height + 24,
        *rows,
        horizontal_axis(height, 0.0, seconds, unit="seconds"),
        label="share of time that each lane was busy, over the run",
    )


def last_forwards(record: RunRecord) -> Markup:
    """Every stretch of every lane in the last few forwards."""
    forwards = record.recent_forwards[-_FORWARDS_SHOWN:]
    begin, end = forwards[0].span[0], forwards[-1].span[1]
    scale = (WIDTH - LEFT - RIGHT) / (end - begin)
    rows = []
    lanes = lanes_of(record)
    for index, lane in enumerate(lanes):
        floor = index * (_ROW + _GAP) + _ROW
        spans = _clipped(record.recent_spans, lane, begin, end)
        boxes = [
            (LEFT + (a - begin) * scale, floor - _ROW, max(0.3, (b - a) * scale), _ROW)
            for a, b in spans
        ]
        rows.append(_row(lane, floor, boxes, sum(b - a for a, b in spans) / (end - begin)))
    height = len(lanes) * (_ROW + _GAP)
    borders = [LEFT + (f.span[0] - begin) * scale for f in forwards]
    marks = "".join(f"M{number(x)} 0V{number(height)}" for x in borders)
    return drawing(
        height + 24,
        *rows,
        tag("path", d=marks, class_="border"),
        horizontal_axis(height, 0.0, (end - begin) * 1e3, unit="milliseconds"),
        label=f"the last {len(forwards)} forwards, lane by lane",
    )


def _row(
    lane: str, floor: float, boxes: Sequence[tuple[float, float, float, float]], share: float
) -> Markup:
    return tag(
        "g",
        tag("title", f"{NAMES[lane]}: {share:.1%} of the time"),
        tag("text", NAMES[lane], x=LEFT - 8, y=floor - _ROW / 2 + 4, class_="row"),
        tag("path", d=f"M{LEFT} {number(floor)}H{WIDTH - RIGHT}", class_="axis"),
        tag("path", d=path(boxes), class_=f"lane {lane}"),
    )


def _clipped(
    spans: Mapping[str, Sequence[tuple[float, float]]], lane: str, begin: float, end: float
) -> list[tuple[float, float]]:
    return [(max(a, begin), min(b, end)) for a, b in spans.get(lane, ()) if a < end and b > begin]
