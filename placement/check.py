"""Whether a placement answers a problem: read from its slots alone, without any solver's code."""

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.placement.problem import Problem
from moe_runtime.placement_map import Placement

_TOLERANCE = 1e-6  # of a load limit: sums of many counts round differently in another order


def check(placement: Placement, problem: Problem) -> None:
    """Raise PlacementError, naming layer, GPU and number, unless every constraint holds."""
    counts = problem.counts
    for name, mine, asked in (
        ("experts", placement.num_experts, counts.num_experts),
        ("layers", placement.layer_ids, counts.layer_ids),
        ("hidden layers", placement.num_hidden_layers, counts.num_hidden_layers),
        ("GPUs", placement.gpus, problem.topology.gpus),
        ("nodes", placement.nodes, problem.topology.nodes),
        ("slots a layer", placement.num_slots, problem.num_slots),
    ):
        if mine != asked:
            raise PlacementError(
                f"the placement has {mine!r:.60} {name}, the problem {asked!r:.60}"
            )
    for layer, slots_GS in enumerate(placement.by_gpu()):
        layer_id = counts.layer_ids[layer]
        replicas = [0] * counts.num_experts
        for gpu, held in enumerate(slots_GS.tolist()):
            if len(set(held)) < len(held):
                twice = next(expert for expert in held if held.count(expert) > 1)
                raise PlacementError(
                    f"layer {layer_id}: GPU {gpu} holds expert {twice} more than once; a second "
                    "copy beside the first serves nobody"
                )
            for expert in held:
                replicas[expert] += 1
        if 0 in replicas:
            raise PlacementError(f"layer {layer_id}: expert {replicas.index(0)} has no slot")
        if problem.balance is not None:
            loads = [
                sum(float(counts.loads[layer, expert]) / replicas[expert] for expert in held)
                for held in slots_GS.tolist()
            ]
            worst, mean = max(loads), float(np.mean(loads))
            if worst > (problem.balance + _TOLERANCE) * mean:
                raise PlacementError(
                    f"layer {layer_id}: GPU {loads.index(worst)} has {worst / mean:.4f} of the "
                    f"mean load, above the limit {problem.balance:g}"
                )
