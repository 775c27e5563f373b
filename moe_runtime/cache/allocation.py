"""Parts the slots of a cache among layers, so that expected misses are fewest."""

from collections.abc import Sequence

import numpy as np


def allocate(expected_misses: Sequence[Sequence[float]], num_slots: int) -> list[int]:
    """Slots of each layer: AdapMoE's dynamic programme (arXiv 2408.10284, src/dp.py).

    `expected_misses[layer][k]` is what the layer misses with `k` slots; the last `k` there is
    bounds its slots. With F[l][j] the fewest misses of the first l layers in j slots,

        F[l][j] = min over k of F[l - 1][j - k] + expected_misses[l][k]

    Every layer gets at least one slot if there are enough; those that no layer can take stay free.
    Takes O(L S k).
    """
    least = 1 if num_slots >= len(expected_misses) else 0
    num_slots = min(num_slots, sum(len(misses) - 1 for misses in expected_misses))
    fewest = np.full(num_slots + 1, np.inf)
    fewest[0] = 0.0
    choices = []
    for misses in expected_misses:
        after = np.full(num_slots + 1, np.inf)
        choice = np.zeros(num_slots + 1, np.intp)
        for k in range(least, min(len(misses) - 1, num_slots) + 1):
            found = fewest[: num_slots + 1 - k] + misses[k]
            is_fewer = found < after[k:]
            after[k:][is_fewer] = found[is_fewer]
            choice[k:][is_fewer] = k
        fewest = after
        choices.append(choice)
    left = int(fewest.argmin())
    shares: list[int] = []
    for choice in reversed(choices):
        shares.append(int(choice[left]))
        left -= shares[-1]
    return shares[::-1]
