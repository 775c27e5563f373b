"""Block coordinate descent: one layer at a time is placed exactly, all others being fixed.

L layers, P items a layer, G GPUs.
"""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_runtime.placement.cost_model import CostModel

Array = np.ndarray[Any, Any]

_MAX_SWEEPS = 50
_LEAST_GAIN = 1e-12


def random_assignment(model: CostModel, seed: int) -> Array:
    """`[L, P]` int32 with P / G items on each GPU, without regard to loads and replicas."""
    rng = np.random.default_rng(seed)
    places = np.arange(model.num_items) // model.capacity
    return np.stack([rng.permutation(places) for _ in range(model.num_layers)]).astype(np.int32)


def greedy_assignment(model: CostModel, seed: int) -> Array:
    """A random layer placed at random, then its neighbours outwards, each exactly given the last.

    Only the transitions from the layer placed before count, and loads, fan-out and replicas do not.
    """
    gpu = random_assignment(model, seed)
    first = int(np.random.default_rng(seed).integers(model.num_layers))
    for layer in range(first + 1, model.num_layers):
        gpu[layer] = _assign(model.paid_beside(layer, layer - 1, gpu[layer - 1]))
    for layer in range(first - 1, -1, -1):
        gpu[layer] = _assign(model.paid_beside(layer, layer + 1, gpu[layer + 1]))
    return gpu


def descend(model: CostModel, gpu: Array) -> Array:
    """Sweep over the layers until no exact assignment of one lowers transitions + unary terms.

    For fixed neighbours a layer is a transportation problem: cost[g, p] of item p on GPU g, P / G
    items a GPU, solved as an assignment to P / G copies of each GPU. Never raises the objective of
    a model without fan-out, load price, limit or replicas: those are not seen here.
    """
    gpu = gpu.copy()
    every = np.arange(model.num_items)
    for _ in range(_MAX_SWEEPS):
        is_changed = False
        for layer in range(model.num_layers):
            cost_GP = _paid(model, gpu, layer)
            found = _assign(cost_GP)
            if cost_GP[found, every].sum() < cost_GP[gpu[layer], every].sum() - _LEAST_GAIN:
                gpu[layer] = found
                is_changed = True
        if not is_changed:
            break
    return gpu


def _paid(model: CostModel, gpu: Array, layer: int) -> Array:
    """`[G, P]`: what each item of a layer would pay on each GPU."""
    paid = np.zeros((model.num_gpus, model.num_items))
    if model.unary is not None:
        paid += model.unary[layer]
    if layer + 1 < model.num_layers:
        paid += model.paid_beside(layer, layer + 1, gpu[layer + 1])
    if layer > 0:
        paid += model.paid_beside(layer, layer - 1, gpu[layer - 1])
    return paid


def _assign(cost_GP: Array) -> Array:
    """`[P]` int32: the cheapest GPU for each item, P / G items each."""
    capacity = cost_GP.shape[1] // cost_GP.shape[0]
    _, places = linear_sum_assignment(np.repeat(cost_GP, capacity, axis=0).T)
    gpu: Array = (places // capacity).astype(np.int32)
    return gpu
