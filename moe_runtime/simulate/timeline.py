"""Plays the accesses of a trace on three lanes: compute, copy to the device, and disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.predictions import Predictions
from moe_runtime.expert import ExpertKey
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.scheduling.benefit import MEAN_RATE, Means
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
    and with the corrections that the runtime has from the same code. A demand waits for
    the piece that is read ahead just then. Lanes that are given are filled.
    """
    run = Playback(policy, num_slots, cost, lanes)
    told = None if advice is None else iter(advice)
    for keys in visits:
        run.visit(keys, None if told is None else next(told), is_prefetching=is_prefetching)
    return run.result()


class ReadPace:
    """How many reads ahead fit between two demands: by means over forwards, as in the runtime."""

    def __init__(self) -> None:
        self._means = Means()
        self._visits = self._fetched = 0
        self._idle_seconds = self._fetch_seconds = 0.0

    @property
    def reads_that_fit(self) -> int:
        idle_seconds = self._means["idle"] / max(1.0, self._means["visits"])
        return reads_that_fit(idle_seconds, self._means["read"])

    def add(self, idle_seconds: float, num_read: int, fetch_seconds: float) -> None:
        """A layer demanded `num_read` absent experts, which all came in `fetch_seconds`."""
        self._visits += 1
        self._idle_seconds += idle_seconds
        if num_read:
            self._fetched += num_read
            self._fetch_seconds += fetch_seconds

    def end_forward(self) -> None:
        """Learn from the visits since the last end."""
        if self._visits:
            self._means.add(MEAN_RATE, visits=self._visits, idle=self._idle_seconds)
        if self._fetched:
            self._means.add(MEAN_RATE, read=self._fetch_seconds / self._fetched)
        self._visits = self._fetched = 0
        self._idle_seconds = self._fetch_seconds = 0.0


class Playback:
    """Three lanes, each free from a time on, and the cache whose misses they serve."""

    def __init__(
        self, policy: EvictionPolicy, num_slots: int, cost: StepCost, lanes: Lanes | None = None
    ) -> None:
        self.cache = ExpertCache(num_slots, policy)
        self.forecaster = Forecaster(self.cache)
        self.ledger = PrefetchLedger()
        self.cost = cost
        self.lanes = lanes
        self.num_steps = 0
        self.last_layer: int | None = None
        self.pace = ReadPace()
        self.routed = self.met = 0.0  # when the layer that runs asked for its experts, and had them
        self.idle_since = 0.0
        self.compute_free = self.copy_free = self.disk_free = 0.0
        self.compute_seconds = self.disk_seconds = self.copy_seconds = 0.0
        self.arrival: dict[ExpertKey, float] = {}  # of resident keys that may be on their way
        self.line: dict[ExpertKey, float] = {}  # read ahead of need: seconds that are left of each

    def visit(
        self, keys: Sequence[ExpertKey], told: Predictions | None = None, *, is_prefetching: bool
    ) -> None:
        """One layer that demands `keys`, with what is `told` of later ones, as `play` says."""
        layer = keys[0].layer
        if self.last_layer is None or layer <= self.last_layer:
            self.num_steps += 1
            self.pace.end_forward()
            if self.cost.outer_seconds:
                self._compute(self.compute_free, self.cost.outer_seconds)
                self._read_line()
            self.idle_since = self.compute_free
        self.last_layer = layer
        if told is not None:
            self.forecaster.advise(told, layer)
        num_read = self._demand(keys)
        if is_prefetching:
            self.pace.add(self.routed - self.idle_since, num_read, self.met - self.routed)
            self._prefetch(keys)
        self.idle_since = self.met

    def result(self) -> Timeline:
        """All visits so far."""
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
            num_steps=self.num_steps,
        )

    def _demand(self, keys: Sequence[ExpertKey]) -> int:
        """How many of `keys` are read."""
        self._compute(self.compute_free, self.cost.dense_seconds)
        self._read_line()
        self.routed = self.met = self.compute_free
        self._end_piece()
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
        self.met = max(self.met, arrivals[-1])
        for arrived in arrivals:
            self._compute(max(self.compute_free, arrived), self.cost.expert_seconds)
        return len(reads)

    def _prefetch(self, keys: Sequence[ExpertKey]) -> None:
        """Once the layer's demand is known, and once more when it has run."""
        self._plan(keys)
        self._read_line()
        self._plan(keys)

    def _plan(self, keys: Sequence[ExpertKey]) -> None:
        most = self.pace.reads_that_fit - len(self.line)
        plan = AheadPlan(self.forecaster.wanted(), most, self.forecaster.is_worth)
        for key, (_, evicted) in begin_ahead(plan, self.cache, self.ledger, set(keys)):
            self._evict(evicted)
            self.line[key] = self.cost.read_seconds

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

    def _end_piece(self) -> None:
        """A layer has routed: what is under way of the first in line is read to its end."""
        if not self.line or not self.cost.piece_seconds:
            return
        key, left = next(iter(self.line.items()))
        rest = min(left, -(self.cost.read_seconds - left) % self.cost.piece_seconds)
        if rest:
            self._read(max(self.disk_free, self.routed), rest)
            self.line[key] = left - rest
        if not self.line[key]:
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
