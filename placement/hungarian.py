"""One expert a GPU and layer: a chain of assignment problems, solved exactly."""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_runtime.placement.cost_model import CostModel

Array = np.ndarray[Any, Any]


def is_hungarian(model: CostModel) -> bool:
    """Whether each layer is a permutation whose cost depends on its neighbours' alone."""
    return model.capacity == 1 and model.has_free_names and not model.is_replicated


def hungarian_chain(model: CostModel) -> Array:
    """`[L, P]` int32, optimal.

    Data         chain[l, p, q] of a flat topology, as many GPUs as experts
    Variables    permutations gpu[l]
    Objective    maximise sum_l sum_pq chain[l, p, q] [gpu[l, p] = gpu[l + 1, q]]
    Constraints  each layer a permutation

    Only gpu[l + 1] relative to gpu[l] matters and a chain has no cycle, so the pairs of layers are
    solved one after another, and each reaches its own optimum. Loads, fan-out and over-load are the
    same for every permutation.
    """
    gpu = np.tile(np.arange(model.num_items, dtype=np.int32), (model.num_layers, 1))
    for layer, chain in enumerate(model.chain):
        rows, columns = linear_sum_assignment(chain, maximize=True)
        gpu[layer + 1][columns] = gpu[layer][rows]
    return gpu
