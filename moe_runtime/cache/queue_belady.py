"""Belady's rule on a predicted future: the paths that queued requests are expected to take."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set

from moe_runtime.expert import ExpertKey


class QueueBeladyPolicy:
    """Evict the expert that the queue is expected to use last (Read-ME, arXiv 2410.19123).

    `paths` holds what each step of the queue is expected to use, step by step. At most
    `num_queued` steps after the running one are known; a key in none of them leaves first, the
    longest unused among equals. A layer that comes again, or one before the last, starts a step.

    A victim costs O(n log steps) for n residents.
    """

    name = "queue_belady"

    def __init__(self, paths: Iterable[Iterable[ExpertKey]], num_queued: int) -> None:
        self._steps: dict[ExpertKey, list[int]] = {}  # ascending, in which a key is expected
        for step, keys in enumerate(paths):
            for key in keys:
                self._steps.setdefault(key, []).append(step)
        self._num_queued = num_queued
        self._step = -1
        self._layer: int | None = None  # that is visited
        self._oldest_first: OrderedDict[ExpertKey, None] = OrderedDict()  # residents

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        layer = keys[0].layer
        if self._layer is None or layer <= self._layer:
            self._step += 1
        self._layer = layer

    def touch(self, key: ExpertKey) -> None:
        self._oldest_first[key] = None
        self._oldest_first.move_to_end(key)

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        found, furthest = None, (-1, -1)
        for key in self._oldest_first:
            if key not in pinned and (ahead := self._next_use(key)) > furthest:
                found, furthest = key, ahead
        return found

    def forget(self, key: ExpertKey) -> None:
        self._oldest_first.pop(key, None)

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """The queue is all this policy looks at."""

    def _next_use(self, key: ExpertKey) -> tuple[int, int]:
        """(step, layer) after the visit that runs."""
        layer = -1 if self._layer is None else self._layer
        # The running step is still ahead for the layers after this one.
        last_passed = self._step - 1 if key.layer > layer else self._step
        steps = self._steps.get(key, [])
        index = bisect_right(steps, last_passed)
        if index < len(steps) and steps[index] <= self._step + self._num_queued:
            return steps[index], key.layer
        return self._step + self._num_queued + 1, 0
