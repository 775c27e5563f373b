"""Which experts to read before they are needed, in whose place, and what became of them.

L MoE layers, E experts a layer. Numbers and keys only: the same rules serve runtime and simulator.
"""

import math
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from moe_runtime.cache.cache import ExpertCache, Read
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.predictions import LEAST_PREFETCHED, Predictions
from moe_runtime.expert import ExpertKey

_MANY_READS = 2**31  # where reads take next to no time


@runtime_checkable
class Outlook(Protocol):
    """Who is expected when."""

    def wanted(self) -> list[ExpertKey]:
        """Absent keys worth a read ahead, the most worth first."""

    def is_sooner(self, key: ExpertKey, other: ExpertKey) -> bool:
        """Whether `key` is worth the slot of `other`."""


class PredictedUse:
    """An outlook of predictions alone, for policies that have none of their own.

    A key is worth p / d, its probability of use at the next visit of its layer over the visits
    until then; what nothing is said of is worth nothing, and so is what is no probability.
    """

    def __init__(self, resident: Container[ExpertKey]) -> None:
        self._resident = resident
        self._layer = -1  # that runs; -1 before the first
        self._said = np.empty((0, 0))  # [L, E]; empty: nothing yet
        self._likely: list[ExpertKey] | None = None  # the most worth first; None: to be found

    def advise(self, predictions: Predictions, layer: int) -> None:
        """What is said, when `layer` runs, of the next visit of every layer.

        It replaces all that was said before.
        """
        self._said, self._layer, self._likely = predictions.next_LE, layer, None

    def wanted(self) -> list[ExpertKey]:
        if self._likely is None:
            # NaN is neither.
            is_likely = (self._said >= LEAST_PREFETCHED) & (self._said <= 1.0)
            layers, experts = np.nonzero(is_likely)
            visits = (layers - self._layer - 1) % max(1, len(self._said)) + 1
            order = np.argsort(-self._said[layers, experts] / visits, kind="stable")
            keys = map(ExpertKey, layers[order].tolist(), experts[order].tolist())
            self._likely = list(keys)
        return [key for key in self._likely if key not in self._resident]

    def is_sooner(self, key: ExpertKey, other: ExpertKey) -> bool:
        return self._worth(key) > self._worth(other)

    def _worth(self, key: ExpertKey) -> float:
        if not len(self._said):
            return 0.0
        said = float(self._said[key])
        visits = (key.layer - self._layer - 1) % len(self._said) + 1
        return said / visits if 0.0 <= said <= 1.0 else 0.0


class Forecaster:
    """Tells a cache's policy what is predicted, and asks it, or `PredictedUse`, who is wanted."""

    def __init__(self, cache: ExpertCache) -> None:
        self._policy: EvictionPolicy = cache.policy
        self._predicted: PredictedUse | None = None
        self._outlook: Outlook
        if isinstance(cache.policy, Outlook):
            self._outlook = cache.policy
        else:
            self._outlook = self._predicted = PredictedUse(cache)

    def advise(self, predictions: Predictions, layer: int) -> None:
        """Before the visit of `layer`, of what follows it; -1: before the first layer."""
        self._policy.advise(predictions)
        if self._predicted is not None:
            self._predicted.advise(predictions, layer)

    def wanted(self) -> list[ExpertKey]:
        return self._outlook.wanted()

    def is_worth(self, key: ExpertKey, victim: ExpertKey) -> bool:
        return self._outlook.is_sooner(key, victim)


def reads_that_fit(idle_seconds: float, read_seconds: float) -> int:
    """Reads that begin while the disk would be idle; the last one may end after that.

    One where nothing is known of reads: `read_seconds` is 0.
    """
    if read_seconds <= 0.0:
        return 1
    if idle_seconds <= 0.0:
        return 0
    if idle_seconds >= _MANY_READS * read_seconds:
        return _MANY_READS
    return math.ceil(idle_seconds / read_seconds)


@dataclass(frozen=True, slots=True)
class AheadPlan:
    """Absent experts to read ahead, the most wanted first, and at most how many of them.

    Where the cache is full, one takes the slot of a victim that `is_worth(key, victim)` gives up.
    """

    keys: Sequence[ExpertKey]
    most: int
    is_worth: Callable[[ExpertKey, ExpertKey], bool]


class AheadPlanner(Protocol):
    """Says what to read while nothing that is demanded waits to be read."""

    def plan(self, num_in_line: int) -> AheadPlan | None:
        """After a layer's demand is known, or after it ran."""


@dataclass(slots=True)
class PrefetchCounts:
    """What became of reads ahead, in experts; parts of one where a read was cut short.

    `hidden` of `used` were read when they were demanded; `wasted` were read for nothing.
    `regrets` are demands of what had made room for a read ahead, at its layer's next visit.
    """

    started: int = 0
    used: int = 0
    cancelled: int = 0
    hidden: float = 0.0
    wasted: float = 0.0
    regrets: float = 0

    def since(self, other: "PrefetchCounts") -> "PrefetchCounts":
        """What was added after `other`."""
        return PrefetchCounts(
            started=self.started - other.started,
            used=self.used - other.used,
            cancelled=self.cancelled - other.cancelled,
            hidden=self.hidden - other.hidden,
            wasted=self.wasted - other.wasted,
            regrets=self.regrets - other.regrets,
        )

    def copy(self) -> "PrefetchCounts":
        return self.since(PrefetchCounts())


@dataclass(slots=True)
class PrefetchLedger:
    """Follows every expert that was read ahead until it is used or gone."""

    counts: PrefetchCounts = field(default_factory=PrefetchCounts)
    _unused: set[ExpertKey] = field(default_factory=set)
    # By layer: what its next visit is expected to use, and what left for such keys.
    _foretold: dict[int, dict[ExpertKey, None]] = field(default_factory=dict)
    _displaced: dict[int, set[ExpertKey]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not (self._unused or self._foretold or self._displaced)

    @property
    def awaited(self) -> set[ExpertKey]:
        """Read ahead for a visit that is still to come."""
        return {key for keys in self._foretold.values() for key in keys}

    @property
    def num_unused(self) -> int:
        return len(self._unused)

    def start(self, key: ExpertKey, evicted: ExpertKey | None) -> None:
        """`key` is read ahead, into the slot of `evicted` or a free one."""
        self.counts.started += 1
        self._unused.add(key)
        self._foretold.setdefault(key.layer, {})[key] = None
        if evicted is not None:
            self._displaced.setdefault(evicted.layer, set()).add(evicted)

    def visit(
        self,
        keys: Collection[ExpertKey],
        resident: Container[ExpertKey],
        share: Callable[[ExpertKey], float],
    ) -> list[ExpertKey]:
        """A layer demands `keys`; returns what was read for this visit and is not among them.

        There is at least one key. `share` says how much of a key is read by now.
        """
        layer = next(iter(keys)).layer
        self.use(keys, share)
        displaced = self._displaced.pop(layer, ())
        self.counts.regrets += sum(key in displaced and key not in resident for key in keys)
        demanded = set(keys)
        return [key for key in self._foretold.pop(layer, ()) if key not in demanded]

    def use(self, keys: Collection[ExpertKey], share: Callable[[ExpertKey], float]) -> None:
        """`keys` are demanded, and others may be in the same visit of their layer."""
        for key in keys:
            if key in self._unused:
                self._unused.remove(key)
                self.counts.used += 1
                self.counts.hidden += share(key)

    def leave(self, key: ExpertKey, share: float) -> None:
        """`key` is evicted, with `share` of it read."""
        if key in self._unused:
            self._unused.remove(key)
            self.counts.wasted += share
            self._foretold.get(key.layer, {}).pop(key, None)

    def cancel(self, key: ExpertKey, share: float) -> None:
        """The read of `key` is given up."""
        self.counts.cancelled += 1
        self.leave(key, share)

    def clear(self) -> None:
        """All slots are empty; what was not used is wasted."""
        self.counts.wasted += len(self._unused)
        self._unused.clear()
        self._foretold.clear()
        self._displaced.clear()


def begin_ahead(
    plan: AheadPlan,
    cache: ExpertCache,
    ledger: PrefetchLedger,
    running: AbstractSet[ExpertKey],
) -> Iterator[tuple[ExpertKey, Read]]:
    """The reads that `plan` comes to, each decided when it is asked for.

    Of `running`, what the layer that runs demanded, nothing makes room and nothing is read: what
    the cache's plan gave up of it may still be in use in its old slot. Nor does anything make room
    that was read ahead for a visit still to come.
    """
    keys = [key for key in plan.keys if key not in running]
    for key in keys[: max(0, plan.most)]:
        read = cache.prefetch(key, running | ledger.awaited, plan.is_worth)
        if read is None:
            return
        ledger.start(key, read[1])
        yield key, read
