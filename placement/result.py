"""What a solver found, why it stopped, and how far from the optimum it can be."""

from dataclasses import dataclass
from enum import StrEnum

from moe_runtime.placement_map import Placement


class Status(StrEnum):
    """What is known of a placement."""

    OPTIMAL = "optimal"  # no placement has a smaller objective
    FEASIBLE = "feasible"  # it obeys every constraint


class StoppedBy(StrEnum):
    """Why a solver stopped."""

    PROOF = "proof"
    TIME_LIMIT = "time_limit"
    INTERRUPTED = "interrupted"
    CONVERGED = "converged"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementResult:
    """Passes `check` of its problem. An infeasible problem has no result: it raises."""

    placement: Placement
    status: Status
    stopped_by: StoppedBy
    objective: float
    lower_bound: float  # of the objective, over all placements with these replica counts
    bound: str  # how the lower bound was found, such as "b-matching"
    solver: str  # with the engine, such as "search (compiled)"
    seconds: float

    @property
    def gap(self) -> float:
        """At most this much could be gained, in the objective's unit."""
        return max(self.objective - self.lower_bound, 0.0)
