"""Eviction for passes that use every layer's experts in turn."""

from collections.abc import Mapping, Sequence, Set

from moe_runtime.expert import ExpertKey


class ScanPolicy:
    """Evict from the layer that comes last from here: Belady's choice when all experts are used.

    The layer that was used last comes again last, so its experts make room for the next layers',
    and the rest stays: a cache of a third of the experts hits about a third, where recency would
    hit none. Where groups of a pass visit each layer in turn, the one that runs comes next again
    while `groups_to_come`, and makes room last. O(layers) per eviction.
    """

    name = "scan"

    def __init__(self) -> None:
        self.layer = -1  # the one that runs, or ran last
        self.groups_to_come = 0  # whose visits of this layer follow in this pass
        self._layers: dict[int, dict[ExpertKey, None]] = {}

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        self.layer = keys[0].layer

    def touch(self, key: ExpertKey) -> None:
        self._layers.setdefault(key.layer, {})[key] = None

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        passed = self.layer - 1 if self.groups_to_come else self.layer
        # Behind the current layer, nearest first; then before it, farthest first.
        for layer in sorted(self._layers, key=lambda n: (n > passed, -n)):
            for key in self._layers[layer]:
                if key not in pinned:
                    return key
        return None

    def forget(self, key: ExpertKey) -> None:
        self._layers.get(key.layer, {}).pop(key, None)

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """All experts are expected."""
