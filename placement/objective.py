"""What a placement should make small: a weighted sum of four terms."""

from dataclasses import dataclass

from moe_runtime.errors import PlacementError


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Minimise the sum of `weight * term`; each term is a mean over layers (or pairs of them).

    transitions  cost of a hop of the first expert's path between two layers; with every hop at 1,
                 the fraction of transitions that cross GPUs (ExFlow, arXiv 2401.08383)
    fanout       (2 / K) x pairs of a token's K experts on different GPUs, at most the number of
                 GPUs beyond the first that a token reaches in a layer, and equal to it for K = 2
    cocluster    fraction of (token, expert) activations outside the group that the token's id is
                 assigned to (Sem-MoE, arXiv 2503.04398, second term of its programme)
    load         sum over GPUs of max(load / mean load - 1, 0)^2, a soft price on over-load beside
                 the hard limit of Problem.balance
    """

    transitions: float = 0.0
    fanout: float = 0.0
    cocluster: float = 0.0
    load: float = 0.0

    def __post_init__(self) -> None:
        for name in ("transitions", "fanout", "cocluster", "load"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise PlacementError(
                    f"the objective's weight of {name} is {getattr(self, name)}; give 0 or more"
                )
        if not self.transitions + self.fanout + self.cocluster + self.load > 0:
            raise PlacementError("all weights of the objective are 0; give one of them 1")

    @classmethod
    def named(cls, name: str) -> "Objective":
        """The objective of one of `OBJECTIVES`."""
        if name not in OBJECTIVES:
            raise PlacementError(
                f"there is no objective {name!r}; there are {', '.join(OBJECTIVES)}"
            )
        return OBJECTIVES[name]


OBJECTIVES = {
    "transitions": Objective(transitions=1.0),
    "fanout": Objective(fanout=1.0),
    "cocluster": Objective(cocluster=1.0),
    "mixed": Objective(transitions=1.0, fanout=0.25, load=0.1),
}
