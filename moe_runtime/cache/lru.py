"""Least-recently-used eviction."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set

from moe_runtime.expert import ExpertKey


class LRUPolicy:
    """Evict the expert used longest ago. O(1) per access."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()  # oldest first

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        """Single uses are all this policy looks at."""

    def touch(self, key: ExpertKey) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        for key in self._order:
            if key not in pinned:
                return key
        return None

    def forget(self, key: ExpertKey) -> None:
        self._order.pop(key, None)

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """Recency is all this policy looks at."""
