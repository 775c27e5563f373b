"""Chooses how many replicas each expert has, and a first place for each.

L MoE layers, E experts a layer, P items (slots) a layer, G GPUs.
"""

from typing import Any

import numpy as np

from moe_runtime.placement.eplb import eplb_slots
from moe_runtime.placement.packing import first_packing, improve, least_load

Array = np.ndarray[Any, Any]

_EVEN = 1.00005  # busiest over mean where nothing more is tried
_LEVELS = (0.7, 1.0, 1.15, 1.35, 1.7)  # of the mean GPU's load


def replicate(
    loads: Array, num_slots: int, num_gpus: int, *, good_enough: float = _EVEN
) -> tuple[Array, Array]:
    """Items `expert` `[L, P]`, in the order of experts, and their `gpu` `[L, P]` int32.

    Data         load[l, e]; P slots on G GPUs
    Variables    n[l, e] replicas, 1 <= n <= G; a GPU for each, P / G a GPU, never two of an expert
    Objective    for each layer, the load of the busiest GPU, an expert's split evenly over replicas

    Starts: counts by EPLB's rule (one more replica for the largest load a replica), at most one a
    GPU, packed heaviest first; counts that bring every heavy expert's replicas just under a level,
    for several levels, the slots left over going to light ones, which pack more evenly; and EPLB's
    own answer, with other experts in place of duplicates. All are improved, and the best stays. A
    layer ends early with busiest over mean of `good_enough`, if EPLB does no better, or with proof.
    """
    expert = np.empty((len(loads), num_slots), np.int32)
    gpu = np.empty_like(expert)
    for layer, load_E in enumerate(np.asarray(loads, np.float64)):
        holds = _layer(load_E, num_slots, num_gpus, good_enough)
        expert[layer], gpu[layer] = np.nonzero(holds.T)
    return expert, gpu


def busiest_over_mean(loads: Array, expert: Array, gpu: Array, num_gpus: int) -> Array:
    """`[L]`: the busiest GPU's load over the mean GPU's, loads split evenly over replicas."""
    found = []
    for load_E, expert_P, gpu_P in zip(loads, expert, gpu, strict=True):
        shares = (load_E / np.bincount(expert_P, minlength=len(load_E)))[expert_P]
        found.append(np.bincount(gpu_P, shares, minlength=num_gpus).max() * num_gpus / load_E.sum())
    return np.array(found)


def _layer(load_E: Array, num_slots: int, num_gpus: int, good_enough: float) -> Array:
    even, least = load_E.sum() / num_gpus, least_load(load_E, num_slots, num_gpus)
    goal = max(even * good_enough, least * _EVEN)
    if num_slots == len(load_E):
        single = first_packing(load_E, np.ones(num_slots, np.int64), num_gpus)
        return improve(load_E, [single], goal=goal)
    spare = num_slots - len(load_E)
    counts = [_grown(load_E, np.ones(len(load_E), np.int64), spare, num_gpus)]
    for level in _LEVELS:
        counts += _below(load_E, level * load_E.sum() / num_gpus, num_slots, num_gpus)
    starts = [first_packing(load_E, count, num_gpus) for count in counts]
    slots = eplb_slots(
        load_E[None], num_slots=num_slots, num_groups=1, num_nodes=1, num_gpus=num_gpus
    )
    rank = np.arange(num_slots)[None] // (num_slots // num_gpus)
    published = even * busiest_over_mean(load_E[None], slots, rank, num_gpus)[0]
    starts.append(_without_duplicates(load_E, slots[0].reshape(num_gpus, -1)))
    return improve(load_E, starts, goal=min(goal, max(published, least)), known=published)


def _below(load_E: Array, level: float, num_slots: int, num_gpus: int) -> list[Array]:
    """Counts with no share above `level`, spare slots to the light; [] if slots are too few."""
    count = np.clip(np.ceil(load_E / level), 1, num_gpus).astype(np.int64)
    spare = num_slots - int(count.sum())
    light = np.where(count == 1, load_E, 0.0)
    if spare < 0 or spare > int((count == 1).sum()) * (num_gpus - 1):
        return []
    return [_grown(light, count, spare, num_gpus)]


def _grown(load_E: Array, count: Array, spare: int, num_gpus: int) -> Array:
    """`count` with `spare` more, each for the largest load a replica; at most one a GPU."""
    count = count.copy()
    is_open = load_E > 0 if (load_E > 0).any() else np.ones(len(load_E), np.bool_)
    for _ in range(spare):
        best = np.where(is_open & (count < num_gpus), load_E / count, -1.0).argmax()
        if count[best] >= num_gpus:  # those are all full
            best = np.where(count < num_gpus, load_E / count, -1.0).argmax()
        count[best] += 1
    return count


def _without_duplicates(load_E: Array, slots: Array) -> Array:
    """EPLB's answer `slots` `[G, P / G]`; the second replica on a GPU makes room for another."""
    holds = np.zeros((len(slots), len(load_E)), np.bool_)
    for gpu, held in enumerate(slots):
        holds[gpu, held] = True
    for gpu, held in enumerate(slots):
        for _ in range(len(held) - len(set(held.tolist()))):
            share_E = np.where(holds[gpu], -1.0, load_E / holds.sum(axis=0))
            holds[gpu, share_E.argmax()] = True
    return holds
