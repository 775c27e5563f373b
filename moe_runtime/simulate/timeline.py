"""Plays the accesses of a trace on three lanes: compute, copy to the device, and disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.predictions import Predictions
from moe_runtime.expert import ExpertKey
from moe_runtime.perf.step_cost import StepCost

Busy = tuple[float, float]  # from when to when, in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """When each lane was busy, in order."""

    compute: list[Busy] = field(default_factory=list)
    copy: list[Busy] = field(default_factory=list)
    disk: list[Busy] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What a run would have taken, simulated. Times in seconds over all steps.

    Hits and misses count what layers demanded; `prefetches` were read ahead and `wasted` of them
    evicted before any use, or never used.
    """

    seconds: float
    compute_seconds: float
    disk_seconds: float
    copy_seconds: float
    hits: int
    misses: int
    prefetches: int
    wasted: int
    num_steps: int

    @property
    def stall_seconds(self) -> float:
        """Compute waits for experts so long."""
        return max(0.0, self.seconds - self.compute_seconds)

    @property
    def bytes_fetched_experts(self) -> int:
        """Bytes read, in units of one expert's, used or not."""
        return self.misses + self.prefetches


def bound_seconds(compute_seconds: float, fewest_misses: int, cost: StepCost) -> float:
    """No policy takes less, whatever it predicts: the lanes alone, and the fewest reads.

    Belady's misses are the fewest fetches of any schedule, also of one that fetches ahead, as each
    such fetch can be put off to the use that it is for.
    """
    slower = max(cost.read_seconds, cost.copy_seconds)
    return max(compute_seconds, fewest_misses * slower)


def play(
    visits: Iterable[Sequence[ExpertKey]],
    policy: EvictionPolicy,
    num_slots: int,
    cost: StepCost,
    *,
    advice: Iterable[Predictions] | None = None,
    is_prefetching: bool = False,
    lanes: Lanes | None = None,
) -> Timeline:
    """Visit after visit: the dense part, then experts that are there, then others as they arrive.

    A layer's misses are known when its dense part is done, and are read one after another, copies
    following reads. With `is_prefetching` and a PLECPolicy the disk, while no demand waits, reads
    what the policy wants, in place of what it expects later than that. Such a read delays a demand
    by one expert's at most. Lanes that are given are filled.
    """
    run = _Run(policy, num_slots, cost, lanes)
    told = None if advice is None else iter(advice)
    last_layer: int | None = None
    num_steps = 0
    for keys in visits:
        num_steps += last_layer is None or keys[0].layer <= last_layer
        last_layer = keys[0].layer
        if told is not None:
            policy.advise(next(told))
        run.visit(keys)
        if is_prefetching and isinstance(policy, PLECPolicy):
            run.prefetch(policy, keys)
    return run.result(num_steps)


class _Run:
    """Three lanes, each free from a time on, and the cache whose misses they serve."""

    def __init__(
        self, policy: EvictionPolicy, num_slots: int, cost: StepCost, lanes: Lanes | None
    ) -> None:
        self.cache = ExpertCache(num_slots, policy)
        self.cost = cost
        self.lanes = lanes
        self.routed = 0.0  # when the layer that runs asked for its experts
        self.compute_free = self.copy_free = self.disk_free = 0.0
        self.compute_seconds = self.disk_seconds = self.copy_seconds = 0.0
        self.arrival: dict[ExpertKey, float] = {}  # of resident keys that may be on their way
        self.unused: set[ExpertKey] = set()  # prefetched, resident
        self.num_prefetches = self.num_wasted = 0

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        self._compute(self.compute_free, self.cost.dense_seconds)
        self.routed = self.compute_free
        held, reads = self.cache.decide(keys)
        for _, evicted in reads:
            self._evict(evicted)
        for key, slot in zip(keys, held, strict=True):
            if slot is None:
                self._fetch(key, self.routed)
        self.unused.difference_update(keys)
        arrivals = sorted(self.arrival.pop(key, 0.0) for key in keys)
        for arrived in arrivals:
            self._compute(max(self.compute_free, arrived), self.cost.expert_seconds)

    def prefetch(self, policy: PLECPolicy, keys: Sequence[ExpertKey]) -> None:
        """Until the next layer has routed."""
        pinned = set(keys)
        routed_next = self.compute_free + self.cost.dense_seconds
        for key in policy.wanted():
            if self.disk_free >= routed_next:
                break
            read = self.cache.prefetch(key, pinned, policy.is_sooner)
            if read is None:
                break
            self._evict(read[1])
            self.unused.add(key)
            self.num_prefetches += 1
            self._fetch(key, self.routed)  # behind what this layer demanded

    def result(self, num_steps: int) -> Timeline:
        counts = self.cache.counts.values()
        return Timeline(
            seconds=self.compute_free,
            compute_seconds=self.compute_seconds,
            disk_seconds=self.disk_seconds,
            copy_seconds=self.copy_seconds,
            hits=sum(count.hits for count in counts),
            misses=sum(count.misses for count in counts),
            prefetches=self.num_prefetches,
            wasted=self.num_wasted + len(self.unused),
            num_steps=num_steps,
        )

    def _compute(self, start: float, seconds: float) -> None:
        self.compute_free = start + seconds
        self.compute_seconds += seconds
        if self.lanes is not None:
            self.lanes.compute.append((start, self.compute_free))

    def _fetch(self, key: ExpertKey, ready: float) -> None:
        start = max(ready, self.disk_free)
        self.disk_free = start + self.cost.read_seconds
        self.disk_seconds += self.cost.read_seconds
        copied_from = max(self.disk_free, self.copy_free)
        self.copy_free = copied_from + self.cost.copy_seconds
        self.copy_seconds += self.cost.copy_seconds
        self.arrival[key] = self.copy_free
        if self.lanes is not None:
            self.lanes.disk.append((start, self.disk_free))
            self.lanes.copy.append((copied_from, self.copy_free))

    def _evict(self, key: ExpertKey | None) -> None:
        if key is not None:
            self.arrival.pop(key, None)
            if key in self.unused:
                self.unused.remove(key)
                self.num_wasted += 1
