"""Experts on their way to a closer tier before a layer asks for them."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.engine import EngineTimes, Progress
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.ahead_line import AheadRead
from moe_runtime.memory.stream import Event
from moe_runtime.scheduling.miss_plan import MissPlan
from moe_runtime.scheduling.prefetch import (
    AheadPlan,
    AheadPlanner,
    PrefetchCounts,
    PrefetchLedger,
    begin_ahead,
)

if TYPE_CHECKING:
    from moe_runtime.tiered_engine import TieredEngine


class TieredAhead:
    """Reads into host memory and copies from there to the device that nobody has demanded.

    A `planner`, once set, is asked after each layer. What it wants goes one tier at a time, behind
    all demand: a demand waits for one piece of a read at most, and for one copy, which cannot be
    taken back once it is queued, so that none is queued before the last one is over. Each tier has
    a ledger of what became of them. What is not for foresight is for the layer that has its turn.
    """

    def __init__(self, engine: "TieredEngine") -> None:
        self.planner: AheadPlanner | None = None
        self.reads, self.copies = PrefetchLedger(), PrefetchLedger()
        self.times = EngineTimes()
        self._engine = engine
        self._on_way: dict[ExpertKey, tuple[AheadRead, int]] = {}  # from disk, to a host slot
        self._copied: tuple[ExpertKey, Event] | None = None  # the last copy
        self._demanded_at: float | None = None  # by the last layer of the forward that runs
        self._busy_seconds = 0.0  # of disk and link, for what it demanded

    @property
    def cache(self) -> ExpertCache:
        """Of the device, where what is wanted must come to in the end."""
        return self._engine.cache

    @property
    def num_ahead(self) -> int:
        """Reads and copies that are not over."""
        return len(self._on_way) + self._is_copying()

    def read_ahead(self, plan: AheadPlan) -> None:
        """Begin what `plan` wants, between layers."""
        engine = self._engine
        with engine.turn:
            if engine.is_between_layers:
                try:
                    self._begin(plan)
                except BaseException:
                    engine.abandon()
                    raise

    def look(self) -> None:
        """A layer ended: ask the planner, and begin what it wants."""
        plan = None if self.planner is None else self.planner.plan(self.num_ahead)
        if plan is not None:
            self._begin(plan)

    def correct(self, keys: Sequence[ExpertKey]) -> None:
        """Before a layer's demand is planned: what is on its way for it is demanded from now on.

        What was foretold of the layer and is wrong leaves first, and at once if it was not begun.
        """
        self._sweep()
        if not keys or (self.reads.is_empty and self.copies.is_empty):
            return
        engine, line = self._engine, self._engine.source.ahead
        for key in self.copies.visit(keys, engine.cache, self._share_copied):
            engine.cache.demote(key)
        held = {key for key in keys if key in engine.cache or engine.is_on_host(key)}
        for key in self.reads.visit(keys, held, self._share_read):
            read = self._on_way.get(key)
            if read is None or read[0].has_started:
                engine.host_cache.demote(key)
                if read is not None:
                    line.demote(read[0])
            else:
                self._give_up(key)
        for key in keys:
            if key in self._on_way:
                line.promote(self._on_way.pop(key)[0])

    def left(
        self, device: Iterable[ExpertKey | None], host: Iterable[ExpertKey | None] = ()
    ) -> None:
        """These made room for others: nothing is on its way to their slots any more."""
        for key in device:
            if key is not None:
                self.copies.leave(key, self._share_copied(key))
        for key in host:
            if key is not None:
                self.reads.leave(key, self._share_read(key))
                self._cancel(key)

    def demanded(self, plan: MissPlan, stall_seconds: float) -> None:
        """A layer's routing is known: `plan` brings what it lacks, and compute waits so long.

        How long disk and link are at work is taken from the planner's costs.
        """
        costs, times, now = self._engine.planner.costs, self.times, time.perf_counter()
        if self._demanded_at is not None:
            idle_seconds = now - self._demanded_at - self._busy_seconds
            times.idle_seconds += max(0.0, idle_seconds)
        num_read = sum(miss.is_on_disk for miss in (*plan.copied, *plan.computed))
        self._demanded_at = now
        self._busy_seconds = len(plan.copied) * costs.copy.value + num_read * costs.read.value
        times.visits += 1
        times.stall_seconds += stall_seconds
        if costs.copy.num_samples:
            times.fetch_seconds += self._busy_seconds
            times.fetched += len(plan.copied)

    def start_clock(self) -> None:
        """What passed since the last layer was no time in which a forward ran."""
        self._demanded_at = None

    def progress(self) -> Progress:
        """What `since` looks back to."""
        return self.times.copy(), (self.reads.counts.copy(), self.copies.counts.copy())

    def since(self, before: Progress) -> tuple[EngineTimes, PrefetchCounts]:
        """Times and counts of what was done after `before`.

        Counts are in experts as a demand fetches them: a read or a copy is the part of one that it
        takes of its time.
        """
        times = self.times.since(before[0])
        reads, copies = (
            ledger.counts.since(counts)
            for ledger, counts in zip((self.reads, self.copies), before[1], strict=True)
        )
        costs = self._engine.planner.costs
        whole = times.fetch_seconds / times.fetched if times.fetched else 0.0
        read, copy = (costs.read.value / whole, costs.copy.value / whole) if whole else (1.0, 1.0)
        return times, PrefetchCounts(
            started=reads.started + copies.started,
            used=reads.used + copies.used,
            cancelled=reads.cancelled + copies.cancelled,
            hidden=read * reads.hidden + copy * copies.hidden,
            wasted=read * reads.wasted + copy * copies.wasted,
            regrets=read * reads.regrets + copy * copies.regrets,
        )

    def ahead_report(self) -> dict[str, Any]:
        """What became of reads and copies ahead, since loading."""
        both, slot_bytes = (self.reads, self.copies), self._engine.host_slots.slot_bytes
        return {
            "reads_ahead": sum(ledger.counts.started for ledger in both),
            "copies_ahead": self.copies.counts.started,
            "used": sum(ledger.counts.used for ledger in both),
            "cancelled": sum(ledger.counts.cancelled for ledger in both),
            "regrets": sum(ledger.counts.regrets for ledger in both),
            "wasted_bytes": int(
                sum(ledger.counts.wasted + ledger.num_unused for ledger in both) * slot_bytes
            ),
        }

    def stop(self) -> None:
        """Nothing is read any more that nobody demanded; what was to come leaves the caches."""
        for key, (read, _) in list(self._on_way.items()):
            if read.load.is_done:  # its slot tells whether it came
                del self._on_way[key]
            else:
                self.reads.cancel(key, self._share_read(key))
                self._cancel(key)

    def forget(self) -> None:
        """All slots are empty."""
        self.reads.clear()
        self.copies.clear()

    def _begin(self, plan: AheadPlan) -> None:
        """Bring what `plan` wants one tier closer, in its order, as far as tiers are idle."""
        engine, running = self._engine, self._engine.running
        with engine.deciding():
            self._sweep()
            most = plan.most
            if not self._is_copying():
                on_host = [key for key in plan.keys if engine.has_arrived(key)]
                most -= self._copy(AheadPlan(on_host, min(1, most), plan.is_worth))
            absent = [key for key in plan.keys if not engine.is_on_host(key)]
            wanted = AheadPlan(absent, most, plan.is_worth)
            for key, (slot, evicted) in begin_ahead(wanted, engine.host_cache, self.reads, running):
                self.left((), [evicted])
                self._read(key, slot)

    def _copy(self, plan: AheadPlan) -> int:
        """Queue one copy at most; how many it was."""
        engine = self._engine
        for key, (slot, evicted) in begin_ahead(plan, engine.cache, self.copies, engine.running):
            self.left([evicted])
            self._copied = key, engine.copy_ahead(key, slot)
            return 1
        return 0

    def _is_copying(self) -> bool:
        return self._copied is not None and not self._copied[1].is_done()

    def _read(self, key: ExpertKey, slot: int) -> None:
        engine = self._engine
        if not engine.can_fill_host(slot):  # the host must not wait for a copy or a read
            self.reads.cancel(key, 0.0)
            engine.host_cache.discard(key)
            return
        # In the books before it is in the line: an interrupt must not lose sight of it.
        read = engine.new_read_ahead(key, slot)
        self._on_way[key] = read, slot
        engine.source.ahead.append(read)

    def _sweep(self) -> None:
        """Learn which reads are over."""
        engine = self._engine
        for key, (read, slot) in list(self._on_way.items()):
            if not read.load.is_done:
                continue
            del self._on_way[key]
            if read.load.has_arrived:
                engine.finish_read(key, slot, may_wait=False)
            else:  # nobody asked for it: no error until somebody does
                self.reads.leave(key, 1.0)
                engine.forget_read(slot)
                engine.host_cache.discard(key)

    def _give_up(self, key: ExpertKey) -> None:
        """Cancel the read of `key`, whose host slot is free then."""
        self.reads.cancel(key, self._share_read(key))
        self._cancel(key)
        self._engine.host_cache.discard(key)

    def _cancel(self, key: ExpertKey) -> None:
        """Nothing is written to the host slot of `key` any more, if it was on its way."""
        if key in self._on_way:
            read, slot = self._on_way[key]
            self._engine.source.ahead.cancel(read)
            self._engine.forget_read(slot)
            del self._on_way[key]

    def _share_read(self, key: ExpertKey) -> float:
        return self._on_way[key][0].share_taken if key in self._on_way else 1.0

    def _share_copied(self, key: ExpertKey) -> float:
        """A copy under way tells nobody how far it is."""
        is_under_way = self._copied is not None and self._copied[0] == key and self._is_copying()
        return 0.0 if is_under_way else 1.0
