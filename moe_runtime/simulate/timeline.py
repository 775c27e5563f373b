"""Plays the accesses of a trace on three lanes: compute, copy to the device, and disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.predictions import Predictions
from moe_runtime.expert import ExpertKey
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.scheduling.prefetch import (
    AheadPlan,
    Forecaster,
    PrefetchLedger,
    begin_ahead,
    reads_that_fit,
)

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
    evicted before any use, or never used, in parts of an expert where a read was cut short.
    """

    seconds: float
    compute_seconds: float
    disk_seconds: float
    copy_seconds: float
    hits: int
    misses: int
    prefetches: int
    wasted: float
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
    following reads. With `is_prefetching` the disk, while no demand waits, reads what the policy
    wants, or for a policy without an opinion what `advice` foretells: in the order, in the place
    and with the corrections that the runtime has from the same code. A demand stops such a read at
    once, where in the runtime it waits for the piece under way. Lanes that are given are filled.
    """
    run = _Run(policy, num_slots, cost, lanes)
    told = None if advice is None else iter(advice)
    last_layer: int | None = None
    num_steps = 0
    for keys in visits:
        num_steps += last_layer is None or keys[0].layer <= last_layer
        last_layer = keys[0].layer
        if told is not None:
            run.forecaster.advise(next(told), last_layer)
        run.visit(keys)
        if is_prefetching:
            run.prefetch(keys)
    return run.result(num_steps)


class _Run:
    """Three lanes, each free from a time on, and the cache whose misses they serve."""

    def __init__(
        self, policy: EvictionPolicy, num_slots: int, cost: StepCost, lanes: Lanes | None
    ) -> None:
        self.cache = ExpertCache(num_slots, policy)
        self.forecaster = Forecaster(self.cache)
        self.ledger = PrefetchLedger()
        self.cost = cost
        self.lanes = lanes
        self.routed = 0.0  # when the layer that runs asked for its experts
        self.compute_free = self.copy_free = self.disk_free = 0.0
        self.compute_seconds = self.disk_seconds = self.copy_seconds = 0.0
        self.arrival: dict[ExpertKey, float] = {}  # of resident keys that may be on their way
        self.line: dict[ExpertKey, float] = {}  # read ahead of need: seconds that are left of each

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        self._compute(self.compute_free, self.cost.dense_seconds)
        self._read_line()
        self.routed = self.compute_free
        self._correct(keys)
        held, reads = self.cache.decide(keys)
        for key, slot in zip(keys, held, strict=True):
            if slot is not None and key in self.line:  # on its way already: first to arrive
                self._fetch(key, self.routed, self.line.pop(key))
        for _, evicted in reads:
            self._evict(evicted)
        for key, slot in zip(keys, held, strict=True):
            if slot is None:
                self._fetch(key, self.routed, self.cost.read_seconds)
        arrivals = sorted(self.arrival.pop(key, 0.0) for key in keys)
        for arrived in arrivals:
            self._compute(max(self.compute_free, arrived), self.cost.expert_seconds)

    def prefetch(self, keys: Sequence[ExpertKey]) -> None:
        """Until the next layer has routed, behind what this layer demanded."""
        routed_next = self.compute_free + self.cost.dense_seconds
        idle_seconds = routed_next - max(self.disk_free, self.routed)
        most = reads_that_fit(idle_seconds, self.cost.read_seconds) - len(self.line)
        plan = AheadPlan(self.forecaster.wanted(), most, self.forecaster.is_worth)
        for key, (_, evicted) in begin_ahead(plan, self.cache, self.ledger, set(keys)):
            self._evict(evicted)
            self.line[key] = self.cost.read_seconds

    def result(self, num_steps: int) -> Timeline:
        counts = self.cache.counts.values()
        ahead = self.ledger.counts
        return Timeline(
            seconds=self.compute_free,
            compute_seconds=self.compute_seconds,
            disk_seconds=self.disk_seconds,
            copy_seconds=self.copy_seconds,
            hits=sum(count.hits for count in counts),
            misses=sum(count.misses for count in counts),
            prefetches=ahead.started - ahead.cancelled,
            wasted=ahead.wasted + self.ledger.num_unused,
            num_steps=num_steps,
        )

    def _correct(self, keys: Sequence[ExpertKey]) -> None:
        for key in self.ledger.visit(keys, self.cache, self._share_read):
            left = self.line.pop(key, None)
            if left == self.cost.read_seconds > 0.0:  # not begun
                self.ledger.cancel(key, 0.0)
                self.cache.discard(key)
                continue
            self.cache.demote(key)
            if left is not None:
                self.line[key] = left

    def _share_read(self, key: ExpertKey) -> float:
        if not self.line.get(key):
            return 1.0
        return 1.0 - self.line[key] / self.cost.read_seconds

    def _compute(self, start: float, seconds: float) -> None:
        self.compute_free = start + seconds
        self.compute_seconds += seconds
        if self.lanes is not None:
            self.lanes.compute.append((start, self.compute_free))

    def _read_line(self) -> None:
        """What is ahead of need, one after the other, from when the last demand was read.

        Beside compute, which ends the later for it: each has its share of its speed.
        """
        compute_share, read_share = self.cost.compute_share, self.cost.read_share
        while self.line:
            start = max(self.disk_free, self.routed)
            work = self.compute_free - start  # left for compute, at its full speed
            if work <= 0.0:
                return
            key, left = next(iter(self.line.items()))
            lasts = left / read_share
            is_cut = lasts * compute_share > work
            if is_cut:
                lasts = work / compute_share
            if compute_share < 1.0:
                self._compute(self.compute_free, lasts * (1.0 - compute_share))
            self._read(start, lasts)
            if is_cut:
                self.line[key] = max(0.0, left - lasts * read_share)
                return
            del self.line[key]
            self._copy(key)

    def _fetch(self, key: ExpertKey, ready: float, seconds: float) -> None:
        self._read(max(ready, self.disk_free), seconds)
        self._copy(key)

    def _read(self, start: float, seconds: float) -> None:
        self.disk_free = start + seconds
        self.disk_seconds += seconds
        if self.lanes is not None:
            self.lanes.disk.append((start, self.disk_free))

    def _copy(self, key: ExpertKey) -> None:
        start = max(self.disk_free, self.copy_free)
        self.copy_free = start + self.cost.copy_seconds
        self.copy_seconds += self.cost.copy_seconds
        self.arrival[key] = self.copy_free
        if self.lanes is not None:
            self.lanes.copy.append((start, self.copy_free))

    def _evict(self, key: ExpertKey | None) -> None:
        if key is not None:
            self.ledger.leave(key, self._share_read(key))
            self.arrival.pop(key, None)
            self.line.pop(key, None)
