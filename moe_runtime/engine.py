"""Owns slots, cache and disk threads, and hands layers the experts they need."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from moe_runtime.cache.cache import Access, ExpertCache
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.errors import OffloadedExpertsError
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.ahead_line import AheadRead
from moe_runtime.memory.blob_map import BlobMap
from moe_runtime.memory.disk import DiskReader
from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.read_watch import ReadWatch
from moe_runtime.memory.slots import Slots
from moe_runtime.memory.tensor_map import TensorMap
from moe_runtime.recording.engine_watch import EngineWatch
from moe_runtime.scheduling.prefetch import (
    AheadPlan,
    AheadPlanner,
    PrefetchCounts,
    PrefetchLedger,
    begin_ahead,
)

Weights = Mapping[str, torch.Tensor]


@dataclass(slots=True)
class EngineTimes:
    """Seconds so far, over all visits of layers.

    `inside_seconds` passed between the demand of a layer and its end, `stall_seconds` of them in
    waiting.
    `idle_seconds` passed from when a layer had all its experts to when the next one asked for its
    own: the disk has nothing demanded to read. `fetch_seconds` passed from a demand to the arrival
    of the last of the `fetched` experts that were read for it.
    """

    visits: int = 0
    inside_seconds: float = 0.0
    stall_seconds: float = 0.0
    idle_seconds: float = 0.0
    fetch_seconds: float = 0.0
    fetched: int = 0

    def since(self, other: "EngineTimes") -> "EngineTimes":
        """What was added after `other`."""
        return EngineTimes(
            visits=self.visits - other.visits,
            inside_seconds=self.inside_seconds - other.inside_seconds,
            stall_seconds=self.stall_seconds - other.stall_seconds,
            idle_seconds=self.idle_seconds - other.idle_seconds,
            fetch_seconds=self.fetch_seconds - other.fetch_seconds,
            fetched=self.fetched - other.fetched,
        )

    def copy(self) -> "EngineTimes":
        return self.since(EngineTimes())


# Times, and what became of reads ahead, at some moment.
Progress = tuple[EngineTimes, tuple[PrefetchCounts, ...]]


class ExpertEngine:
    """The experts of one model: files behind a cache of slots.

    Not shared between models. One layer runs at a time; a second thread waits its turn. `poison`
    fills a slot with NaN before it is read into, so that a race shows in the output (tests).
    `blobs` says what slots hold, if not experts as `tensor_map` has them. A `planner`, once set, is
    asked what to read ahead of need: behind all demand, never in place of what the layer that runs
    needs, and with no say in what is computed. A `watch`, once set, hears of every layer.
    """

    def __init__(
        self,
        tensor_map: TensorMap,
        slots: Slots,
        policy: EvictionPolicy,
        reader: DiskReader,
        *,
        blobs: BlobMap | None = None,
        poison: bool = False,
    ) -> None:
        self.tensor_map = tensor_map
        self.blobs: BlobMap = tensor_map if blobs is None else blobs
        self.slots = slots
        self.cache = ExpertCache(slots.num_slots, policy)
        self.reader = reader
        self.planner: AheadPlanner | None = None
        self.watch: EngineWatch | None = None
        self.groups_to_come = 0  # of a pass, each of which asks for the layer that runs
        self.ledger = PrefetchLedger()
        self.times = EngineTimes()
        self._poison = poison
        self._loads: dict[ExpertKey, ExpertLoad] = {}  # not yet known to be done
        self._ahead: dict[ExpertKey, AheadRead] = {}  # those of them that nobody demanded
        self._pinned: frozenset[ExpertKey] = frozenset()  # what the layer that runs needs
        self._idle_since: float | None = None  # when the last demand was met
        # Re-entrant: an interrupt between taking a turn and using it must not block close().
        self._turn = threading.RLock()
        self._is_closed = False
        self._is_open = False  # between a layer's start and its orderly end
        self._is_planning = False  # so is the cache, while reads ahead change it

    def open_layer(self, layer: int, experts: Sequence[int]) -> "LayerAccess":
        """Start reading what is missing of `experts` (ascending) of `layer`; use it in a `with`."""
        self._turn.acquire()
        try:
            if self._is_closed:
                raise OffloadedExpertsError(
                    "the experts of this model were released by close(); load the model again"
                )
            watch = self.watch
            began = 0.0 if watch is None else time.perf_counter()
            # An interrupt cut short its start, the clean-up after its end, or a read ahead.
            if self._is_open or self._is_planning:
                self._reset()
            self._is_open = True
            keys = [ExpertKey(layer, expert) for expert in experts]
            self._pinned = frozenset(keys)
            self._correct(keys)
            access = LayerAccess(self, keys)
            self._look_ahead()
            if watch is not None:
                watch.planned(began, time.perf_counter())
            return access
        except BaseException:
            self._turn.release()
            raise

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the disk so far, alignment included."""
        return self.reader.bytes_read

    def set_watch(self, watch: EngineWatch | None, reads: ReadWatch | None) -> None:
        """Tell `watch` of layers and `reads` of the disk's reads, from now on."""
        self.watch, self.reader.watch = watch, reads

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def read_ahead(self, plan: AheadPlan) -> None:
        """Begin to read what `plan` wants, between layers."""
        with self._turn:
            if not (self._is_closed or self._is_open or self._is_planning):
                self._pinned = frozenset()
                self._begin_ahead(plan)

    def warm(self, keys: Sequence[ExpertKey]) -> None:
        """Begin to read `keys`, the hottest first, into free slots, behind all demand."""
        with self._turn:
            free = [key for key in keys if key not in self.cache][: self.slots.num_slots]
            self._is_planning = True
            for key in free:
                read = self.cache.prefetch(key, frozenset(), lambda key, victim: False)
                if read is None:
                    break
                self._start_ahead(key, read[0])
            for key in reversed(free):  # the hottest is the last to leave
                if key in self.cache:
                    self.cache.policy.touch(key)
            self._is_planning = False

    def give_up_all(self) -> list[ExpertKey]:
        """Empty the books; returns what was in slots, in reverse order of how it would leave."""
        with self._turn:
            keys = self.cache.give_up_all()
            self._is_planning = True  # slots and books disagree: the next layer starts anew
            return keys

    def blob_bytes(self, key: ExpertKey) -> int:
        """Of `key` as a slot holds it."""
        return self.blobs.layout(key).stored_bytes

    def resident_blob(self, key: ExpertKey) -> torch.Tensor | None:
        """The bytes of `key` (uint8), or None if they are in no slot; valid until a layer runs."""
        with self._turn:
            if self._is_closed or self._is_open or self._is_planning or key not in self.cache:
                return None
            load = self._loads.get(key)
            if load is not None:
                load.settle()  # sync: the reads of one expert
                if not load.has_arrived:
                    return None
            blob = self.slots.blob(self.cache.slot(key))
            return torch.from_numpy(blob)[: self.blob_bytes(key)]

    def accept(self, key: ExpertKey, blob: torch.Tensor) -> None:
        """Put the bytes of the absent `key` into a slot, if one is free."""
        with self._turn:
            read = self.cache.prefetch(key, frozenset(), lambda key, victim: False)
            if read is not None:
                target = self.slots.blob(read[0])
                torch.from_numpy(target)[: len(blob)].copy_(blob)
                self.slots.commit(read[0], target)

    def forget(self, key: ExpertKey) -> None:
        """Free the slot of `key`, if it has one."""
        with self._turn:
            if key in self.cache:
                self._leave_slot(key)
                self.cache.discard(key)

    @property
    def num_ahead(self) -> int:
        """Reads in line that nobody has demanded."""
        return len(self.reader.ahead)

    def progress(self) -> Progress:
        """What `since` looks back to."""
        return self.times.copy(), (self.ledger.counts.copy(),)

    def since(self, before: Progress) -> tuple[EngineTimes, PrefetchCounts]:
        """Times and counts of what was done after `before`."""
        times, (counts,) = before
        return self.times.since(times), self.ledger.counts.since(counts)

    def ahead_report(self) -> dict[str, Any]:
        """What became of reads ahead, since loading."""
        counts = self.ledger.counts
        return {
            "reads_ahead": counts.started,
            "used": counts.used,
            "cancelled": counts.cancelled,
            "regrets": counts.regrets,
            "wasted_bytes": int((counts.wasted + self.ledger.num_unused) * self.slots.slot_bytes),
        }

    def start_clock(self) -> None:
        """What passed since the last layer was no time in which a forward ran."""
        self._idle_since = time.perf_counter()

    def close(self) -> None:
        """End the threads, close the files and free the slots. Safe to call twice."""
        with self._turn:
            if not self._is_closed:
                self._is_closed = True
                self.reader.close()
                self.slots.close()

    def _look_ahead(self) -> None:
        plan = None if self.planner is None else self.planner.plan(len(self.reader.ahead))
        if plan is not None:
            self._begin_ahead(plan)

    def _begin_ahead(self, plan: AheadPlan) -> None:
        self._is_planning = True
        for key, (slot, evicted) in begin_ahead(plan, self.cache, self.ledger, self._pinned):
            if evicted is not None:
                self._leave_slot(evicted)
            self._start_ahead(key, slot)
        self._is_planning = False

    def _correct(self, keys: Sequence[ExpertKey]) -> None:
        """Before a layer's demand is planned: take back what was foretold of it and is wrong.

        What was not begun leaves its slot; the rest is read after all others, and leaves first.
        """
        for key, read in list(self._ahead.items()):
            if read.load.is_done:
                del self._ahead[key]
                if not read.load.has_arrived:  # nobody asked for it: no error until somebody does
                    self._loads.pop(key, None)
                    self.cache.discard(key)
        if not keys or self.ledger.is_empty:
            return
        if self.groups_to_come:  # they may use what this one does not
            self.ledger.use(keys, self._share_read)
            return
        for key in self.ledger.visit(keys, self.cache, self._share_read):
            wrong = self._ahead.get(key)
            if wrong is None or wrong.has_started:
                self.cache.demote(key)
                if wrong is not None:
                    self.reader.ahead.demote(wrong)
            else:
                self._give_up(key)

    def _share_read(self, key: ExpertKey) -> float:
        return self._ahead[key].share_taken if key in self._ahead else 1.0

    def _start_load(self, key: ExpertKey, slot: int) -> None:
        if self._poison:
            self.slots.poison(slot)
        blob = self.slots.blob(slot)
        # In the books before it starts: an interrupt must not lose sight of bytes on their way.
        load = self._loads[key] = ExpertLoad()
        self.reader.submit(
            self.blobs.extents(key),
            self.blobs.layout(key),
            blob,
            load,
            on_complete=lambda: self.slots.commit(slot, blob),
        )

    def _start_ahead(self, key: ExpertKey, slot: int) -> None:
        if self._poison:
            self.slots.poison(slot)
        blob = self.slots.blob(slot)
        load = ExpertLoad()
        read = self._ahead[key] = self.reader.ahead_read(
            self.blobs.extents(key),
            self.blobs.layout(key),
            blob,
            load,
            on_complete=lambda: self.slots.commit(slot, blob),
        )
        self._loads[key] = load
        self.reader.ahead.append(read)

    def _demand(self, key: ExpertKey) -> None:
        """`key` is in a slot, or on its way there as nobody's: now it is a layer's."""
        read = self._ahead.pop(key, None)
        if read is not None:
            self.reader.ahead.promote(read)

    def _leave_slot(self, key: ExpertKey) -> None:
        """`key` was evicted: nothing may be written to its slot any more."""
        self.ledger.leave(key, self._share_read(key))
        self._drop_load(key)

    def _give_up(self, key: ExpertKey) -> None:
        """Cancel the read ahead of `key`, whose slot is free then."""
        self.ledger.cancel(key, self._share_read(key))
        self._drop_load(key)
        self.cache.discard(key)

    def _drop_load(self, key: ExpertKey) -> None:
        """Whatever is on its way for `key` arrives or is cancelled, and is forgotten."""
        read = self._ahead.get(key)
        if read is not None:
            self.reader.ahead.cancel(read)
            self._loads.pop(key, None)
            del self._ahead[key]
            return
        load = self._loads.get(key)
        if load is not None:
            load.settle()
            del self._loads[key]

    def _reset(self) -> None:
        """Forget every expert: the plan of the last layer may be half made."""
        for key in {*self._ahead, *self._loads}:
            self._drop_load(key)
        self.ledger.clear()
        self.cache.clear()
        self._is_open = self._is_planning = False


class LayerAccess:
    """The experts of one layer during one forward, in ascending order of use.

    `weights(expert)` blocks until that expert is in its slot; `release(expert)` says that it is
    used, which in a layer with more experts than slots lets the next one be read into its place.
    """

    def __init__(self, engine: ExpertEngine, keys: list[ExpertKey]) -> None:
        self._engine = engine
        self._waiting: dict[ExpertKey, Access] = {}  # by the key whose release they need
        self._accesses: dict[int, Access] = {}
        self._started: set[ExpertKey] = set()
        self._demanded_at = self._met_at = time.perf_counter()
        if engine._idle_since is not None:
            engine.times.idle_seconds += self._demanded_at - engine._idle_since
        self._start(engine.cache.admit(keys))

    @property
    def max_together(self) -> int:
        """Experts whose weights may be held at a time."""
        return self._engine.slots.max_views

    def is_ready(self, expert: int) -> bool:
        """Whether `weights(expert)` would return at once."""
        access = self._accesses[expert]
        if not access.is_hit and access.key not in self._started:
            return False
        load = self._engine._loads.get(access.key)
        return load is None or load.is_done

    def weights(self, expert: int) -> Weights:
        """The parameters of `expert` by name, once they are in its slot. Raises ExpertReadError."""
        access = self._accesses[expert]
        assert access.is_hit or access.key in self._started, f"{access.key} waits for a release"
        load = self._engine._loads.get(access.key)
        if load is not None:
            if not load.is_done:
                waits_from = time.perf_counter()
                load.settle()  # sync: the reads of one expert
                waits_until = time.perf_counter()
                self._engine.times.stall_seconds += waits_until - waits_from
                if self._engine.watch is not None:
                    self._engine.watch.waited(waits_from, waits_until)
            load.wait()
            self._met_at = max(self._met_at, load.done_at)
            self._engine._loads.pop(access.key, None)
        return self._engine.slots.views(access.slot, self._engine.blobs.layout(access.key))

    def release(self, expert: int) -> None:
        """`expert` is used for this forward; its slot may be read into."""
        access = self._accesses[expert]
        waiting = self._waiting.pop(access.key, None)
        if waiting is not None:
            self._begin(waiting)

    def __enter__(self) -> "LayerAccess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._abandon()
            self._engine._is_open = False
            self._account()
            if error is None:
                self._engine._look_ahead()
        finally:
            self._engine._turn.release()

    def _account(self) -> None:
        times = self._engine.times
        ended = time.perf_counter()
        times.visits += 1
        times.inside_seconds += ended - self._demanded_at
        watch = self._engine.watch
        if watch is not None and self._accesses:
            layer = next(iter(self._accesses.values())).key.layer
            watch.visited(layer, self._accesses.keys(), self._demanded_at, ended)
        if self._started:
            times.fetch_seconds += self._met_at - self._demanded_at
            times.fetched += len(self._started)
        self._engine._idle_since = self._met_at

    def _start(self, accesses: list[Access]) -> None:
        for access in accesses:  # on its way already: first to arrive
            if access.is_hit:
                self._engine._demand(access.key)
        passed: set[ExpertKey] = set()
        for access in accesses:
            self._accesses[access.key.expert] = access
            if not access.is_hit:
                if access.evicted in passed:
                    self._waiting[access.evicted] = access
                else:
                    self._begin(access)
            passed.add(access.key)

    def _begin(self, access: Access) -> None:
        if access.evicted is not None:
            self._engine._leave_slot(access.evicted)
        self._engine._start_load(access.key, access.slot)
        self._started.add(access.key)

    def _abandon(self) -> None:
        """After an error or an interrupt: forget what never arrived, keep what did."""
        for key in list(self._engine._ahead):
            self._engine._give_up(key)
        for access in self._accesses.values():
            if not access.is_hit and access.key not in self._started:
                self._engine.cache.discard(access.key)
        for key in list(self._engine._loads):
            load = self._engine._loads[key]
            load.settle()
            if not load.has_arrived:
                self._engine.cache.discard(key)
            del self._engine._loads[key]
