"""The integer programme, in its flow formulation, through PuLP and the solver of one's choice.

L layers, P items a layer, s = P / G on each of G GPUs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.errors import MissingPackageError, PlacementError
from moe_runtime.placement.cost_model import CostModel

Array = np.ndarray[Any, Any]

_DEFAULT_SOLVERS = ("HiGHS", "PULP_CBC_CMD")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProgrammeResult:
    """What the solver said of the programme."""

    gpu: Array | None  # [L, P] int32; None where it found nothing in time
    is_optimal: bool
    is_infeasible: bool
    lower_bound: float  # of the objective; -inf where the solver tells none
    solver: str


def solve_programme(
    model: CostModel, *, solver: str | None, seconds: float, warm: Array | None = None
) -> ProgrammeResult:
    """Solve to optimality, or until `seconds` are over.

    Data         chain[l, p, q] >= 0, unary[l, g, p], load[l, p], a flat topology
    Variables    x[l, p, g] in {0, 1}: item p of layer l is on g
                 z[l, p, q, g] in [0, 1]: and so is item q of layer l + 1
    Objective    minimise sum unary[l, g, p] x[l, p, g] - sum chain[l, p, q] z[l, p, q, g]
    Constraints  sum_g x[l, p, g] = 1; sum_p x[l, p, g] = s
                 sum_q z[l, p, q, g] = s x[l, p, g];  sum_p z[l, p, q, g] = s x[l + 1, q, g]
                 z[l, p, q, g] <= x[l, p, g];  z[l, p, q, g] <= x[l + 1, q, g]
                 sum_p load[l, p] x[l, p, g] <= balance
                 x[0, p, g] = 0 for g > p, where GPUs can change names

    ExFlow's own programme has a variable for each token and a relaxation near 0, as x = 1 / G costs
    nothing there; here the s equalities make each GPU's flow a b-matching. `solver` is a name of
    PuLP's; None takes HiGHS, else CBC. `warm` is given to the solver to start from.
    """
    reasons = _unknown_to_it(model)
    if reasons:
        raise PlacementError(
            f"the integer programme does not know {' and '.join(reasons)}; use --solver search"
        )
    pulp = _import_pulp()
    name, engine = _engine(pulp, solver, seconds, warm is not None)
    programme, x = _build(pulp, model)
    if warm is not None:
        _warm_start(model, x, _named_in_order(warm) if model.has_free_names else warm)
        if name == "HiGHS":
            _give_highs_its_start(engine, x)
    programme.solve(engine)
    status = programme.sol_status
    # LpStatus says Optimal at the time limit too; sol_status tells the two apart.
    is_optimal = status == pulp.LpSolutionOptimal
    has_solution = is_optimal or status == pulp.LpSolutionIntegerFeasible
    total = float(model.chain.sum() * model.costs.max()) + model.offset
    return ProgrammeResult(
        gpu=_read(model, x) if has_solution else None,
        is_optimal=is_optimal,
        is_infeasible=status == pulp.LpSolutionInfeasible,
        lower_bound=total + _dual_bound(programme, name, is_optimal),
        solver=name,
    )


def is_programme(model: CostModel) -> bool:
    """Whether the programme knows all that the model prices."""
    return not _unknown_to_it(model)


def _unknown_to_it(model: CostModel) -> list[str]:
    reasons = []
    if not model.is_flat:
        reasons.append("a topology whose hops differ in cost")
    if model.is_replicated:
        reasons.append("replicas")
    if model.within is not None:
        reasons.append("the fan-out term")
    if model.price:
        reasons.append("a price of load")
    return reasons


def _import_pulp() -> Any:
    try:
        import pulp
    except ImportError as error:
        raise MissingPackageError(
            "the solver ilp needs PuLP, which is not installed; pip install pulp highspy"
        ) from error
    return pulp


def _engine(pulp: Any, solver: str | None, seconds: float, is_warm: bool) -> tuple[str, Any]:
    available = pulp.listSolvers(onlyAvailable=True)
    if solver is not None and solver not in pulp.listSolvers():
        raise PlacementError(f"PuLP knows no solver {solver!r}; installed are {available}")
    wanted = _DEFAULT_SOLVERS if solver is None else (solver,)
    found = next((name for name in wanted if name in available), None)
    if found is None:
        remedy = "pip install highspy" if solver is None else "install it, or choose one of those"
        raise MissingPackageError(
            f"the solver {' or '.join(wanted)} is not installed; installed are {available}; "
            f"{remedy}"
        )
    options = {"warmStart": True} if is_warm and found == "PULP_CBC_CMD" else {}
    return found, pulp.getSolver(found, timeLimit=seconds, msg=False, **options)


def _build(pulp: Any, model: CostModel) -> tuple[Any, list[list[list[Any]]]]:
    L, P, G = model.num_layers, model.num_items, model.num_gpus
    hop = float(model.costs.max())
    programme = pulp.LpProblem("placement", pulp.LpMinimize)
    x = [
        [[pulp.LpVariable(f"x_{i}_{p}_{g}", cat="Binary") for g in range(G)] for p in range(P)]
        for i in range(L)
    ]
    prices = []
    for layer in range(L):
        for p in range(P):
            programme += pulp.lpSum(x[layer][p]) == 1
        for g in range(G):
            programme += pulp.lpSum(x[layer][p][g] for p in range(P)) == model.capacity
            if model.balance is not None:
                loads = [(x[layer][p][g], float(model.load[layer, p])) for p in range(P)]
                programme += pulp.LpAffineExpression(loads) <= model.balance
        if model.unary is not None:
            prices += [
                (x[layer][p][g], float(model.unary[layer, g, p]))
                for p in range(P)
                for g in range(G)
            ]
    if model.has_free_names:
        for p in range(min(P, G)):
            for g in range(p + 1, G):
                programme += x[0][p][g] == 0
    for layer in range(L - 1):
        here, there = x[layer], x[layer + 1]
        for g in range(G):
            z = [
                [pulp.LpVariable(f"z_{layer}_{p}_{q}_{g}", 0, 1) for q in range(P)]
                for p in range(P)
            ]
            for p in range(P):
                programme += pulp.lpSum(z[p]) == model.capacity * here[p][g]
                programme += pulp.lpSum(z[q][p] for q in range(P)) == model.capacity * there[p][g]
                for q in range(P):
                    programme += z[p][q] <= here[p][g]
                    programme += z[p][q] <= there[q][g]
                    prices.append((z[p][q], -hop * float(model.chain[layer, p, q])))
    programme.setObjective(pulp.LpAffineExpression(prices))
    return programme, x


def _warm_start(model: CostModel, x: list[list[list[Any]]], warm: Array) -> None:
    for layer in range(model.num_layers):
        for p in range(model.num_items):
            for g in range(model.num_gpus):
                x[layer][p][g].setInitialValue(int(warm[layer, p] == g))


def _give_highs_its_start(engine: Any, x: list[list[list[Any]]]) -> None:
    """PuLP hands HiGHS no initial values: this does, once its model is built; it finds the z."""
    run = engine.callSolver

    def run_from_start(programme: Any) -> None:
        cells = [g for layer in x for item in layer for g in item]
        indices = np.array([cell.index for cell in cells], np.int32)
        values = np.array([cell.varValue for cell in cells], np.float64)
        programme.solverModel.setSolution(len(cells), indices, values)
        run(programme)

    engine.callSolver = run_from_start


def _named_in_order(gpu: Array) -> Array:
    """The same placement with GPUs named in the order in which the first layer uses them."""
    _, first = np.unique(gpu[0], return_index=True)
    names = np.empty(len(first), np.int32)
    names[np.argsort(first)] = np.arange(len(first))
    renamed: Array = names[gpu]
    return renamed


def _read(model: CostModel, x: list[list[list[Any]]]) -> Array:
    values = [[[g.value() or 0.0 for g in item] for item in layer] for layer in x]
    gpu: Array = np.array(values).argmax(axis=2).astype(np.int32)
    return gpu


def _dual_bound(programme: Any, solver: str, is_optimal: bool) -> float:
    """What the programme's objective cannot be below; -inf where PuLP does not tell."""
    if solver == "HiGHS":
        return float(programme.solverModel.getInfo().mip_dual_bound)
    value = programme.objective.value() if is_optimal else None
    return -np.inf if value is None else float(value)
