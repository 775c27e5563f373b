"""Chooses a solver for a problem, runs it and certifies what it found."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.placement.anneal_status import anneal_status
from moe_runtime.placement.bounds import Bound, lower_bound
from moe_runtime.placement.check import check
from moe_runtime.placement.cocluster import alternate, cocluster_bound, unary_prices
from moe_runtime.placement.cost_model import CostModel, to_placement
from moe_runtime.placement.descent import descend
from moe_runtime.placement.exact import is_small_enough, solve_exactly
from moe_runtime.placement.hierarchy import two_stages
from moe_runtime.placement.hungarian import hungarian_chain, is_hungarian
from moe_runtime.placement.milp import solve_programme
from moe_runtime.placement.polish import can_polish, polish
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.rename import rename
from moe_runtime.placement.replicate import replicate
from moe_runtime.placement.result import PlacementResult, Status, StoppedBy
from moe_runtime.placement.search import search
from moe_runtime.placement.workers import Control, default_processes, run_jobs

Array = np.ndarray[Any, Any]

SOLVERS = ("auto", "dp", "hungarian", "search", "ilp", "eplb")
_PROOF_GAP = 1e-9  # of the objective: sums in another order differ by less
_BOUND_SHARE = 0.25  # of the time, kept for the bound
_INTERRUPTED_BOUND_SECONDS = 2.0  # who interrupts does not want to wait for a bound
_EVEN_ENOUGH = 1.05  # busiest over mean of a start, where no limit is asked for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """What a solver hands back."""

    gpu: Array  # [L, P]
    model: CostModel
    solver: str
    stopped_by: StoppedBy
    bound: Bound | None = None  # its own, where it has one


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

    `solver` is one of SOLVERS; `auto` takes an exact programme where one is small, else search.
    `ilp:NAME` runs the flow formulation through the PuLP solver NAME; `eplb` minimises the busiest
    GPU's load alone. `num_processes` None uses every core. `on_progress(done, total)` is called now
    and then from this process. An interrupt (KeyboardInterrupt) while searching ends the search and
    returns the best so far, `stopped_by` interrupted. The same seed gives the same placement unless
    time ran out. Raises PlacementError for what is infeasible, naming the smallest feasible limit
    found, and for a solver that does not fit the problem.
    """
    kind, _, engine = solver.partition(":")
    if kind not in SOLVERS or (engine and kind != "ilp"):
        raise PlacementError(
            f"there is no solver {solver!r}; there are {', '.join(SOLVERS)}, and ilp:NAME for a "
            "solver that PuLP knows"
        )
    if not time_limit_seconds > 0:
        raise PlacementError(f"the time limit is {time_limit_seconds} s; give more than 0")
    began = time.monotonic()
    run = _Run(
        problem,
        control=Control(time_limit_seconds * (1 - _BOUND_SHARE)),
        seed=seed,
        num_processes=num_processes or default_processes(),
        on_progress=on_progress,
        is_load_all=kind == "eplb",
    )
    found = run.solve(kind, engine or None)
    by_layer = kind == "eplb"  # it looks at loads alone
    has_names = problem.topology.is_flat and not problem.objective.cocluster
    if problem.previous is not None and (by_layer or has_names):
        hosts = problem.previous.hosts()
        gpu = rename(found.gpu, found.model.expert, hosts, by_layer=by_layer)
        found = replace(found, gpu=gpu)
    objective = found.model.objective(found.gpu)
    left = time_limit_seconds - (time.monotonic() - began)
    if found.stopped_by is StoppedBy.INTERRUPTED:
        left = min(left, _INTERRUPTED_BOUND_SECONDS)
    bound = found.bound or run.bound(found, left)
    is_optimal = objective - bound.value <= _PROOF_GAP
    seconds = time.monotonic() - began
    name = f"{found.solver}" if found.solver != "search" else f"search ({anneal_status()})"
    stopped_by = StoppedBy.PROOF if is_optimal else found.stopped_by
    made: dict[str, object] = {
        "solver": name,
        "seed": seed,
        "status": str(Status.OPTIMAL if is_optimal else Status.FEASIBLE),
        "stopped_by": str(stopped_by),
        "objective": objective,
        "lower_bound": min(bound.value, objective),
        "bound": bound.kind,
        "seconds": round(seconds, 3),
        "num_tokens": problem.counts.num_tokens,
        "balance": problem.balance,
    }
    placement = to_placement(problem, found.model.expert, found.gpu, made)
    check(placement, problem)
    return PlacementResult(
        placement=placement,
        status=Status.OPTIMAL if is_optimal else Status.FEASIBLE,
        stopped_by=stopped_by,
        objective=objective,
        lower_bound=min(bound.value, objective),
        bound=bound.kind,
        solver=name,
        seconds=seconds,
    )


class _Run:
    """One solve: the problem, its limits, and a first placement that obeys every constraint."""

    def __init__(
        self,
        problem: Problem,
        *,
        control: Control,
        seed: int,
        num_processes: int,
        on_progress: Callable[[int, int], None] | None,
        is_load_all: bool,
    ) -> None:
        self._problem = problem
        self._control = control
        self._seed = seed
        self._num_processes = num_processes
        self._on_progress = on_progress
        # A search only needs a start within the limit.
        self._good_enough = 1.0 if is_load_all else problem.balance or _EVEN_ENOUGH
        self._start: Array | None = None
        if problem.is_replicated:
            self._expert, self._start = self._replicate()
        else:
            every = np.arange(problem.counts.num_experts, dtype=np.int32)
            self._expert = np.tile(every, (problem.counts.num_layers, 1))
        self._plain = CostModel.of(problem, self._expert)  # all but the cocluster term

    @property
    def _fallback(self) -> Array:
        """`[L, P]`: within the load limit, if any is found; made when a solver asks for it."""
        if self._start is None:
            self._start = self._replicate()[1]
        return self._start

    def _replicate(self) -> tuple[Array, Array]:
        counts = self._problem.counts
        return replicate(
            counts.loads,
            self._problem.num_slots,
            self._problem.gpus,
            good_enough=self._good_enough,
        )

    def solve(self, kind: str, engine: str | None) -> _Found:
        """Run one solver."""
        model = self._plain
        if kind == "auto":
            kind = self._automatic()
        if kind == "dp":
            return self._dp()
        self._check_limit()
        if kind == "eplb":
            return _Found(
                gpu=self._fallback,
                model=model,
                solver="eplb",
                stopped_by=StoppedBy.CONVERGED,
            )
        if kind == "hungarian":
            if self._problem.objective.cocluster or not is_hungarian(model):
                raise PlacementError(
                    "the solver hungarian needs as many GPUs as experts, hops of one cost, and "
                    "neither replicas, a previous placement's move_cost nor the cocluster term; "
                    "use search"
                )
            return _exact(hungarian_chain(model), model, "hungarian")
        if kind == "ilp":
            return self._programme(engine)
        return self._search()

    def bound(self, found: _Found, seconds: float) -> Bound:
        """A lower bound of what `found` achieved, within about `seconds`."""
        counts, weight = self._problem.token_expert, self._problem.objective.cocluster
        cocluster = 0.0
        if weight and counts is not None:
            cocluster = weight * cocluster_bound(
                counts, self._problem.gpus, self._problem.num_slots
            )
        return lower_bound(
            self._problem,
            self._plain,
            control=Control(max(seconds, 0.0)),
            num_processes=self._num_processes,
            cocluster=cocluster,
        )

    def _automatic(self) -> str:
        if self._problem.objective.cocluster:
            return "search"
        if is_hungarian(self._plain):
            return "hungarian"
        return "dp" if is_small_enough(self._plain) else "search"

    def _check_limit(self) -> None:
        """Raise PlacementError unless the fallback is within the load limit."""
        if self._problem.balance is None or self._plain.is_within_limit(self._fallback):
            return
        loads = self._plain.gpu_loads(self._fallback).max(axis=1)
        layer = int(loads.argmax())
        remedy = "" if self._problem.is_replicated else ", or add --replicas"
        raise PlacementError(
            f"no placement was found that keeps every GPU within {self._problem.balance:g} of the "
            f"mean load; the smallest limit found feasible is "
            f"{np.ceil(loads.max() * 1e4) / 1e4:g}, for layer "
            f"{self._problem.counts.layer_ids[layer]}; raise --balance to that{remedy}"
        )

    def _dp(self) -> _Found:
        if self._problem.objective.cocluster or not is_small_enough(self._plain):
            raise PlacementError(
                f"the solver dp lists all partitions of a layer, too many for "
                f"{self._plain.num_items} items on {self._plain.num_gpus} GPUs (8 experts, or 16 "
                "on 2 GPUs, without replicas and the cocluster term); use search"
            )
        done = solve_exactly(self._plain, self._control)
        if done is None:
            self._check_limit()
            return _Found(
                gpu=self._fallback,
                model=self._plain,
                solver="dp",
                stopped_by=self._control.stopped_by or StoppedBy.TIME_LIMIT,
            )
        return _exact(done[0], self._plain, "dp")

    def _programme(self, engine: str | None) -> _Found:
        if self._problem.objective.cocluster:
            raise PlacementError("the integer programme does not know the cocluster term")
        model = self._plain
        warm = self._fallback
        if model.balance is None and model.num_layers > 1:
            warm = descend(model, warm)
        if can_polish(model):
            warm = polish(model, warm, self._control)
        solver, own, stopped_by = "ilp", None, StoppedBy.TIME_LIMIT
        gpu = warm
        try:
            if not self._control.was_interrupted:
                seconds = max(self._control.remaining_seconds(), 1.0)
                done = solve_programme(model, solver=engine, seconds=seconds, warm=warm)
                solver = f"ilp ({done.solver})"
                gpu = self._better(warm, done.gpu)
                own = Bound(value=done.lower_bound, kind=f"{done.solver} dual")
                if done.is_optimal:
                    own = Bound(value=model.objective(gpu), kind=f"{done.solver} proof")
                    stopped_by = StoppedBy.PROOF
        except KeyboardInterrupt:  # it comes when the solver's own loop lets it
            self._control.interrupt()
        if self._control.was_interrupted:
            stopped_by = StoppedBy.INTERRUPTED
        found = _Found(gpu=gpu, model=model, solver=solver, stopped_by=stopped_by, bound=own)
        if stopped_by is StoppedBy.TIME_LIMIT and own is not None:
            other = self.bound(found, self._control.remaining_seconds() + 5.0)
            found = replace(found, bound=max(own, other, key=lambda bound: bound.value))
        return found

    def _better(self, gpu: Array, other: Array | None) -> Array:
        """`other` if it is there, within the limit and cheaper than `gpu`, which is within it."""
        model = self._plain
        if other is None or not model.is_within_limit(other):
            return gpu
        return other if model.objective(other) <= model.objective(gpu) else gpu

    def _search(self) -> _Found:
        model, fallback = self._plain, self._fallback
        if self._problem.objective.cocluster:
            model, fallback = self._cocluster()
        starts: tuple[Array, ...] = ()
        nodes = self._problem.topology.nodes
        if 1 < nodes < model.num_gpus and not model.is_replicated:
            starts = tuple(
                run_jobs(
                    [
                        lambda control: two_stages(model, nodes, seed=self._seed, control=control),
                    ],
                    self._control,
                    num_processes=1,
                )
            )
        gpu, stopped_by = search(
            model,
            fallback,
            seed=self._seed,
            control=self._control,
            num_processes=self._num_processes,
            starts=starts,
            on_progress=self._on_progress,
        )
        return _Found(gpu=gpu, model=model, solver="search", stopped_by=stopped_by)

    def _cocluster(self) -> tuple[CostModel, Array]:
        """The model whose unary prices come from the best groups of tokens found by turns."""
        counts = self._problem.token_expert
        assert counts is not None
        if self._problem.is_replicated:
            raise PlacementError("the cocluster objective does not know replicas; leave them out")

        def place(prices: Array, gpu: Array) -> Array:
            model = CostModel.of(self._problem, self._expert, prices)
            placed = descend(model, gpu)
            return placed if model.is_within_limit(placed) else gpu

        gpu, group = alternate(
            counts, self._fallback, self._problem.gpus, theta=0.0, place_experts=place
        )
        prices = unary_prices(counts, group, self._problem.gpus)
        return CostModel.of(self._problem, self._expert, prices), gpu


def _exact(gpu: Array, model: CostModel, solver: str) -> _Found:
    return _Found(
        gpu=gpu,
        model=model,
        solver=solver,
        stopped_by=StoppedBy.PROOF,
        bound=Bound(value=model.objective(gpu), kind="proof"),
    )
