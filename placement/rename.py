"""Names the GPUs of a placement so that as few experts as possible leave theirs.

L layers, P items a layer, G GPUs, E experts.
"""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

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
