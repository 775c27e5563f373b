"""A placement problem: counts, GPUs and what is asked of the placement."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.placement.objective import OBJECTIVES, Objective
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.topology import Topology
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """Raises PlacementError when built from what no placement can satisfy by its counts alone.

    Data         counts of a routing; topology costs C[g, h]; num_slots S, a multiple of the GPUs G
    Variables    slots[l, s]: the expert of slot s, on GPU s // (S / G), of layer l
    Objective    objective + move_cost x experts that move to a GPU that did not hold them
    Constraints  every expert has a slot in each layer; no GPU holds one twice; with `balance` b,
                 in each layer no GPU's load is above b x the mean GPU's, a replicated expert's load
                 being split evenly over its replicas
    """

    counts: RoutingCounts
    topology: Topology
    num_slots: int
    objective: Objective = OBJECTIVES["transitions"]
    balance: float | None = None
    previous: Placement | None = None
    # Price of one moved expert, in hops per token: (bytes of an expert) / (bytes of a token's
    # hidden state x tokens until the next move), if a byte costs the same both ways.
    move_cost: float = 0.0
    token_expert: Array | None = None  # [L, V, E] counts by token id, for the cocluster term

    def __post_init__(self) -> None:
        self._check_slots()
        if self.balance is not None and not 1.0 <= self.balance < float("inf"):
            raise PlacementError(
                f"balance is {self.balance}: the busiest GPU cannot have less than the mean; give "
                "1 or more, such as 1.1"
            )
        if not 0 <= self.move_cost < float("inf"):
            raise PlacementError(f"move_cost is {self.move_cost}; give 0 or more")
        if self.move_cost and self.previous is None:
            raise PlacementError("a move_cost needs the previous placement to move from")
        if self.previous is not None:
            self._check_previous(self.previous)
        if self.objective.cocluster:
            self._check_token_expert()
        if self.objective.transitions and self.counts.num_layers > 1:
            for layer, pairs_EE in enumerate(self.counts.transitions):
                if not pairs_EE.sum() > 0:
                    ids = self.counts.layer_ids
                    raise PlacementError(
                        f"no token has a first expert in both layers {ids[layer]} and "
                        f"{ids[layer + 1]}, so their transitions are unknown; record the trace "
                        "again"
                    )

    @property
    def gpus(self) -> int:
        return self.topology.gpus

    @property
    def slots_per_gpu(self) -> int:
        return self.num_slots // self.gpus

    @property
    def is_replicated(self) -> bool:
        return self.num_slots > self.counts.num_experts

    def _check_slots(self) -> None:
        experts, gpus = self.counts.num_experts, self.gpus
        if self.num_slots < experts:
            raise PlacementError(
                f"{self.num_slots} slots cannot hold {experts} experts; give at least {experts}"
            )
        if self.num_slots % gpus:
            works = [g for g in range(1, min(experts, 1024) + 1) if self.num_slots % g == 0]
            replicas = -self.num_slots % gpus + self.num_slots - experts
            raise PlacementError(
                f"{self.num_slots} slots do not divide among {gpus} GPUs; GPU counts that work: "
                f"{', '.join(map(str, works))}; or give --replicas {replicas}"
            )
        if self.slots_per_gpu > experts:
            raise PlacementError(
                f"{self.num_slots} slots on {gpus} GPUs are {self.slots_per_gpu} a GPU, more than "
                f"the {experts} experts, and no GPU holds one twice; give at most "
                f"{experts * gpus} slots"
            )

    def _check_previous(self, previous: Placement) -> None:
        mine = {
            "num_experts": self.counts.num_experts,
            "layer_ids": self.counts.layer_ids,
            "gpus": self.gpus,
        }
        for name, value in mine.items():
            if getattr(previous, name) != value:
                raise PlacementError(
                    f"the previous placement has {name} {getattr(previous, name)!r:.60} and the "
                    f"problem {value!r:.60}; start from a placement of the same shape, or from none"
                )

    def _check_token_expert(self) -> None:
        if self.token_expert is None:
            raise PlacementError(
                "the cocluster objective needs counts of experts by token id, and the traces have "
                "no token ids; record them with `moe-runtime trace record`, or choose the "
                "objective transitions"
            )
        L, E = self.counts.loads.shape
        shape = np.shape(self.token_expert)
        if len(shape) != 3 or (shape[0], shape[2]) != (L, E):
            raise PlacementError(
                f"token_expert has shape {list(shape)}; it must be [{L} layers, token ids, {E} "
                "experts]"
            )
