"""How large a pass should be: what was measured decides."""

import pytest

from moe_runtime.offline.pass_size import LEAST_TOKENS, MOST_TOKENS, PassSize


def measured(base: float, slope: float, reading: float, sizes: list[int]) -> PassSize:
    """Passes that wait for whatever takes longer."""
    size = PassSize()
    for tokens in sizes:
        computing = base + slope * tokens
        size.add(tokens, computing, max(computing, reading), 10**9)
    return size


def test_n_real_is_where_computing_takes_as_long_as_reading() -> None:
    size = measured(0.5, 0.002, 3.0, [100, 200, 700, 1000])
    assert size.fit() == pytest.approx((0.5, 0.002))
    assert size.n_real == 1250
    assert size.limit() == 1250


def test_nothing_is_said_before_two_sizes_are_known() -> None:
    assert PassSize().limit() == MOST_TOKENS
    assert measured(0.5, 0.002, 3.0, [100, 100]).n_real is None


def test_the_limit_keeps_between_its_bounds() -> None:
    assert measured(0.0, 1.0, 3.0, [1, 2]).limit() == LEAST_TOKENS
    assert measured(0.0, 1e-6, 3.0, [1, 2]).limit() == MOST_TOKENS
    assert measured(0.0, -1.0, 3.0, [1, 2]).limit() == MOST_TOKENS
