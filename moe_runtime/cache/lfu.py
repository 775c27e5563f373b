"""Least-frequently-used eviction."""

from bisect import insort
from collections.abc import Mapping, Sequence, Set
from itertools import count

from moe_runtime.expert import ExpertKey

Rank = tuple[int, int, ExpertKey]  # uses, time of the last one, and whose they are


class LFUPolicy:
    """Evict the expert used least often, the longest unused among equals.

    Counts outlive eviction: an expert that returns keeps its history. O(1) per access; a victim and
    what comes in its place cost O(log n) comparisons and a move of at most n references.
    """

    name = "lfu"

    def __init__(self) -> None:
        self._clock = count()
        self._rank: dict[ExpertKey, Rank] = {}  # of resident keys
        self._past_uses: dict[ExpertKey, int] = {}  # of keys that have left
        # A rank of each resident key, ascending. Use only raises ranks: one that is out of date is
        # put right when it comes up, so that a hit costs nothing here.
        self._queue: list[Rank] = []
        self._victim_index = 0  # where the last victim stands, for `forget`

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        """Single uses are all this policy looks at."""

    def touch(self, key: ExpertKey) -> None:
        before = self._rank.get(key)
        if before is not None:
            self._rank[key] = (before[0] + 1, next(self._clock), key)
        else:
            rank = (self._past_uses.get(key, 0) + 1, next(self._clock), key)
            self._rank[key] = rank
            insort(self._queue, rank)

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        queue = self._queue
        index = 0
        while index < len(queue):
            rank = queue[index]
            key = rank[2]
            if key in pinned:
                index += 1
                continue
            current = self._rank.get(key)  # None after an interrupt in the middle of `forget`
            if current is rank:
                self._victim_index = index
                return key
            del queue[index]
            if current is not None:
                insort(queue, current)
        return None

    def forget(self, key: ExpertKey) -> None:
        rank = self._rank.pop(key, None)
        if rank is not None:
            self._past_uses[key] = rank[0]
            queue, index = self._queue, self._victim_index
            if index < len(queue) and queue[index] is rank:
                del queue[index]
            else:  # it was not chosen by `victim`
                self._queue = [queued for queued in queue if queued[2] != key]

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """Counts of the past are all this policy looks at."""
