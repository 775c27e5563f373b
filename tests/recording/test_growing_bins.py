"""Laws of bins that grow: nothing is lost, and memory stays what it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.recording.growing_bins import GrowingBins

POSITIONS = st.floats(0.0, 5000.0)


@given(st.lists(st.tuples(POSITIONS, st.integers(0, 1000)), min_size=1), st.integers(2, 9))
def test_sums_are_exact_and_bins_are_no_more_than_told(
    added: list[tuple[float, int]], num_bins: int
) -> None:
    bins = GrowingBins(1, num_bins=num_bins, width=0.25)
    for position, amount in added:
        bins.add(0, position, amount)
    assert bins.sums.sum() == sum(amount for _, amount in added)
    assert bins.sums.shape[1] <= num_bins
    assert (bins.width / 0.25).is_integer()
    for number, found in enumerate(bins.sums[0]):
        inside = [a for p, a in added if int(p / bins.width) == number]
        assert found == sum(inside)


@given(st.lists(st.tuples(POSITIONS, st.floats(0.0, 300.0))), st.integers(2, 9))
def test_a_span_gives_each_bin_what_lies_in_it(
    spans: list[tuple[float, float]], num_bins: int
) -> None:
    bins = GrowingBins(1, num_bins=num_bins, width=0.25)
    for some in (spans[:3], spans[3:]):
        begins = np.array([begin for begin, _ in some])
        ends = np.array([begin + length for begin, length in some])
        bins.add_spans(np.zeros(len(some), int), begins, ends)
    width = bins.width
    for number, found in enumerate(bins.sums[0]):
        low, high = number * width, (number + 1) * width
        inside = [max(0.0, min(b + n, high) - max(b, low)) for b, n in spans]
        assert found == pytest.approx(sum(inside), abs=1e-6)
