"""Chooses a solver for a problem, runs it and certifies what it found."""

from collections.abc import Callable

from moe_runtime.placement.problem import Problem
from moe_runtime.placement.result import PlacementResult

SOLVERS = ("auto", "dp", "hungarian", "search", "ilp", "eplb")


def solve(
    problem: Problem,
    *,
    solver: str = "auto",
    time_limit_seconds: float = 60.0,
    seed: int = 0,
    num_processes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PlacementResult:
    """The best placement found within the time, checked, with a lower bound of the objective.

    `solver` is one of SOLVERS; `auto` takes the exact programme where it is small, else search.
    `ilp:NAME` runs the flow formulation through the PuLP solver NAME. `num_processes` None uses
    every core. `on_progress(done, total)` is called now and then from this process. An interrupt
    (KeyboardInterrupt) after a first placement was found ends the search and returns the best,
    `stopped_by` interrupted. Raises PlacementError for what is infeasible, naming the smallest
    feasible limit found, and for a solver that does not fit the problem.
    """
    raise NotImplementedError
