"""Lower bounds stand below every placement, and meet the optimum where they should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moe_runtime.placement.bounds import Bound, lower_bound, most_matched
from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.exact import solve_exactly
from moe_runtime.placement.hungarian import hungarian_chain
from moe_runtime.placement.objective import Objective
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.replicate import replicate
from moe_runtime.placement.topology import Topology
from moe_runtime.placement.workers import Control
from tests.placement.problems import make_problem, model_of, objectives, placement_of, seeds

ROUNDING = 1e-9


def bound_of(problem: Problem, model: CostModel | None = None, seconds: float = 60) -> Bound:
    return lower_bound(
        problem, model or model_of(problem), control=Control(seconds), num_processes=1
    )


@given(
    seed=seeds,
    objective=objectives,
    shape=st.sampled_from([(4, 2, 1), (6, 3, 1), (6, 2, 1), (4, 4, 2), (8, 2, 2)]),
    seconds=st.sampled_from([0.0, 60.0]),
    move_cost=st.sampled_from([0.0, 0.05]),
)
@settings(max_examples=50)
def test_no_placement_is_below_the_bound(
    seed: int,
    objective: Objective,
    shape: tuple[int, int, int],
    seconds: float,
    move_cost: float,
) -> None:
    experts, gpus, nodes = shape
    sizes = {"num_experts": experts, "gpus": gpus, "nodes": nodes, "num_layers": 3}
    first = np.tile(np.arange(experts) % gpus, (3, 1))
    previous = placement_of(make_problem(seed, **sizes), first) if move_cost else None
    problem = make_problem(
        seed, objective=objective, previous=previous, move_cost=move_cost, **sizes
    )
    best = solve_exactly(model_of(problem), Control(60))
    assert best is not None
    found = bound_of(problem, seconds=seconds)
    assert 0 <= found.value <= model_of(problem).objective(best[0]) + ROUNDING


@given(seed=seeds, nodes=st.sampled_from([1, 2]))
@settings(max_examples=10)
def test_no_placement_with_replicas_is_below_the_bound(seed: int, nodes: int) -> None:
    problem = make_problem(seed, num_experts=6, gpus=4, nodes=nodes, num_slots=8)
    expert, gpu = replicate(problem.counts.loads, 8, 4, good_enough=2.0)
    model = CostModel.of(problem, expert)
    assert bound_of(problem, model).value <= model.objective(gpu) + ROUNDING


@given(seed=seeds)
@settings(max_examples=10)
def test_the_bound_is_the_optimum_for_one_expert_a_gpu(seed: int) -> None:
    problem = make_problem(seed, num_experts=8, gpus=8)
    model = model_of(problem)
    assert bound_of(problem).value == pytest.approx(model.objective(hungarian_chain(model)))


@pytest.mark.parametrize(("size", "parts"), [(12, 3), (32, 8), (48, 6)])
def test_the_matching_bound_is_the_linear_programme(size: int, parts: int) -> None:
    """Few columns, then those that its prices ask for, end at the optimum of all of them."""
    rng = np.random.default_rng(size)
    chain = rng.gamma(0.3, 1.0, (size, size))
    share = size // parts
    sums = np.vstack([np.kron(np.eye(size), np.ones(size)), np.kron(np.ones(size), np.eye(size))])
    whole = linprog(
        -chain.ravel(), A_ub=sums, b_ub=np.full(2 * size, share), bounds=(0, 1), method="highs"
    )
    kept = most_matched(chain, parts, (np.ones(size), np.ones(size)))
    assert kept <= -whole.fun * (1 + 1e-3)


def test_a_planted_partition_is_certified() -> None:
    """Blocks that never leave each other: the bound is 0 and met."""
    chain = np.kron(np.eye(4), np.ones((4, 4)))
    kept = most_matched(chain, 4, (np.ones(16), np.ones(16)))
    assert kept == pytest.approx(chain.sum())


def test_costs_between_nodes_count_in_the_bound() -> None:
    cheap = make_problem(0, num_experts=8, gpus=4, nodes=1)
    dear = Problem(
        counts=cheap.counts,
        topology=Topology.of_nodes(2, 4, intra=1.0, inter=5.0),
        num_slots=8,
    )
    assert bound_of(dear).value > bound_of(cheap).value
