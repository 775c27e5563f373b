"""Names the GPUs of a placement so that as few experts as possible leave theirs.

L layers, P items a layer, G GPUs, E experts.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]


def rename(gpu: Array, expert: Array, hosts: Array, *, by_layer: bool) -> Array:
    """`gpu` `[L, P]` with other names for the GPUs, nearest to the old placement's `hosts`.

    `hosts` `[L, G, E]` says which GPU held what. One renaming serves all layers, as hops between
    them stay what they were only then; `by_layer` gives each layer its own, where no hop counts.
    An assignment problem: experts that stay, for each pair of a new and an old name.
    """
    L, G, _ = hosts.shape
    stay = np.zeros((L, G, G), np.int64)
    for layer in range(L):
        for old in range(G):
            stays = hosts[layer, old, expert[layer]]
            stay[layer, :, old] = np.bincount(gpu[layer][stays], minlength=G)
    if not by_layer:
        stay[:] = stay.sum(axis=0)
    renamed = np.empty_like(gpu)
    for layer in range(L):
        _, names = linear_sum_assignment(stay[layer], maximize=True)
        renamed[layer] = names[gpu[layer]]
    return renamed


def rename_within_topology(placement: Placement, hosts: Array) -> Placement:
    """`placement` with other names for nodes and for the GPUs of each, nearest to `hosts`.

    `hosts` `[L, G, E]` says which GPU holds what now. One renaming for all layers: neither a hop,
    nor whether it leaves a node, depends on the names. Two assignment problems, one in the other:
    how well a node takes the place of another is what their GPUs, matched best, have in common.
    """
    G, per_node = placement.gpus, placement.gpus // placement.nodes
    stay = np.einsum("lge,lhe->gh", placement.hosts().astype(np.int64), hosts.astype(np.int64))
    blocks = stay.reshape(placement.nodes, per_node, placement.nodes, per_node).swapaxes(1, 2)
    matched = [[linear_sum_assignment(block, maximize=True)[1] for block in row] for row in blocks]
    within = [
        [block[np.arange(per_node), names].sum() for block, names in zip(row, found, strict=True)]
        for row, found in zip(blocks, matched, strict=True)
    ]
    _, node_names = linear_sum_assignment(np.array(within), maximize=True)
    source = np.empty(G, np.int64)  # by new name, the GPU of `placement` that gets it
    for node, other in enumerate(node_names.tolist()):
        source[other * per_node + matched[node][other]] = node * per_node + np.arange(per_node)
    slots = placement.by_gpu()[:, source].reshape(placement.slots.shape)
    return replace(placement, slots=slots)
