"""Splitting sequences into two batches by the experts they are expected to use."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.scheduling.token_scheduler import activated, exchange, split_in_two


def paths(num_sequences: int, num_places: int, seed: int, share: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).random((num_sequences, num_places)) < share


def fewest(path_NP: np.ndarray) -> int:
    size = len(path_NP)
    costs = []
    for members in combinations(range(size), size // 2):
        is_second_N = np.zeros(size, np.bool_)
        is_second_N[list(members)] = True
        costs.append(activated(path_NP, is_second_N))
    return min(costs)


@given(st.integers(0, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_the_halves_are_of_equal_size_and_the_same_each_time(
    num_sequences: int, num_places: int, seed: int
) -> None:
    path_NP = paths(num_sequences, num_places, seed)
    is_second_N = split_in_two(path_NP)
    assert is_second_N.sum() == num_sequences // 2
    assert (is_second_N == split_in_two(path_NP)).all()


def test_activated_experts_are_counted_once_in_each_batch_that_uses_them() -> None:
    path_NP = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], np.bool_)
    assert activated(path_NP, np.array([False, False, True])) == 2 + 2
    assert activated(path_NP, np.array([False, False, False])) == 3


def test_tiny_cases_are_close_to_the_fewest_by_trying_all() -> None:
    """A local optimum of exchanges: mostly the best there is, and never far from it."""
    found = [
        (activated(p, split_in_two(p)), fewest(p)) for p in (paths(8, 24, s) for s in range(60))
    ]
    assert all(ours <= 1.08 * best for ours, best in found)
    assert sum(ours == best for ours, best in found) >= 40


@settings(max_examples=40)
@given(st.integers(2, 10), st.integers(4, 40), st.integers(0, 2**32 - 1))
def test_no_exchange_of_two_sequences_saves_an_expert(
    half: int, num_places: int, seed: int
) -> None:
    path_NP = paths(2 * half, num_places, seed)
    is_second_N = split_in_two(path_NP)
    cost = activated(path_NP, is_second_N)
    for a in np.flatnonzero(~is_second_N):
        for b in np.flatnonzero(is_second_N):
            exchanged_N = is_second_N.copy()
            exchanged_N[[a, b]] = True, False
            assert activated(path_NP, exchanged_N) >= cost


@pytest.mark.parametrize("seed", range(5))
def test_two_kinds_of_sequences_are_told_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind_N = rng.permutation(np.repeat([False, True], 8))
    kinds_2P = rng.random((2, 200)) < 0.2
    path_NP = kinds_2P[kind_N.astype(int)] ^ (rng.random((16, 200)) < 0.02)
    is_second_N = split_in_two(path_NP)
    assert (is_second_N == kind_N).all() or (is_second_N == ~kind_N).all()


@settings(max_examples=40)
@given(st.integers(2, 16), st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_every_exchange_is_worth_its_price(num_sequences: int, seed: int, price: int) -> None:
    path_NP = paths(num_sequences, 40, seed)
    before_N = np.random.default_rng(seed).random(num_sequences) < 0.5
    after_N = exchange(path_NP, before_N, price)
    assert after_N.sum() == before_N.sum()
    num_exchanges = (after_N != before_N).sum() // 2
    saved = activated(path_NP, before_N) - activated(path_NP, after_N)
    assert saved >= num_exchanges * (price + 1)
    assert (exchange(path_NP, before_N, 40) == before_N).all()
