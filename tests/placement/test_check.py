"""The check refuses each broken constraint on its own, with layer, GPU and number."""

from dataclasses import replace

import numpy as np
import pytest

from moe_runtime.errors import PlacementError
from moe_runtime.placement.check import check
from moe_runtime.placement.solve import solve
from tests.placement.problems import make_problem


def test_a_solved_placement_passes() -> None:
    problem = make_problem(0, num_experts=8, gpus=2, balance=1.2)
    check(solve(problem).placement, problem)


def test_an_expert_twice_on_a_gpu_is_refused() -> None:
    problem = make_problem(0, num_experts=4, gpus=2, num_slots=6)
    placement = solve(problem).placement
    slots = np.array([[0, 0, 1, 1, 2, 3]] * 3)
    with pytest.raises(PlacementError, match="layer 0: GPU 0 holds expert 0 more than once"):
        check(replace(placement, slots=slots), problem)


def test_a_load_above_the_limit_is_refused_with_its_value() -> None:
    problem = make_problem(0, num_experts=4, gpus=2)
    placement = solve(problem).placement
    heaviest = np.argsort(-problem.counts.loads[0])
    slots = placement.slots.copy()
    slots[0] = heaviest
    with pytest.raises(PlacementError, match=r"layer 0: GPU 0 has 1\.\d+ of the mean .* limit 1"):
        check(replace(placement, slots=slots), replace(problem, balance=1.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpus": 4}, "has 4 GPUs, the problem 2"),
        ({"nodes": 2}, "has 2 nodes, the problem 1"),
        ({"layer_ids": (1, 2, 3), "num_hidden_layers": 4}, r"has \(1, 2, 3\) layers"),
        ({"num_hidden_layers": 9}, "has 9 hidden layers, the problem 3"),
    ],
)
def test_a_placement_of_another_shape_is_refused(change: dict[str, object], words: str) -> None:
    problem = make_problem(0, num_experts=4, gpus=2)
    placement = solve(problem).placement
    with pytest.raises(PlacementError, match=words):
        check(replace(placement, **change), problem)  # type: ignore[arg-type]


def test_another_number_of_slots_is_refused() -> None:
    problem = make_problem(0, num_experts=4, gpus=2)
    with pytest.raises(PlacementError, match="has 4 slots a layer, the problem 6"):
        check(solve(problem).placement, replace(problem, num_slots=6))
