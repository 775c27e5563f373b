"""Requests go where tables say that their experts are, equally many to each GPU."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.placement.cocluster import DeviceTables
from moe_runtime.placement.share_requests import share_requests

NUM_IDS, NUM_LAYERS = 6, 2


def tables(num_gpus: int, seed: int) -> DeviceTables:
    rng = np.random.default_rng(seed)
    pairs = np.zeros((NUM_LAYERS, num_gpus, num_gpus))
    return DeviceTables(
        token_group=rng.integers(0, num_gpus, (NUM_LAYERS, NUM_IDS)).astype(np.int32),
        token_confidence=rng.random((NUM_LAYERS, NUM_IDS)).astype(np.float32),
        bigram_group=pairs.astype(np.int32),
        bigram_confidence=pairs.astype(np.float32),
    )


def pull(request: list[int], rank: int, found: DeviceTables) -> float:
    """What a rank holds of a request's tokens, by the definition."""
    return sum(
        float(found.token_confidence[layer, token]) * (found.token_group[layer, token] == rank)
        for layer in range(NUM_LAYERS)
        for token in request
        if token < NUM_IDS
    )


@given(
    requests=st.lists(st.lists(st.integers(0, NUM_IDS + 2), max_size=5), min_size=1, max_size=6),
    num_gpus=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_no_even_sharing_pulls_more(requests: list[list[int]], num_gpus: int, seed: int) -> None:
    """Law: counts differ by one at most, and the sum of pulls is the greatest of all such."""
    found = tables(num_gpus, seed)
    shared = share_requests(requests, found)

    def is_even(ranks: tuple[int, ...]) -> bool:
        return bool(np.ptp(np.bincount(ranks, minlength=num_gpus)) <= 1)

    def total(ranks: tuple[int, ...]) -> float:
        return sum(pull(r, rank, found) for r, rank in zip(requests, ranks, strict=True))

    assert is_even(tuple(shared))
    every = product(range(num_gpus), repeat=len(requests))
    best = max(total(ranks) for ranks in every if is_even(ranks))
    assert abs(total(tuple(shared)) - best) < 1e-4
