"""Laws of playing blocks with prediction and without in turn, as two instances ran them."""

import numpy as np
import pytest

from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.measure.bench.oracle import Oracle
from moe_runtime.measure.bench.pairs_simulation import SimulatedBlocks, simulate_pairs
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.timeline import play
from moe_runtime.trace import Trace

L, E, K = 3, 8, 2
COST = StepCost(dense_seconds=2.0, expert_seconds=0.1, read_seconds=1.0, copy_seconds=0.0)


def make_trace(num_tokens: int) -> Trace:
    rng = np.random.default_rng(3)
    topk = np.stack([rng.choice(E, K, replace=False) for _ in range(num_tokens * L)]).reshape(
        num_tokens, L, K
    )
    return Trace.of({"topk": topk.astype(np.int16)}, num_experts=E)


class Foreseeing:
    """As much of a foresight as is asked for its predictor."""

    def __init__(self, trace: Trace) -> None:
        self.predictor = Oracle(trace, L, lambda: 0)


def simulate(trace: Trace, **changes: int) -> dict[bool, SimulatedBlocks]:
    sizes = {"num_slots": 8, "warm_tokens": 4, "block_tokens": 2, "num_pairs": 3} | changes
    foresight: object = Foreseeing(trace)
    return simulate_pairs(
        trace,
        foresight,  # type: ignore[arg-type]
        COST,
        policy="lru",
        num_layers=L,
        **sizes,
    )


def test_both_kinds_of_blocks_use_the_same_experts() -> None:
    """Law: each instance runs every row once, with prediction or without, and each kind half."""
    trace = make_trace(16)
    found = simulate(trace)
    accesses = [blocks.hits + blocks.misses for blocks in found.values()]
    assert accesses == [12 * L * K] * 2  # of both instances together
    assert found[True].hits > found[False].hits
    assert found[True].stall_seconds < found[False].stall_seconds


def test_blocks_without_prediction_find_what_others_left() -> None:
    """Law: the cache goes on from block to block: long blocks find less of it than short ones."""
    trace = make_trace(200)
    short = simulate(trace, num_pairs=48, block_tokens=1)[False]
    long = simulate(trace, num_pairs=1, block_tokens=48)[False]
    assert short.hits > long.hits


def test_without_a_predictor_both_instances_play_the_plain_policy() -> None:
    """Law: where nobody foretells, all blocks together are twice what the policy does alone."""
    trace = make_trace(16)
    found = simulate_pairs(
        trace,
        None,
        COST,
        policy="lru",
        num_layers=L,
        num_slots=8,
        warm_tokens=4,
        block_tokens=2,
        num_pairs=3,
    )
    counts = [
        play(Accesses.of(trace.select(np.arange(end))).visits(), LRUPolicy(), 8, COST)
        for end in (4, 16)
    ]
    hits = counts[1].hits - counts[0].hits
    stall_seconds = counts[1].stall_seconds - counts[0].stall_seconds
    assert found[True].hits + found[False].hits == 2 * hits
    total = found[True].stall_seconds + found[False].stall_seconds
    assert total == pytest.approx(2 * stall_seconds)
