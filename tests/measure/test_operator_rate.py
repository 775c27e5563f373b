"""The processor's pace is the median of its loops: one that something held up does not count."""

from itertools import accumulate, chain, repeat

import pytest

from moe_runtime.measure import operator_rate
from moe_runtime.measure.operator_rate import operator_seconds


def test_one_loop_that_was_held_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two looks at the clock a loop: 1 s in it, but 100 s in the second.
    lasts = chain((0.0, 1.0, 0.0, 100.0), repeat(0.5))
    clock = accumulate(lasts)
    monkeypatch.setattr(operator_rate.time, "perf_counter", lambda: next(clock))
    assert operator_seconds(repeats=3) == pytest.approx(1.0 / 250)


def test_an_operator_takes_some_nanoseconds() -> None:
    assert 1e-8 < operator_seconds() < 1e-3
