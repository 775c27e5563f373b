"""Placements that look at no affinity: what engines do by default, chance, and EPLB.

All take the model's shape from `counts`; without replicas.
"""

from typing import Any

import numpy as np

from moe_runtime.placement.eplb import eplb_slots
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]


def linear(counts: RoutingCounts, gpus: int, nodes: int = 1) -> Placement:
    """Expert e on GPU e // (E / G): what engines do unless told otherwise."""
    row = np.arange(counts.num_experts)
    return _repeated(counts, gpus, nodes, row, "linear")


def round_robin(counts: RoutingCounts, gpus: int, nodes: int = 1) -> Placement:
    """Expert e on GPU e mod G."""
    row = np.arange(counts.num_experts).reshape(-1, gpus).T.ravel()
    return _repeated(counts, gpus, nodes, row, "round-robin")


def random(counts: RoutingCounts, gpus: int, nodes: int = 1, *, seed: int) -> Placement:
    """Each layer's experts in an order of its own, by chance."""
    rng = np.random.default_rng(seed)
    slots = np.stack([rng.permutation(counts.num_experts) for _ in range(counts.num_layers)])
    return _placement(counts, gpus, nodes, slots, {"solver": "random", "seed": seed})


def eplb(
    counts: RoutingCounts, gpus: int, nodes: int = 1, *, num_slots: int, num_groups: int = 1
) -> Placement:
    """DeepSeek's balancer as published; with replicas, a GPU may hold an expert twice."""
    slots = eplb_slots(
        counts.loads, num_slots=num_slots, num_groups=num_groups, num_nodes=nodes, num_gpus=gpus
    )
    return _placement(counts, gpus, nodes, slots, {"solver": "EPLB as published"})


def _repeated(counts: RoutingCounts, gpus: int, nodes: int, row: Array, solver: str) -> Placement:
    slots = np.repeat(row[None], counts.num_layers, axis=0)
    return _placement(counts, gpus, nodes, slots, {"solver": solver})


def _placement(
    counts: RoutingCounts, gpus: int, nodes: int, slots: Array, made: dict[str, object]
) -> Placement:
    return Placement(
        model=counts.model,
        checkpoint=counts.checkpoint,
        num_experts=counts.num_experts,
        num_hidden_layers=counts.num_hidden_layers,
        layer_ids=counts.layer_ids,
        gpus=gpus,
        nodes=nodes,
        slots=slots,
        made=made,
    )
