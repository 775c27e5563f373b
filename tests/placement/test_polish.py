"""Polishing never makes a placement dearer, and finds what layers gain only together."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import MissingPackageError
from moe_runtime.placement import polish as polish_file
from moe_runtime.placement.anneal import start_annealing
from moe_runtime.placement.descent import descend, random_assignment
from moe_runtime.placement.exact import solve_exactly
from moe_runtime.placement.objective import Objective
from moe_runtime.placement.polish import can_polish, polish
from moe_runtime.placement.workers import Control
from tests.placement.problems import make_problem, model_of, seeds

CLOSE = 1e-9


@given(seed=seeds, gpus=st.sampled_from([2, 3]), is_limited=st.booleans())
@settings(max_examples=5)
def test_polishing_never_raises_the_objective_or_breaks_the_limit(
    seed: int, gpus: int, is_limited: bool
) -> None:
    plain = model_of(make_problem(seed, num_experts=6, gpus=gpus))
    start = random_assignment(plain, seed)
    limit = float(plain.gpu_loads(start).max())
    model = replace(plain, balance=limit) if is_limited else plain
    found = polish(model, start, Control(60))
    assert model.objective(found) <= model.objective(start) + CLOSE
    assert model.is_within_limit(found)
    assert all((np.bincount(row, minlength=gpus) == 6 // gpus).all() for row in found)
    exact = solve_exactly(model, Control(60))
    assert exact is not None
    assert model.objective(found) >= model.objective(exact[0]) - CLOSE


def test_a_local_optimum_of_swaps_and_of_layers_is_left() -> None:
    """Three layers that must change together: no swap gains, no exact layer does, a window does.

    Tokens stay in the pairs 0 1 and 2 3 between the outer layers, and go straight on between the
    inner ones; the start has the pairs 0 2 and 1 3.
    """
    problem = make_problem(0, num_experts=4, gpus=2, num_layers=4)
    pairs = 3.0 * np.kron(np.eye(2), np.ones((2, 2)))
    flows = np.stack([pairs, 20 * np.eye(4), pairs])
    model = model_of(replace(problem, counts=replace(problem.counts, transitions=flows)))
    start = np.tile(np.array([0, 1, 0, 1], np.int32), (4, 1))
    stuck = model.objective(start)
    assert stuck > 0
    annealing = start_annealing(model, start, seed=0)
    annealing.descend(0.0)
    assert model.objective(annealing.gpu) == pytest.approx(stuck, abs=CLOSE)
    assert model.objective(descend(model, start)) == pytest.approx(stuck, abs=CLOSE)
    assert model.objective(polish(model, start, Control(60))) == pytest.approx(0.0, abs=CLOSE)


def test_a_window_as_long_as_the_model_is_solved_exactly() -> None:
    model = model_of(make_problem(6, num_experts=6, gpus=2, num_layers=3, balance=1.2))
    exact = solve_exactly(model, Control(60))
    assert exact is not None
    found = polish(model, exact[0][::-1].copy(), Control(60))
    assert model.objective(found) == pytest.approx(model.objective(exact[0]), abs=1e-6)


def test_only_what_the_programme_knows_and_closes_is_polished() -> None:
    assert can_polish(model_of(make_problem(0, num_experts=12, gpus=4)))
    assert not can_polish(model_of(make_problem(0, num_experts=32, gpus=4)))
    assert not can_polish(model_of(make_problem(0, num_experts=8, gpus=4, nodes=2)))
    fanout = Objective(transitions=1.0, fanout=1.0)
    assert not can_polish(model_of(make_problem(0, num_experts=8, gpus=4, objective=fanout)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MissingPackageError("no solver")])
def test_an_interrupt_or_a_missing_solver_keeps_the_placement(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt is recorded, so that the search says so; a search needs no integer solver."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(polish_file, "solve_programme", fail)
    model = model_of(make_problem(1, num_experts=6, gpus=2))
    start = random_assignment(model, 0)
    control = Control(60)
    assert (polish(model, start, control) == start).all()
    assert control.was_interrupted == (error is KeyboardInterrupt)


def test_no_time_is_no_window() -> None:
    model = model_of(make_problem(1, num_experts=6, gpus=2))
    start = random_assignment(model, 0)
    assert (polish(model, start, Control(0)) == start).all()
