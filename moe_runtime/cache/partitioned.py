"""Least-recently-used eviction within a share of slots for each layer."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set

from moe_runtime.expert import ExpertKey


class PartitionedPolicy:
    """Evict the expert used longest ago of the layer that is furthest above its share.

    `shares[layer]` slots belong to a layer, as AdapMoE allocates them (`allocate`). A layer that
    needs more at once borrows, and gives back first. A victim costs O(L).
    """

    name = "adapmoe"

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares = shares
        self._oldest_first: list[OrderedDict[ExpertKey, None]] = [OrderedDict() for _ in shares]
        self._layer = 0  # that is visited

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        self._layer = keys[0].layer

    def touch(self, key: ExpertKey) -> None:
        order = self._oldest_first[key.layer]
        order[key] = None
        order.move_to_end(key)

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        layers = range(len(self._shares))
        # What comes in belongs to the visited layer, so that one counts one more.
        above = [len(self._oldest_first[i]) - self._shares[i] for i in layers]
        above[self._layer] += 1
        for layer in sorted(layers, key=lambda i: (-above[i], i)):
            for key in self._oldest_first[layer]:
                if key not in pinned:
                    return key
        return None

    def forget(self, key: ExpertKey) -> None:
        self._oldest_first[key.layer].pop(key, None)

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """Recency within a layer is all this policy looks at."""
