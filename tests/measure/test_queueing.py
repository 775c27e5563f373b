"""Waiting for batches: the books of one server, and what batches by experts change."""

import numpy as np
import pytest

from moe_runtime.expert import ExpertKey
from moe_runtime.measure.bench.queueing import ServiceTime, poisson_arrivals, replay_queue

SERVICE = ServiceTime(fixed_seconds=1.0, expert_seconds=0.5)


def kinds(number: int, seed: int) -> tuple[np.ndarray, list[frozenset[ExpertKey]]]:
    """Requests of four kinds, each with four experts of its own, and a true expectation of them."""
    kind_N = np.random.default_rng(seed).integers(0, 4, number)
    path_NP = np.repeat(np.eye(4, dtype=np.bool_), 4, axis=1)[kind_N]
    return path_NP, [
        frozenset(ExpertKey(0, int(p)) for p in np.flatnonzero(row)) for row in path_NP
    ]


def test_waits_add_up_by_hand() -> None:
    true_NP = np.array([[1, 1], [1, 0], [0, 1]], np.bool_)
    expected = [frozenset[ExpertKey]()] * 3
    found = replay_queue(
        np.array([2.0, 3.0, 3.5]), true_NP, expected, SERVICE, batch_size=2, max_passes=0
    )
    # Alone from 2.0 to 4.0; then both others, which waited 1.0 and 0.5, until 6.0.
    assert found.mean_seconds == pytest.approx(0.5)
    assert found.p95_seconds == pytest.approx(0.95)
    assert (found.batches, found.batch_size, found.experts_per_batch) == (2, 1.5, 2.0)
    assert found.busy_share == pytest.approx(4 / 6)


def test_an_idle_server_makes_nobody_wait() -> None:
    true_NP, expected = kinds(20, 0)
    arrivals = np.arange(20) * 100.0
    found = replay_queue(arrivals, true_NP, expected, SERVICE, batch_size=4, max_passes=4)
    assert (found.mean_seconds, found.batches, found.max_passes) == (0.0, 20, 0)


def test_batches_by_expert_activate_fewer_and_wait_less_under_load() -> None:
    true_NP, expected = kinds(600, 1)
    arrivals = poisson_arrivals(600, 1.1, seed=2)  # above what the server does with mixed batches
    fifo, by_expert = (
        replay_queue(arrivals, true_NP, expected, SERVICE, batch_size=8, max_passes=passes)
        for passes in (0, 4)
    )
    assert by_expert.experts_per_batch < 0.8 * fifo.experts_per_batch
    assert by_expert.mean_seconds < 0.8 * fifo.mean_seconds


def test_arrivals_have_the_rate_asked_for_and_the_seed_alone_decides() -> None:
    arrivals = poisson_arrivals(20_000, 4.0, seed=3)
    assert arrivals[-1] == pytest.approx(5000, rel=0.03)
    assert (np.diff(arrivals) >= 0).all()
    assert (arrivals == poisson_arrivals(20_000, 4.0, seed=3)).all()
