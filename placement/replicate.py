"""Chooses how many replicas each expert has, and a first place for each.

L MoE layers, E experts a layer, P items (slots) a layer, G GPUs.
"""

from typing import Any

import numpy as np

from moe_runtime.placement.packing import pack

Array = np.ndarray[Any, Any]

_MAX_EXCHANGES = 200  # of one replica for another, a layer; each lowers the busiest GPU's load
_CANDIDATES = 8  # experts that an exchange may take a replica from


def replicate(loads: Array, num_slots: int, num_gpus: int) -> tuple[Array, Array]:
    """Items `expert` `[L, P]` and GPUs `gpu` `[L, P]` int32 for small loads on the busiest GPU.

    Data         load[l, e]; P slots on G GPUs
    Variables    n[l, e] replicas, 1 <= n <= G; a GPU for each, P / G a GPU, never two of an expert
    Objective    for each layer, the load of the busiest GPU, an expert's split evenly over replicas

    Counts start by EPLB's rule (one more replica for the largest load a replica, which makes that
    largest share as small as P slots allow), are packed without duplicates and improved by swaps;
    then replicas of lightly loaded experts are exchanged for more replicas on the busiest GPU.
    """
    expert = np.empty((len(loads), num_slots), np.int32)
    gpu = np.empty_like(expert)
    for layer, load_E in enumerate(loads):
        expert[layer], gpu[layer] = _replicate_layer(load_E.astype(np.float64), num_slots, num_gpus)
    return expert, gpu


def busiest_over_mean(loads: Array, expert: Array, gpu: Array, num_gpus: int) -> Array:
    """`[L]`: the busiest GPU's load over the mean GPU's, loads split evenly over replicas."""
    found = []
    for load_E, expert_P, gpu_P in zip(loads, expert, gpu, strict=True):
        shares = _shares(load_E, np.bincount(expert_P, minlength=len(load_E)), expert_P)
        found.append(np.bincount(gpu_P, shares, minlength=num_gpus).max() * num_gpus / load_E.sum())
    return np.array(found)


def _replicate_layer(load_E: Array, num_slots: int, num_gpus: int) -> tuple[Array, Array]:
    count = _counts(load_E, num_slots, num_gpus)
    expert, gpu, best = _packed(load_E, count, num_gpus)
    if num_slots == len(load_E):
        return expert, gpu
    mean = load_E.sum() / num_gpus
    for _ in range(_MAX_EXCHANGES):
        if best <= mean * (1 + 1e-9):
            break
        found = _exchange(load_E, count, expert, gpu, num_gpus, best)
        if found is None:
            break
        count, expert, gpu, best = found
    return expert, gpu


def _exchange(
    load_E: Array, count: Array, expert: Array, gpu: Array, num_gpus: int, best: float
) -> tuple[Array, Array, Array, float] | None:
    """One replica less of a light expert for one more of one on the busiest GPU, if that helps."""
    shares = _shares(load_E, count, expert)
    busiest = np.bincount(gpu, shares, minlength=num_gpus).argmax()
    growing = [e for e in expert[gpu == busiest] if count[e] < num_gpus]
    growing.sort(key=lambda e: -load_E[e] / count[e])
    after = np.where(count > 1, load_E / np.maximum(count - 1, 1), np.inf)
    shrinking = [e for e in np.argsort(after)[:_CANDIDATES] if np.isfinite(after[e])]
    for more in growing[:_CANDIDATES]:
        for less in shrinking:
            if more == less:
                continue
            trial = count.copy()
            trial[more] += 1
            trial[less] -= 1
            items, places, worst = _packed(load_E, trial, num_gpus)
            if worst < best * (1 - 1e-9):
                return trial, items, places, worst
    return None


def _counts(load_E: Array, num_slots: int, num_gpus: int) -> Array:
    """`[E]`: replicas, at most one a GPU."""
    count = np.ones(len(load_E), np.int64)
    for _ in range(num_slots - len(load_E)):
        count[np.where(count < num_gpus, load_E / count, -1.0).argmax()] += 1
    return count


def _packed(load_E: Array, count: Array, num_gpus: int) -> tuple[Array, Array, float]:
    expert = np.repeat(np.arange(len(load_E), dtype=np.int32), count)
    shares = _shares(load_E, count, expert)
    gpu = pack(shares, expert, num_gpus)
    return expert, gpu, float(np.bincount(gpu, shares, minlength=num_gpus).max())


def _shares(load_E: Array, count: Array, expert: Array) -> Array:
    shares: Array = (load_E / count)[expert]
    return shares
