"""A fixed favourite set that stays, whatever passes through."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Set

from moe_runtime.expert import ExpertKey


class StaticPolicy:
    """Evict any key outside `favourites` first (oldest first), then the least favoured one."""

    name = "static"

    def __init__(self, favourites: Iterable[ExpertKey]) -> None:
        self._rank = {key: rank for rank, key in enumerate(favourites)}  # most favoured first
        self._others: OrderedDict[ExpertKey, None] = OrderedDict()
        self._resident_favourites: set[ExpertKey] = set()

    def touch(self, key: ExpertKey) -> None:
        if key in self._rank:
            self._resident_favourites.add(key)
        else:
            self._others[key] = None
            self._others.move_to_end(key)

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        for key in self._others:
            if key not in pinned:
                return key
        return max(self._resident_favourites - pinned, key=self._rank.__getitem__, default=None)

    def forget(self, key: ExpertKey) -> None:
        self._others.pop(key, None)
        self._resident_favourites.discard(key)

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """The set was chosen beforehand."""
