"""Laws of a step's profile, on traces made by hand as a GPU would leave them."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.measure.launch_times import kernel_times, tklqt_seconds, transition_batch
from moe_runtime.measure.profiler_events import read_events
from moe_runtime.measure.step_parts import PREFIX
from moe_runtime.measure.step_profile import CLOCK, STEP, step_profile
from moe_runtime.measure.trace_lanes import with_lanes
from moe_runtime.recording.run_record import DISK, LANES, PLAN, WAIT, RunRecord
from tests.report.made_record import made_record


def event(name: str, category: str, begin: float, duration: float, **more: Any) -> dict[str, Any]:
    """As Kineto writes it: microseconds."""
    made = {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration}
    return made | {"pid": 1, "tid": 1, "args": {}} | more


def launch(begin: float, number: int) -> dict[str, Any]:
    return event("cudaLaunchKernel", "cuda_runtime", begin, 3, args={"correlation": number})


def kernel(name: str, begin: float, duration: float, number: int) -> dict[str, Any]:
    place = {"pid": 0, "tid": 7, "args": {"correlation": number}}
    return event(name, "kernel", begin, duration, **place)


def trace(*events: dict[str, Any]) -> dict[str, Any]:
    return {"traceEvents": [{"ph": "M", "name": "process_name", "pid": 1}, *events]}


# One step of 100 us: attention 10 to 40, experts 50 to 90, of which 60 to 75 waits for the disk.
STEPS = trace(
    event(CLOCK, "user_annotation", 0, 2),
    event(STEP, "user_annotation", 1000, 100),
    event(PREFIX + "attention", "user_annotation", 1010, 30),
    event(PREFIX + "experts", "user_annotation", 1050, 40),
    event("aten::linear", "cpu_op", 1010, 20),
    event("aten::mm", "cpu_op", 1012, 15),
    event("aten::mm", "cpu_op", 1050, 5),
    event("aten::mm", "cpu_op", 1050, 5, tid=2),
    launch(1013, 1),
    launch(1030, 2),
    launch(1051, 3),
    kernel("gemm", 1020, 50, 1),
    kernel("softmax", 1070, 10, 2),
    kernel("gemm", 1080, 30, 3),
    kernel("stray", 1005, 1, 99),
    event("Memcpy HtoD", "gpu_memcpy", 1060, 5, pid=0, tid=8, args={"correlation": 3}),
)


def record(**spans: list[tuple[float, float]]) -> RunRecord:
    """Recorded on a clock that is 500 s ahead of the trace's."""
    lanes: dict[str, Any] = {lane: [] for lane in LANES} | spans
    return replace(made_record(), began_at=500.0, recent_spans=lanes)


CLOCK_AT = 500.000001  # in the middle of CLOCK, at 1 us of the trace


def test_parts_share_a_step_out_among_them() -> None:
    waits = record(**{WAIT: [(1060e-6, 1075e-6)], PLAN: [(1051e-6, 1053e-6)]})
    found = step_profile(STEPS, waits, CLOCK_AT)
    parts = {name: round(seconds * 1e6, 3) for name, seconds in found.part_seconds.items()}
    assert parts == {
        "rest": 30.0, "attention": 30.0, "experts": 23.0, "waiting for disk": 15.0, "cache": 2.0,
    }  # fmt: skip
    assert sum(found.part_seconds.values()) == pytest.approx(found.seconds) == pytest.approx(1e-4)
    assert found.num_steps == 1


def test_a_kernel_belongs_to_the_part_that_launched_it() -> None:
    found = step_profile(STEPS, record(), CLOCK_AT)
    device = {name: round(seconds * 1e6, 3) for name, seconds in found.device_seconds.items()}
    assert device == {"attention": 60.0, "experts": 30.0}


def test_operators_count_what_they_do_themselves_on_every_thread() -> None:
    found = step_profile(STEPS, record(), CLOCK_AT).operators
    assert list(found) == ["aten::mm", "aten::linear"]
    assert found["aten::mm"].num == 3
    assert found["aten::mm"].seconds == pytest.approx(25e-6)
    assert found["aten::linear"].seconds == pytest.approx(5e-6)


def test_tklqt_is_the_time_from_launch_to_begin_over_all_kernels() -> None:
    """Law (SKIP, 2504.11750): copies are no kernels, and one without a launch is left out."""
    kernels = kernel_times(read_events(STEPS))
    times = {each.name: (each.num, each.queue_seconds * 1e6) for each in kernels}
    assert times == {"gemm": (2, pytest.approx(7 + 29)), "softmax": (1, pytest.approx(40))}
    assert tklqt_seconds(kernels) == pytest.approx(76e-6)
    early = trace(launch(10, 1), kernel("k", 9, 1, 1))  # two clocks do not quite agree
    assert tklqt_seconds(kernel_times(read_events(early))) == 0.0


@pytest.mark.parametrize(
    ("tklqt", "expected"),
    [
        ({}, None),
        ({8: 5.0}, None),
        ({1: 5.0, 2: 5.2, 4: 4.9, 8: 5.1}, None),
        ({1: 5.0, 2: 5.2, 4: 4.9, 8: 5.1, 16: 9.0, 32: 20.0}, 16),
        ({1: 5.0, 2: 9.0, 4: 5.0, 8: 5.0}, None),  # an outlier is no knee
        ({1: 5.0, 2: 9.0, 4: 18.0}, 2),
        ({64: 50.0, 1: 5.0}, 64),
    ],
)
def test_the_knee_is_where_tklqt_leaves_its_floor_for_good(
    tklqt: dict[int, float], expected: int | None
) -> None:
    assert transition_batch(tklqt) == expected


@given(
    st.integers(0, 7), st.floats(1e-6, 1e-2), st.lists(st.floats(1.0, 1.2), min_size=8, max_size=8)
)
def test_a_planted_knee_is_found(knee: int, floor: float, noise: list[float]) -> None:
    """Law: TKLQT = floor while the host is slower, then doubling with the batch."""
    tklqt = {2**i: floor * noise[i] * (1 if i < knee else 2.0 ** (i - knee + 1)) for i in range(8)}
    # Without a floor in sight, growth begins with the second batch.
    assert transition_batch(tklqt) == 2 ** max(1, knee)


def test_lanes_stand_in_the_trace_on_its_clock() -> None:
    lanes = record(**{DISK: [(1060e-6, 1075e-6)], WAIT: [(1061e-6, 1075e-6)]})
    found = with_lanes(STEPS, lanes, offset=-500.0)
    ours = [each for each in found["traceEvents"] if each.get("cat") == "moe_runtime"]
    assert [each["name"] for each in ours] == ["demand waits", "disk reads"]
    assert ours[1]["ts"] == pytest.approx(1060.0)
    assert ours[1]["dur"] == pytest.approx(15.0)
    assert len(STEPS["traceEvents"]) + 2 + 6 + 2 == len(found["traceEvents"])
