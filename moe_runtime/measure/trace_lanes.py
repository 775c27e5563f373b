"""Puts the lanes of a recording into a Chrome trace of the same run."""

from collections.abc import Mapping
from typing import Any

from moe_runtime.recording.run_record import COPY, DISK, EXPERTS, GARBAGE, PLAN, WAIT, RunRecord

_PROCESS = "moe_runtime"
_NAMES = {
    EXPERTS: "expert compute",
    PLAN: "cache",
    WAIT: "demand waits",
    DISK: "disk reads",
    COPY: "copies to the GPU",
    GARBAGE: "Python's collector",
}


def with_lanes(trace: Mapping[str, Any], record: RunRecord, offset: float) -> dict[str, Any]:
    """The trace with a row for each lane. `offset` leads from time.perf_counter() to its clock."""
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": _PROCESS}},
        {"ph": "M", "name": "process_sort_index", "pid": _PROCESS, "args": {"sort_index": -1}},
    ]
    for number, (lane, name) in enumerate(_NAMES.items()):
        place = {"pid": _PROCESS, "tid": number}
        rows.append({"ph": "M", "name": "thread_name", **place, "args": {"name": name}})
        rows += [
            {
                "ph": "X",
                "cat": "moe_runtime",
                "name": name,
                **place,
                "ts": (record.began_at + begin + offset) * 1e6,
                "dur": (end - begin) * 1e6,
            }
            for begin, end in record.recent_spans[lane]
        ]
    return {**trace, "traceEvents": [*trace["traceEvents"], *rows]}
