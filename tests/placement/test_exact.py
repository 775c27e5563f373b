"""Exact solvers are exact: beside all placements of tiny problems, and beside each other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import PlacementError
from moe_runtime.placement import solve as solve_file
from moe_runtime.placement.descent import descend, random_assignment
from moe_runtime.placement.exact import is_small_enough, solve_exactly
from moe_runtime.placement.hungarian import hungarian_chain, is_hungarian
from moe_runtime.placement.milp import solve_programme
from moe_runtime.placement.objective import Objective
from moe_runtime.placement.solve import solve
from moe_runtime.placement.workers import Control
from tests.placement.problems import (
    every_assignment,
    make_problem,
    model_of,
    objectives,
    placement_of,
    price,
    seeds,
)

CLOSE = 1e-9  # sums of the same terms in another order


@given(
    seed=seeds,
    objective=objectives,
    shape=st.sampled_from([(4, 2, 3, 1), (4, 2, 2, 2), (3, 3, 3, 1), (4, 4, 2, 2)]),
    move_cost=st.sampled_from([0.0, 0.05]),
    balance=st.sampled_from([None, 1.3]),
)
@settings(max_examples=25)
def test_the_dynamic_programme_finds_the_best_of_all_placements(
    seed: int,
    objective: Objective,
    shape: tuple[int, int, int, int],
    move_cost: float,
    balance: float | None,
) -> None:
    experts, gpus, layers, nodes = shape
    sizes = {"num_experts": experts, "num_layers": layers, "gpus": gpus, "nodes": nodes}
    plain = make_problem(seed, **sizes)
    previous = placement_of(plain, next(iter(every_assignment(plain)))) if move_cost else None
    problem = make_problem(
        seed, objective=objective, balance=balance, previous=previous, move_cost=move_cost, **sizes
    )
    best = min(price(problem, gpu) for gpu in every_assignment(problem))
    model = model_of(problem)
    if best == float("inf"):
        with pytest.raises(PlacementError, match="smallest feasible limit is"):
            solve_exactly(model, Control(60))
        return
    found = solve_exactly(model, Control(60))
    assert found is not None
    assert price(problem, found[0]) == pytest.approx(best, abs=CLOSE)
    assert model.objective(found[0]) == pytest.approx(best, abs=CLOSE)


@given(seed=seeds)
@settings(max_examples=20)
def test_the_chain_of_assignments_is_optimal_for_one_expert_a_gpu(seed: int) -> None:
    problem = make_problem(seed, num_experts=4, gpus=4, num_layers=3)
    model = model_of(problem)
    assert is_hungarian(model)
    exact = solve_exactly(model, Control(60))
    assert exact is not None
    assert model.objective(hungarian_chain(model)) == pytest.approx(
        model.objective(exact[0]), abs=CLOSE
    )


def test_the_chain_is_refused_where_names_of_gpus_matter() -> None:
    assert not is_hungarian(model_of(make_problem(0, num_experts=4, gpus=4, nodes=2)))


@pytest.mark.parametrize("solver", ["HiGHS", "PULP_CBC_CMD"])
@pytest.mark.parametrize("balance", [None, 1.15])
def test_the_integer_programme_agrees_with_the_dynamic_programme(
    solver: str, balance: float | None
) -> None:
    problem = make_problem(3, num_experts=6, gpus=2, num_layers=4, balance=balance)
    model = model_of(problem)
    exact = solve_exactly(model, Control(60))
    assert exact is not None
    found = solve_programme(model, solver=solver, seconds=60)
    assert found.is_optimal
    assert found.gpu is not None
    assert model.is_within_limit(found.gpu)
    assert model.objective(found.gpu) == pytest.approx(model.objective(exact[0]), abs=1e-6)
    assert found.lower_bound <= model.objective(exact[0]) + 1e-6


def test_the_integer_programme_tells_a_time_limit_from_a_proof() -> None:
    """PuLP calls both Optimal."""
    problem = make_problem(0, num_experts=16, gpus=4, num_layers=6, planted=0.3)
    result = solve(problem, solver="ilp", time_limit_seconds=2)
    assert result.status == "feasible"
    assert result.stopped_by == "time_limit"
    assert result.lower_bound < result.objective


def test_highs_starts_from_what_it_is_given() -> None:
    """With hardly any time it still has an answer, and none dearer than its start."""
    model = model_of(make_problem(0, num_experts=16, gpus=4, num_layers=6, planted=0.3))
    start = descend(model, random_assignment(model, 0))
    found = solve_programme(model, solver="HiGHS", seconds=0.5, warm=start)
    assert found.gpu is not None
    assert model.objective(found.gpu) <= model.objective(start) + CLOSE


def test_an_interrupted_integer_programme_gives_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(solve_file, "solve_programme", press)
    problem = make_problem(1, num_experts=16, gpus=4, num_layers=3)
    result = solve(problem, solver="ilp")
    assert result.stopped_by == "interrupted"
    assert result.lower_bound <= result.objective


def test_the_integer_programme_proves_what_it_solves() -> None:
    problem = make_problem(1, num_experts=6, gpus=2, num_layers=3)
    result = solve(problem, solver="ilp", time_limit_seconds=60)
    assert (result.status, result.stopped_by) == ("optimal", "proof")
    assert result.objective == pytest.approx(solve(problem, solver="dp").objective, abs=1e-6)


def test_a_solver_that_pulp_does_not_know_is_named() -> None:
    problem = make_problem(1, num_experts=4, gpus=2)
    with pytest.raises(PlacementError, match="PuLP knows no solver 'SOLVO'; installed are"):
        solve(problem, solver="ilp:SOLVO")
    with pytest.raises(ImportError, match="GUROBI is not installed; installed are"):
        solve(problem, solver="ilp:GUROBI")


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_eight_experts_are_proven_optimal(gpus: int) -> None:
    problem = make_problem(0, num_experts=8, gpus=gpus, num_layers=32)
    result = solve(problem)
    assert (result.status, result.stopped_by, result.gap) == ("optimal", "proof", 0.0)
    assert result.solver == ("hungarian" if gpus == 8 else "dp")


def test_sixteen_experts_fit_the_dynamic_programme_on_two_gpus_only() -> None:
    assert is_small_enough(model_of(make_problem(0, num_experts=16, gpus=2, num_layers=24)))
    assert not is_small_enough(model_of(make_problem(0, num_experts=16, gpus=4)))
    with pytest.raises(PlacementError, match="too many for 16 items on 4 GPUs"):
        solve(make_problem(0, num_experts=16, gpus=4), solver="dp")
