"""Where the time of profiled decode steps went: by part of the model, operator and kernel."""

import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.measure.launch_times import KernelTime, kernel_times
from moe_runtime.measure.profiler_events import (
    KERNEL,
    LAUNCHES,
    OPERATOR,
    RANGE,
    ProfilerEvent,
    of_category,
    read_events,
)
from moe_runtime.measure.self_times import SelfTime, self_times
from moe_runtime.measure.step_parts import PREFIX
from moe_runtime.recording.run_record import PLAN, WAIT, RunRecord

STEP, CLOCK = PREFIX + "step", PREFIX + "clock"  # ranges that a profile must hold
REST = "rest"
WAITING, CACHE = "waiting for disk", "cache"
_OF_ENGINE = {WAIT: WAITING, PLAN: CACHE}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Sums over `num_steps` steps, in seconds.

    `part_seconds` share the steps' seconds on the host out among the parts; `device_seconds` are
    those of the kernels that each part launched, empty without a GPU.
    """

    num_steps: int
    seconds: float
    part_seconds: Mapping[str, float]
    device_seconds: Mapping[str, float]
    operators: Mapping[str, SelfTime]
    kernels: Sequence[KernelTime]


def step_profile(trace: Mapping[str, Any], record: RunRecord, clock_at: float) -> StepProfile:
    """Read a trace with ranges STEP and CLOCK; in CLOCK, time.perf_counter() was `clock_at`."""
    events = read_events(trace)
    ranges = of_category(events, RANGE)
    steps = [event for event in ranges if event.name == STEP]
    thread = steps[0].thread
    offset = clock_offset(ranges, clock_at)
    stretches = [
        (event.name, event.begin, event.end)
        for event in ranges
        if event.thread == thread and event.name.startswith(PREFIX) and event.name != CLOCK
    ]
    host = self_times(
        stretches
        + [
            (PREFIX + name, record.began_at + begin + offset, record.began_at + end + offset)
            for lane, name in _OF_ENGINE.items()
            for begin, end in record.recent_spans[lane]
        ]
    )
    return StepProfile(
        num_steps=len(steps),
        seconds=sum(step.seconds for step in steps),
        part_seconds={_part(name): found.seconds for name, found in host.items()},
        device_seconds=_device_seconds(events, stretches),
        operators=_operators(events),
        kernels=kernel_times(events),
    )


def clock_offset(ranges: Sequence[ProfilerEvent], clock_at: float) -> float:
    """What to add to time.perf_counter() for the profiler's clock, right to half of CLOCK."""
    (clock,) = [event for event in ranges if event.name == CLOCK]
    return clock.begin + clock.seconds / 2 - clock_at


def _part(name: str) -> str:
    return REST if name == STEP else name.removeprefix(PREFIX)


def _operators(events: Sequence[ProfilerEvent]) -> dict[str, SelfTime]:
    by_thread: defaultdict[Any, list[tuple[str, float, float]]] = defaultdict(list)
    for event in of_category(events, OPERATOR):
        by_thread[event.thread].append((event.name, event.begin, event.end))
    totals: defaultdict[str, SelfTime] = defaultdict(SelfTime)
    for stretches in by_thread.values():
        for name, found in self_times(stretches).items():
            totals[name].num += found.num
            totals[name].seconds += found.seconds
    return dict(sorted(totals.items(), key=lambda each: -each[1].seconds))


def _device_seconds(
    events: Sequence[ProfilerEvent], stretches: Sequence[tuple[str, float, float]]
) -> dict[str, float]:
    """Kernels belong to the innermost range in which they were launched."""
    launched = {event.correlation: event.begin for event in of_category(events, *LAUNCHES)}
    ordered = sorted(stretches, key=lambda each: (each[1], -each[2]))
    begins = [begin for _, begin, _ in ordered]
    totals: defaultdict[str, float] = defaultdict(float)
    for kernel in of_category(events, KERNEL):
        at = launched.get(kernel.correlation)
        if at is None:
            continue
        before = ordered[: bisect.bisect_right(begins, at)]
        inside = next((name for name, _, end in reversed(before) if end > at), None)
        if inside is not None:
            totals[_part(inside)] += kernel.seconds
    return dict(totals)
