"""DeepSeek's expert-parallel load balancer, by its published rules: loads in, slots out.

E logical experts, S slots, G GPUs; https://github.com/deepseek-ai/EPLB (MIT), its README's example.
"""

from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError

Array = np.ndarray[Any, Any]


def eplb_slots(
    loads: Array, *, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Array:
    """`[L, S]` int64 expert ids, rank-major; may put two replicas of an expert on one GPU.

    `loads` `[L, E]`. Hierarchical where the expert groups divide among the nodes: groups are packed
    to nodes, experts replicated within each node, replicas packed to its GPUs. Else global: the
    same with one group and one node.
    """
    loads = np.asarray(loads, np.float32)  # as published: ties fall the same way
    num_experts = loads.shape[1]
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for total, parts, name in (
        (num_experts, num_groups, "experts among groups"),
        (num_slots, num_gpus, "slots among GPUs"),
        (num_gpus, num_nodes, "GPUs among nodes"),
    ):
        if total % parts:
            raise PlacementError(f"EPLB divides {name} equally, and {total} / {parts} is no whole")
    if num_slots < num_experts:
        raise PlacementError(f"{num_slots} slots cannot hold {num_experts} experts")
    return np.stack(
        [_layer_slots(row, num_slots, num_groups, num_nodes, num_gpus) for row in loads]
    )


def _layer_slots(
    load: Array, num_slots: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Array:
    group_size = len(load) // num_groups
    groups_per_node = num_groups // num_nodes
    node, rank = _balanced_packing(load.reshape(num_groups, group_size).sum(axis=1), num_nodes)
    # Experts in the order of nodes, then of groups within a node.
    first = (node * groups_per_node + rank) * group_size
    order = np.empty(len(load), np.int64)
    order[(first[:, None] + np.arange(group_size)).ravel()] = np.arange(len(load))
    gpus_per_node = num_gpus // num_nodes
    slots_per_gpu = num_slots // num_gpus
    slots = []
    for experts in order.reshape(num_nodes, -1):
        replica, count = _replicate(load[experts], num_slots // num_nodes)
        shares = (load[experts] / count.astype(np.float32))[replica]
        gpu, place = _balanced_packing(shares, gpus_per_node)
        here = np.empty(num_slots // num_nodes, np.int64)
        here[gpu * slots_per_gpu + place] = experts[replica]
        slots.append(here)
    return np.concatenate(slots)


def _balanced_packing(weights: Array, num_packs: int) -> tuple[Array, Array]:
    """Pack and rank of each item: heaviest first into the lightest pack that is not full."""
    size = len(weights) // num_packs
    if size == 1:
        return np.arange(len(weights)), np.zeros(len(weights), np.int64)
    pack = np.empty(len(weights), np.int64)
    rank = np.empty(len(weights), np.int64)
    total = np.zeros(num_packs, np.float32)
    items = np.zeros(num_packs, np.int64)
    for item in np.argsort(-weights, kind="stable"):
        lightest = int(np.where(items < size, total, np.inf).argmin())
        pack[item], rank[item] = lightest, items[lightest]
        total[lightest] += weights[item]
        items[lightest] += 1
    return pack, rank


def _replicate(load: Array, num_slots: int) -> tuple[Array, Array]:
    """Expert of each slot, and replicas of each expert: one more to the largest load a replica."""
    replica = np.arange(num_slots)
    count = np.ones(len(load), np.int64)
    for slot in range(len(load), num_slots):
        hottest = int((load / count.astype(np.float32)).argmax())
        replica[slot] = hottest
        count[hottest] += 1
    return replica, count
