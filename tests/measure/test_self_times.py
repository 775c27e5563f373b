"""Laws of self times: nothing counts twice, and nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.measure.self_times import self_times

STRETCHES = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 100), st.integers(0, 50)).map(
        lambda each: (each[0], float(each[1]), float(each[1] + each[2]))
    )
)


@given(STRETCHES)
def test_self_times_add_up_to_the_time_in_which_anything_ran(
    stretches: list[tuple[str, float, float]],
) -> None:
    """Law: whatever nests or overlaps, each moment belongs to one stretch at most."""
    found = self_times(stretches)
    covered = {t for _, begin, end in stretches for t in range(int(begin), int(end))}
    nested = all(
        a[2] <= b[1] or b[2] <= a[2]
        for a in stretches
        for b in stretches
        if (a[1], -a[2]) <= (b[1], -b[2])
    )
    total = sum(each.seconds for each in found.values())
    assert total <= len(covered) + 1e-9
    if nested:
        assert total == pytest.approx(len(covered))
    assert all(each.seconds >= -1e-9 for each in found.values())
    assert sum(each.num for each in found.values()) == len(stretches)


def test_what_is_nested_is_taken_from_what_is_around_it() -> None:
    found = self_times([("step", 0, 10), ("a", 1, 4), ("b", 2, 3), ("a", 5, 6), ("late", 9, 12)])
    assert {name: each.seconds for name, each in found.items()} == {
        "step": 5.0, "a": 3.0, "b": 1.0, "late": 1.0,
    }  # fmt: skip
    assert found["a"].num == 2
