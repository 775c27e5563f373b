"""Belady's MIN: evict what is needed furthest ahead, by a future that is known."""

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence, Set

from moe_runtime.expert import ExpertKey


class BeladyPolicy:
    """Evict the expert whose next use is furthest ahead (Belady 1966).

    No policy that reads an expert only when a layer asks for it, and keeps what that layer needs,
    has fewer misses. The i-th of `next_uses` says at which touch, counted from 0, the key of touch
    i is touched next; if never, any number beyond the last touch. All are different.

    An access costs O(log n) comparisons and a move of at most n references.
    """

    name = "belady"

    def __init__(self, next_uses: Iterable[int]) -> None:
        self._future = iter(next_uses)
        self._uses: list[int] = []  # next ones of resident keys, ascending
        self._key: dict[int, ExpertKey] = {}  # whose they are

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        """Single uses are all this policy looks at."""

    def touch(self, key: ExpertKey) -> None:
        next_use = next(self._future, None)
        assert next_use is not None, f"{key} is touched after the last of `next_uses`"
        uses, keys = self._uses, self._key
        if uses and keys[uses[0]] == key:  # the next use of a resident key was this one
            del keys[uses.pop(0)]
        keys[next_use] = key
        insort(uses, next_use)

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        keys = self._key
        for use in reversed(self._uses):
            if keys[use] not in pinned:
                return keys[use]
        return None

    def forget(self, key: ExpertKey) -> None:
        uses, keys = self._uses, self._key
        for index in range(len(uses) - 1, -1, -1):  # a victim is last, but for pinned keys
            if keys[uses[index]] == key:
                del keys[uses.pop(index)]
                return

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """Nothing is left to predict."""
