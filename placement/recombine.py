"""Takes each layer from one of several placements, the best way, by a dynamic programme.

K placements, L layers, P items a layer, G GPUs.
"""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_runtime.placement.cost_model import CostModel

Array = np.ndarray[Any, Any]


def recombine(model: CostModel, pool: list[Array]) -> Array:
    """The best placement whose every layer is that of one in `pool`, GPUs renamed where free.

    Annealing leaves walls: stretches of layers that are well placed, under names of GPUs that do
    not fit the next stretch's. A layer's terms of its own do not depend on names, and those of two
    neighbouring layers only on how the names of one match those of the other, which is a G x G
    assignment. So the best choice of K layers each, with the best names, is a shortest path:
    L x K^2 assignments. Where names matter (a topology, a previous placement) they stay. Loads and
    replicas within a layer stay as they are, so every constraint that the pool meets is met.
    """
    L = model.num_layers
    own = np.array([[_own_cost(model, layer, gpu[layer]) for gpu in pool] for layer in range(L)])
    value = own[0].copy()
    came_from: list[Array] = []
    names: list[Array] = []  # [K, K, G]: GPU g of the layer is named as this GPU of the next
    for layer in range(L - 1):
        cost, name = _match(model, layer, pool)
        through = value[:, None] + cost
        came_from.append(through.argmin(axis=0))
        names.append(name)
        value = through.min(axis=0) + own[layer + 1]
    chosen = [int(value.argmin())]
    for back in reversed(came_from):
        chosen.append(int(back[chosen[-1]]))
    chosen.reverse()
    found = np.empty_like(pool[0])
    renamed = np.arange(model.num_gpus)
    for layer, k in enumerate(chosen):
        found[layer] = renamed[pool[k][layer]]
        if layer + 1 < L:
            following = np.empty_like(renamed)
            following[names[layer][k, chosen[layer + 1]]] = renamed
            renamed = following
    return found


def _own_cost(model: CostModel, layer: int, gpu: Array) -> float:
    cost = 0.0
    if model.within is not None:
        cost += 0.5 * float((model.within[layer] * (gpu[:, None] != gpu[None, :])).sum())
    if model.unary is not None:
        cost += float(model.unary[layer][gpu, np.arange(model.num_items)].sum())
    if model.price:
        loads = np.bincount(gpu, model.load[layer], minlength=model.num_gpus)
        cost += model.price * float((np.maximum(loads - 1.0, 0.0) ** 2).sum())
    return cost


def _match(model: CostModel, layer: int, pool: list[Array]) -> tuple[Array, Array]:
    """Costs `[K, K]` between the layer and the next, and names `[K, K, G]`."""
    K, G = len(pool), model.num_gpus
    chain = model.chain[layer]
    here = np.stack([_indicator(gpu[layer], G) for gpu in pool])  # [K, G, P]
    there = np.stack([_indicator(gpu[layer + 1], G) for gpu in pool])
    flow = (here @ chain)[:, None] @ there.transpose(0, 2, 1)[None]  # [K, K, G, G]
    names = np.broadcast_to(np.arange(G), (K, K, G)).copy()
    if not model.has_free_names:
        return np.einsum("abgh,gh->ab", flow, model.costs), names
    hop = float(model.costs.max())
    cost = np.empty((K, K))
    for a in range(K):
        for b in range(K):
            rows, names[a, b] = linear_sum_assignment(flow[a, b], maximize=True)
            cost[a, b] = hop * (chain.sum() - flow[a, b][rows, names[a, b]].sum())
    return cost, names


def _indicator(gpu: Array, num_gpus: int) -> Array:
    """`[G, P]` float64: 1 where GPU g has item p."""
    found: Array = (gpu[None, :] == np.arange(num_gpus)[:, None]).astype(np.float64)
    return found
