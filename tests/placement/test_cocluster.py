"""Co-clustering lowers its cost, respects its bound, and tabulates what it was shown."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import PlacementError
from moe_runtime.placement.cocluster import (
    cocluster_bound,
    cocluster_cost,
    device_tables,
    group_tokens,
)
from moe_runtime.placement.objective import Objective
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.solve import solve
from moe_runtime.placement.topology import Topology
from moe_runtime.trace import Trace
from tests.placement.problems import every_layer, make_problem, seeds


def planted(seed: int, num_tokens: int = 24, experts: int = 8, groups: int = 2) -> np.ndarray:
    """`[L, V, E]` counts: a token uses one group of experts nine times in ten."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (3, num_tokens, experts))
    for layer in range(3):
        home = rng.permutation(experts) % groups
        counts[layer] += rng.poisson(20, counts[layer].shape) * (
            home[None, :] == (np.arange(num_tokens) % groups)[:, None]
        )
    return counts.astype(np.float64)


def cocluster_problem(counts: np.ndarray, gpus: int = 2, **options: object) -> Problem:
    base = make_problem(0, num_experts=counts.shape[2], gpus=gpus).counts
    return Problem(
        counts=base, topology=Topology.flat(gpus), num_slots=counts.shape[2],
        objective=Objective(cocluster=1.0), token_expert=counts, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_planted_structure_is_found() -> None:
    counts = planted(0)
    result = solve(cocluster_problem(counts))
    assert result.objective < 0.1
    assert result.lower_bound <= result.objective
    gpu = result.placement.gpu_of()
    group = np.stack([group_tokens(c, g, 2, 0.0) for c, g in zip(counts, gpu, strict=True)])
    assert cocluster_cost(counts, group, gpu, 2) == pytest.approx(result.objective, abs=1e-9)


@given(seed=seeds)
@settings(max_examples=10)
def test_no_groups_are_below_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (1, 6, 4)).astype(np.float64) + 0.1
    best = min(
        cocluster_cost(counts, group_tokens(counts[0], gpu, 2, 0.0)[None], gpu[None], 2)
        for gpu in every_layer(4, 2)
    )
    assert cocluster_bound(counts, 2, 4) <= best + 1e-9


@given(seed=seeds, theta=st.sampled_from([0.0, 0.5, 0.99]))
@settings(max_examples=20)
def test_theta_evens_the_groups(seed: int, theta: float) -> None:
    """At the cost of activations outside; with 0, each id has the group it uses most."""
    counts = np.random.default_rng(seed).poisson(2.0, (30, 8)).astype(np.float64)
    counts[:, :4] *= 3  # both groups of ids would like the first GPU
    gpu = np.arange(8) // 4
    group = group_tokens(counts, gpu, 2, theta)
    inside = [counts[group == g][:, gpu == g].sum() for g in range(2)]
    free = group_tokens(counts, gpu, 2, 0.0)
    most = [counts[free == g][:, gpu == g].sum() for g in range(2)]
    assert sum(inside) <= sum(most)
    sizes = [counts[group == g].sum() for g in range(2)]
    free_sizes = [counts[free == g].sum() for g in range(2)]
    assert max(sizes) <= max(free_sizes)


def test_tables_hold_what_was_recorded() -> None:
    topk = np.array([[[0], [0], [2]], [[0], [0], [3]], [[0], [0], [0]], [[2], [2], [2]]])
    trace = Trace.of({"topk": topk, "token_id": np.array([5, 5, 5, 1])}, num_experts=4)
    counts = np.zeros((3, 6, 4))
    for token, rows in zip(trace.token_id, topk, strict=True):
        for layer in range(3):
            counts[layer, token, rows[layer]] += 1
    problem = Problem(counts=RoutingCounts.of([trace]), topology=Topology.flat(2), num_slots=4)
    placement = solve(problem).placement
    gpu = placement.gpu_of()
    tables = device_tables(placement, counts, [trace])
    assert tables.token_group[0, 5] == gpu[0, 0]
    assert tables.token_confidence[0, 5] == 1.0
    assert tables.token_confidence[0, 0] == 0.0  # never seen
    seen = [gpu[2, expert] for expert in (2, 3, 0)]
    mine = tables.bigram_group[2, gpu[0, 0], gpu[1, 0]]
    both = gpu[0, 2] == gpu[0, 0] and gpu[1, 2] == gpu[1, 0]
    seen += [gpu[2, 2]] if both else []
    assert seen.count(mine) == max(seen.count(g) for g in (0, 1))
    assert tables.bigram_confidence[2, gpu[0, 0], gpu[1, 0]] == pytest.approx(
        seen.count(mine) / len(seen)
    )
    with pytest.raises(PlacementError, match="theta is 2"):
        device_tables(placement, counts, [trace], theta=2)


def test_a_limit_holds_for_cocluster_too() -> None:
    counts = planted(1)
    assert solve(cocluster_problem(counts, balance=1.3)).status in ("feasible", "optimal")


def test_counts_of_another_shape_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"must be \[3 layers, token ids, 8 experts\]"):
        Problem(
            counts=make_problem(0, num_experts=8).counts, topology=Topology.flat(2), num_slots=8,
            objective=Objective(cocluster=1.0), token_expert=np.zeros((2, 5, 8)),
        )  # fmt: skip
    with pytest.raises(PlacementError, match="needs counts of experts by token id"):
        make_problem(0, objective=Objective(cocluster=1.0))
