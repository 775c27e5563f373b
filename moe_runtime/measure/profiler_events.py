"""What PyTorch's profiler saw, read from the Chrome trace that it exports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPERATOR, RANGE, KERNEL = "cpu_op", "user_annotation", "kernel"
LAUNCHES = ("cuda_runtime", "cuda_driver")  # calls that start kernels, among others


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilerEvent:
    """Something that took time on one thread of the host, or one stream of a device.

    Times in seconds on the profiler's clock. A kernel has the `correlation` of the call that
    launched it.
    """

    name: str
    category: str
    thread: tuple[Any, Any]
    begin: float
    seconds: float
    correlation: int | None = None

    @property
    def end(self) -> float:
        return self.begin + self.seconds


def read_events(trace: Mapping[str, Any]) -> list[ProfilerEvent]:
    """Events of a duration, in the order of their begin; others of the trace are left out."""
    found = [
        ProfilerEvent(
            name=str(event["name"]),
            category=str(event.get("cat", "")),
            thread=(event.get("pid"), event.get("tid")),
            begin=float(event["ts"]) * 1e-6,
            seconds=float(event["dur"]) * 1e-6,
            correlation=event.get("args", {}).get("correlation"),
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and "dur" in event
    ]
    return sorted(found, key=lambda event: event.begin)


def of_category(events: Sequence[ProfilerEvent], *categories: str) -> list[ProfilerEvent]:
    """Those of some categories."""
    return [event for event in events if event.category in categories]
