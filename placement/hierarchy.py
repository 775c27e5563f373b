"""Starts for clusters of nodes: experts are divided among nodes, then among each node's GPUs.

L layers, P items a layer, G GPUs, M nodes.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.descent import descend, greedy_assignment
from moe_runtime.placement.search import SearchPlan, anneal
from moe_runtime.placement.workers import Control

Array = np.ndarray[Any, Any]


def two_stages(model: CostModel, num_nodes: int, *, seed: int, control: Control) -> Array:
    """`[L, P]` int32: ExFlow's order of decisions, each stage by descent and annealing.

    First the nodes, as if each were one GPU with room for P / M items; then, node by node, the
    items that it got. The search anneals the whole from there with the true costs of hops, so a
    choice of the first stage that the second regrets can be taken back.
    """
    node_plan = _nodes(model, num_nodes)
    node = _solve(node_plan, seed, control)
    gpus_per_node = model.num_gpus // num_nodes
    gpu = np.empty_like(node)
    for number in range(num_nodes):
        items = np.stack([np.flatnonzero(row == number) for row in node])  # [L, P / M]
        inside = _inside(model, items, number, gpus_per_node)
        found = _solve(inside, seed + number + 1, control)
        np.put_along_axis(gpu, items, found + np.int32(number * gpus_per_node), axis=1)
    return gpu


def _solve(model: CostModel, seed: int, control: Control) -> Array:
    plan = SearchPlan.for_model(model)
    gpu = descend(model, greedy_assignment(model, seed))
    return anneal(model, gpu, plan, plan.warm, seed, control)


def _nodes(model: CostModel, num_nodes: int) -> CostModel:
    return replace(
        model,
        costs=1.0 - np.eye(num_nodes),
        load=model.load * num_nodes / model.num_gpus,
        unary=None if model.unary is None else _per_node(model.unary, num_nodes),
        is_flat=True,
    )


def _per_node(unary: Array, num_nodes: int) -> Array:
    """`[L, M, P]`: the mean price of a node's GPUs."""
    L, _, P = unary.shape
    prices: Array = unary.reshape(L, num_nodes, -1, P).mean(axis=2)
    return prices


def _inside(model: CostModel, items: Array, number: int, gpus_per_node: int) -> CostModel:
    """The model of one node's items and GPUs alone."""
    gpus = slice(number * gpus_per_node, (number + 1) * gpus_per_node)
    rows = items[:, :, None]
    costs = model.costs[gpus, gpus]
    unary = None
    if model.unary is not None:
        unary = np.take_along_axis(model.unary[:, gpus], items[:, None, :], axis=2)
    within = None
    if model.within is not None:
        within = np.stack([m[np.ix_(i, i)] for m, i in zip(model.within, items, strict=True)])
    chain = np.empty((len(model.chain), rows.shape[1], rows.shape[1]))
    for layer, whole in enumerate(model.chain):
        chain[layer] = whole[np.ix_(items[layer], items[layer + 1])]
    off_diagonal = costs[~np.eye(len(costs), dtype=bool)]
    return replace(
        model,
        chain=chain,
        within=within,
        unary=unary,
        load=np.take_along_axis(model.load, items, axis=1),
        expert=np.take_along_axis(model.expert, items, axis=1),
        replicas=np.take_along_axis(model.replicas, items, axis=1),
        costs=costs,
        is_flat=bool(off_diagonal.size == 0 or np.ptp(off_diagonal) == 0),
        offset=0.0,
    )
