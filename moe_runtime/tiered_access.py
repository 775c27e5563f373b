"""The experts of one layer during one forward, on their way through the tiers."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING

from moe_runtime.cache.cache import Access
from moe_runtime.engine import Weights
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.stream import Event, Stream

if TYPE_CHECKING:
    from moe_runtime.tiered_engine import TieredEngine


class _Stage(Enum):
    """How far a missing expert has come."""

    WAITING = "for its host slot"
    READING = "from disk into its host slot"
    ON_HOST = "read"
    DONE = "copied to the device, or computed: its host slot is not needed any more"


@dataclass(slots=True)
class _Journey:
    """A missing expert. `device` is None where the CPU computes it."""

    key: ExpertKey
    host: Access
    device: Access | None
    stage: _Stage
    # Experts of the same layer that have the slot it needs, until they are done with it.
    host_after: "_Journey | None" = None
    device_after: int | None = None


@dataclass(frozen=True, slots=True)
class TimedCopy:
    """Events before and after the copy of one expert."""

    start: Event
    end: Event


class TieredAccess:
    """What a layer asks for in one forward: experts on the device, or on the host for the CPU.

    `weights(expert)` blocks the host until the expert is in host memory and its copy is queued;
    kernels launched on `compute` afterwards find it on the device. `release(expert)` says that its
    kernels are launched, or its products computed. In a layer with more experts than slots the
    next one takes its place then.
    """

    def __init__(self, engine: "TieredEngine", layer: int, compute: Stream) -> None:
        self.layer = layer
        self.compute = compute
        self.copies: list[TimedCopy] = []
        self.keys: set[ExpertKey] = set()  # not to be evicted by what is fetched ahead
        self._engine = engine
        self.device_slots: dict[int, int] = {}  # of experts that the device computes
        self._journeys: dict[int, _Journey] = {}
        self._released: set[int] = set()
        self._is_used = False
        self._opened_at = time.perf_counter()

    def need(
        self,
        experts: Sequence[int],
        *,
        computed: Collection[int] = (),
        order: Sequence[int] | None = None,
    ) -> None:
        """Start to bring `experts` (ascending); once for a layer.

        The CPU computes `computed`, which must be missing; the others go to the device. `order` is
        that of the missing ones, in which they pass the link, where slots allow a choice.
        """
        engine = self._engine
        began = time.perf_counter()
        keys = [ExpertKey(self.layer, expert) for expert in experts]
        self.keys.update(keys)
        with engine.deciding():
            engine.read_use_log()
            engine.ahead.correct(keys)
            accesses = engine.cache.admit([k for k in keys if k.expert not in computed])
            # What the CPU computes was missing too.
            engine.cache.counts[self.layer].misses += len(computed)
            missing = [a.key.expert for a in accesses if not a.is_hit] + sorted(computed)
            if order is None or len(accesses) > engine.cache.num_slots:
                order = sorted(missing)  # waves: as the cache decided
            assert sorted(order) == sorted(missing), (order, missing)
            hosts = engine.host_cache.admit([ExpertKey(self.layer, e) for e in order])
            engine.ahead.left((a.evicted for a in accesses), (h.evicted for h in hosts))
        self._plan(accesses, hosts)
        for journey in self._journeys.values():
            self._advance(journey)
        if engine.watch is not None:
            engine.watch.planned(began, time.perf_counter())

    @property
    def max_together(self) -> int:
        """Experts whose weights may be held at a time."""
        return self._engine.device_slots.max_views

    def is_ready(self, expert: int) -> bool:
        """Whether `weights` or `host_weights` would return without a wait for the disk."""
        journey = self._journeys.get(expert)
        return journey is None or self._advance(journey)

    def weights(self, expert: int) -> Weights:
        """The parameters of `expert` on the device, by name. Raises ExpertReadError."""
        engine = self._engine
        self.await_device(expert)
        layout = engine.device_layout(self.layer)
        return engine.device_slots.weights(self.device_slots[expert], layout, self.compute)

    def await_device(self, expert: int) -> None:
        """Kernels launched from now on find `expert` in its slot. Raises ExpertReadError."""
        journey = self._journeys.get(expert)
        if journey is not None:
            assert journey.device is not None, f"the CPU computes {journey.key}"
            self._bring(journey)
        self._is_used = True
        self._engine.device_slots.await_arrival(self.device_slots[expert], self.compute)

    def pending(self) -> list[int]:
        """Missing experts that are not released, in the order in which they pass the link."""
        return [expert for expert in self._journeys if expert not in self._released]

    def await_host(self, expert: int) -> None:
        """Block until `expert` is in host memory, and on its way to the device if it goes there.

        Only for the first of `pending`, as others may need its slot. Raises ExpertReadError.
        """
        self._bring(self._journeys[expert])

    def host_weights(self, expert: int) -> Weights:
        """The parameters of `expert` in host memory, by name. Raises ExpertReadError."""
        engine = self._engine
        journey = self._journeys[expert]
        assert journey.device is None, f"{journey.key} goes to the device"
        self._bring(journey)
        self._is_used = True  # its outputs are copied from memory that the next layer writes
        return engine.host_slots.views(journey.host.slot, engine.blobs.layout(journey.key))

    def use_resident(self) -> None:
        """Kernels of this forward read any experts of the layer, by its table of slots."""
        num_experts = self._engine.tensor_map.layers[self.layer].num_experts
        self.keys.update(ExpertKey(self.layer, expert) for expert in range(num_experts))
        self._is_used = True

    def release(self, expert: int) -> None:
        """`expert` is used for this forward; its slot may be filled again."""
        self._released.add(expert)
        journey = self._journeys.get(expert)
        if journey is not None and journey.device is None:
            journey.stage = _Stage.DONE
        followers = [
            other
            for other in self._journeys.values()
            if other.device_after == expert or (journey is not None and other.host_after is journey)
        ]
        if any(other.device_after == expert for other in followers):
            self._engine.mark_used(self.layer, self.compute)
        for follower in followers:
            self._advance(follower)

    def __enter__(self) -> "TieredAccess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        engine = self._engine
        try:
            if error is not None:
                engine.abandon()
                return
            if self._is_used:
                engine.mark_used(self.layer, self.compute)
            self._leave_unused()
            engine.end_layer([j.key for j in self._journeys.values() if j.device is None])
        finally:
            if engine.watch is not None:
                experts = {*self.device_slots, *self._journeys}
                engine.watch.visited(self.layer, experts, self._opened_at, time.perf_counter())
            engine.turn.release()

    def _plan(self, accesses: Sequence[Access], hosts: Sequence[Access]) -> None:
        """Who needs which slot after whom: the one who had it may be of this very layer."""
        devices: dict[ExpertKey, Access] = {}
        after: dict[ExpertKey, int] = {}
        passed: set[ExpertKey] = set()
        for access in accesses:
            self.device_slots[access.key.expert] = access.slot
            if not access.is_hit:
                devices[access.key] = access
                if access.evicted in passed:
                    after[access.key] = access.evicted.expert
            passed.add(access.key)
        for host in hosts:
            before = None if host.evicted is None else self._journeys.get(host.evicted.expert)
            if before is not None and before.key != host.evicted:
                before = None
            self._journeys[host.key.expert] = _Journey(
                host.key,
                host,
                devices.get(host.key),
                _Stage.READING if host.is_hit else _Stage.WAITING,
                None if host.is_hit else before,
                after.get(host.key),
            )

    def _bring(self, journey: _Journey) -> None:
        """Wait for `journey`, once nothing else can go on."""
        if not self._advance(journey):
            for other in self._journeys.values():
                self._advance(other)
            self._advance(journey, may_wait=True)

    def _advance(self, journey: _Journey, *, may_wait: bool = False) -> bool:
        """Go as far as possible; whether its user need not wait for the disk any more."""
        engine, key, slot = self._engine, journey.key, journey.host.slot
        if journey.stage is _Stage.WAITING:
            before = journey.host_after
            if before is not None and before.stage is not _Stage.DONE:
                assert not may_wait, f"{key} waits for the release of {before.key}"
                return False
            if may_wait:
                engine.free_host_slot(slot)
            elif not engine.host_slots.is_free(slot):
                return False
            engine.start_read(key, slot)
            journey.stage = _Stage.READING
        if journey.stage is _Stage.READING:
            if not engine.finish_read(key, slot, may_wait=may_wait):
                return False
            journey.stage = _Stage.ON_HOST
        if journey.stage is _Stage.ON_HOST and journey.device is not None:
            if journey.device_after is not None and journey.device_after not in self._released:
                assert not may_wait, f"{key} waits for the release of {journey.device_after}"
                return False
            self._copy(journey, journey.device)
        return True

    def _copy(self, journey: _Journey, device: Access) -> None:
        events = self._engine.copy(
            journey.key,
            host_slot=journey.host.slot,
            device_slot=device.slot,
            stream=self._engine.streams.demand,
        )
        self.copies.append(TimedCopy(*events))
        self._engine.counts.num_copied += 1
        journey.stage = _Stage.DONE

    def _leave_unused(self) -> None:
        """Experts that the layer asked for, and never used, may be half way."""
        for journey in self._journeys.values():
            if journey.stage is _Stage.DONE:
                continue
            if journey.device is not None:
                self._engine.cache.discard(journey.key)
            if journey.stage is _Stage.WAITING:
                self._engine.host_cache.discard(journey.key)


class HostAccess:
    """Experts that the CPU computes, as a LayerMath wants them."""

    def __init__(self, access: TieredAccess, max_together: int) -> None:
        self._access = access
        self.max_together = max_together

    def is_ready(self, expert: int) -> bool:
        return self._access.is_ready(expert)

    def weights(self, expert: int) -> Weights:
        return self._access.host_weights(expert)

    def release(self, expert: int) -> None:
        self._access.release(expert)
