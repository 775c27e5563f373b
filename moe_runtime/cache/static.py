"""A fixed favourite set that stays, whatever passes through."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set

from moe_runtime.expert import ExpertKey


class StaticPolicy:
    """Evict any key outside `favourites` first (oldest first), then the least favoured one.

    O(1) per access; a favourite that comes or goes costs O(log n) and a move of n integers.
    """

    name = "static"

    def __init__(self, favourites: Iterable[ExpertKey]) -> None:
        self._favourites = list(favourites)  # most favoured first
        self._rank = {key: rank for rank, key in enumerate(self._favourites)}
        self._others: OrderedDict[ExpertKey, None] = OrderedDict()
        self._resident: set[ExpertKey] = set()  # favourites only
        self._resident_ranks: list[int] = []  # theirs, ascending

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        """Single uses are all this policy looks at."""

    def touch(self, key: ExpertKey) -> None:
        if key in self._resident:
            return
        rank = self._rank.get(key)
        if rank is None:
            self._others[key] = None
            self._others.move_to_end(key)
        else:
            self._resident.add(key)
            insort(self._resident_ranks, rank)

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        for key in self._others:
            if key not in pinned:
                return key
        for rank in reversed(self._resident_ranks):
            if self._favourites[rank] not in pinned:
                return self._favourites[rank]
        return None

    def forget(self, key: ExpertKey) -> None:
        rank = self._rank.get(key)
        if rank is None:
            self._others.pop(key, None)
            return
        self._resident.discard(key)
        index = bisect_left(self._resident_ranks, rank)
        if self._resident_ranks[index : index + 1] == [rank]:
            del self._resident_ranks[index]

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """The set was chosen beforehand."""
