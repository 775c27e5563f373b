"""Least-frequently-used eviction."""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Mapping, Set

from moe_runtime.expert import ExpertKey


class LFUPolicy:
    """Evict the expert used least often, the longest unused among equals.

    Counts outlive eviction: an expert that returns keeps its history. O(1) amortised per access.
    """

    name = "lfu"

    def __init__(self) -> None:
        self._uses: Counter[ExpertKey] = Counter()
        # Resident keys by number of uses, longest unused first; `_levels` is a heap of its keys.
        self._by_uses: dict[int, OrderedDict[ExpertKey, None]] = {}
        self._levels: list[int] = []

    def touch(self, key: ExpertKey) -> None:
        self._remove(key)
        self._uses[key] += 1
        uses = self._uses[key]
        if uses not in self._by_uses:
            self._by_uses[uses] = OrderedDict()
            heapq.heappush(self._levels, uses)
        self._by_uses[uses][key] = None

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        while self._levels and not self._by_uses[self._levels[0]]:
            del self._by_uses[heapq.heappop(self._levels)]
        lowest = self._levels[0] if self._levels else 0
        for key in self._by_uses.get(lowest, ()):
            if key not in pinned:
                return key
        for uses in sorted(self._by_uses):  # every key of the lowest level is pinned
            for key in self._by_uses[uses]:
                if key not in pinned:
                    return key
        return None

    def forget(self, key: ExpertKey) -> None:
        self._remove(key)

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """Counts of the past are all this policy looks at."""

    def _remove(self, key: ExpertKey) -> None:
        level = self._by_uses.get(self._uses[key])
        if level is not None:
            level.pop(key, None)
