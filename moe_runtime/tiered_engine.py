"""Owns the tiers of experts below a device: its slots, pinned host memory, disk."""

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.errors import OffloadedExpertsError
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.ahead_line import AheadRead
from moe_runtime.memory.blob_map import BlobMap
from moe_runtime.memory.device_slots import DeviceSlots
from moe_runtime.memory.expert_source import ExpertSource, Load
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.pinned_buffer import PinnedBuffer
from moe_runtime.memory.pinned_slots import PinnedSlots
from moe_runtime.memory.read_watch import ReadWatch
from moe_runtime.memory.stream import Event, Stream, Streams
from moe_runtime.memory.tensor_map import TensorMap
from moe_runtime.memory.use_log import UseLog
from moe_runtime.recording.engine_watch import EngineWatch
from moe_runtime.scheduling.miss_planner import MissPlanner
from moe_runtime.tiered_access import TieredAccess
from moe_runtime.tiered_ahead import TieredAhead


@dataclass(slots=True)
class TransferCounts:
    """What the tiers did so far."""

    num_layers: int = 0  # forwards of a layer
    num_syncs: int = 0  # times that the host waited for the device
    num_copied: int = 0  # missing experts that were copied to the device
    num_computed: int = 0  # missing experts that the CPU computed
    num_prefetched: int = 0  # experts copied to the device before they were asked for
    copied_bytes: int = 0  # of experts, from host memory to the device


class TieredEngine:
    """The experts of one model: files behind host memory behind slots on a device.

    Not shared between models. One layer runs at a time; a second thread waits its turn. No slot is
    written while a copy or a kernel may touch it: events order streams, and the host waits only
    before the disk writes to a host slot that a copy still reads. `blobs` says what host slots hold
    and the link carries, if not experts as `tensor_map` has them. `poison` fills slots with NaN
    before they are written, so that a race shows in the output (tests).
    """

    def __init__(
        self,
        tensor_map: TensorMap,
        streams: Streams,
        source: ExpertSource,
        device_slots: DeviceSlots,
        host_slots: PinnedSlots,
        policy: EvictionPolicy,
        planner: MissPlanner,
        *,
        blobs: BlobMap | None = None,
        poison: bool = False,
    ) -> None:
        self.tensor_map = tensor_map
        self.blobs: BlobMap = tensor_map if blobs is None else blobs
        self.streams = streams
        self.device_slots = device_slots
        self.host_slots = host_slots
        self.cache = ExpertCache(device_slots.num_slots, policy)
        self.host_cache = ExpertCache(host_slots.num_slots, LRUPolicy())
        self.planner = planner
        self.ahead = TieredAhead(self)
        self.watch: EngineWatch | None = None
        self.counts = TransferCounts()
        self.buffers = {name: PinnedBuffer(streams) for name in ("routing", "inputs", "outputs")}
        # Re-entrant: an interrupt between taking a turn and using it must not block close().
        self.turn = threading.RLock()
        self.source = source
        self._poison = poison
        self._is_closed = False
        self._is_open = False  # between a layer's start and its orderly end
        self._is_deciding = False  # books of a cache may be half changed
        self._current: TieredAccess | None = None
        self._reads: dict[int, tuple[ExpertKey, Load]] = {}  # by host slot, not known to be done
        # What slots hold for certain: set once the bytes are there, or on their way in a stream.
        self._device_keys: list[ExpertKey | None] = [None] * device_slots.num_slots
        self._host_keys: list[ExpertKey | None] = [None] * host_slots.num_slots
        self._used: dict[int, Event] = {}  # behind the last kernels of each layer
        self._last_used: Event | None = None
        self._tables: dict[int, torch.Tensor] = {}  # slots of layers that the device holds whole
        self._use_log = UseLog(max(layer.num_experts for layer in tensor_map.layers), streams)
        self._seen_on_host: OrderedDict[ExpertKey, None] = OrderedDict()  # oldest first

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the disk so far, alignment included."""
        return self.source.bytes_read

    def set_watch(self, watch: EngineWatch | None, reads: ReadWatch | None) -> None:
        """Tell `watch` of layers and `reads` of the disk's reads, from now on."""
        self.watch = watch
        self.source.set_watch(reads)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def open_layer(self, layer: int, experts: Sequence[int] = ()) -> TieredAccess:
        """One forward of `layer`; use it in a `with`. `experts` (ascending) go to the device."""
        self.turn.acquire()
        try:
            if self._is_closed:
                raise OffloadedExpertsError(
                    "the experts of this model were released by close(); load the model again"
                )
            if self._is_open:  # an interrupt cut short its start, or the clean-up after its end
                self._reset()
            self._is_open = True
            self.counts.num_layers += 1
            compute = self.streams.compute()
            if self._last_used is not None:
                # Another thread may compute on another stream: it must not overtake.
                compute.wait_event(self._last_used)  # sync: of streams
            access = TieredAccess(self, layer, compute)
            if experts:
                access.need(experts)
            self._current = access
            return access
        except BaseException:
            self.turn.release()
            raise

    @property
    def is_between_layers(self) -> bool:
        """Whether no layer runs, and none was cut short."""
        return not (self._is_closed or self._is_open or self._is_deciding)

    def fill(self) -> None:
        """Read as many experts as the device holds, layer by layer, each layer's side by side."""
        room = self.device_slots.num_slots
        for layer, experts in enumerate(self.tensor_map.layers):
            if experts.num_experts > room:
                break
            room -= experts.num_experts
            with self.open_layer(layer, range(experts.num_experts)) as access:
                for expert in range(experts.num_experts):
                    access.await_device(expert)
                    access.release(expert)

    def close(self) -> None:
        """Wait for what is under way, end the threads and free the memory. Safe to call twice."""
        with self.turn:
            if self._is_closed:
                return
            self._is_closed = True
            self.source.close()
            self.streams.synchronize()  # sync: memory must outlive copies and kernels
            self._tables.clear()
            self._use_log.close()
            self.device_slots.close()
            self.host_slots.close()
            for buffer in self.buffers.values():
                buffer.close()

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Around decisions of the caches: one that is cut short leaves nothing to rely on."""
        self._is_deciding = True
        yield
        self._is_deciding = False

    def wait(self, event: Event) -> None:
        """Block the host until `event`, and count it."""
        self.counts.num_syncs += 1
        event.wait()  # sync: counted

    # What follows is for the layer that has its turn.

    def device_layout(self, layer: int) -> ExpertLayout:
        """How experts of `layer` stand in device slots: as on the host, but none stays packed."""
        experts = self.tensor_map.layers[layer]
        return experts.layout if experts.scaled is None else self.blobs.layout(ExpertKey(layer, 0))

    def is_on_host(self, key: ExpertKey) -> bool:
        """Whether host memory holds `key`, or will without being asked again."""
        return key in self.host_cache

    def has_arrived(self, key: ExpertKey) -> bool:
        """Whether the bytes of `key` are in host memory. Never blocks."""
        if key not in self.host_cache:
            return False
        slot = self.host_cache.slot(key)
        if slot in self._reads:
            read_key, load = self._reads[slot]
            if read_key == key and load.has_arrived:
                self.finish_read(key, slot, may_wait=False)
        return self._host_keys[slot] == key

    @property
    def running(self) -> AbstractSet[ExpertKey]:
        """What the layer that runs demanded."""
        return frozenset() if self._current is None else self._current.keys

    def slot_table(self, layer: int, compute: Stream) -> torch.Tensor | None:
        """The slot of each expert of `layer` (`[E]` int32), if the device holds them all.

        Kernels launched on `compute` from now on find them there. The table is made again when an
        expert of the layer comes or goes.
        """
        if layer not in self._tables:
            slots = []
            for expert in range(self.tensor_map.layers[layer].num_experts):
                key = ExpertKey(layer, expert)
                slot = self.cache.slot(key) if key in self.cache else None
                if slot is None or self._device_keys[slot] != key:
                    return None
                slots.append(slot)
            for slot in slots:
                self.device_slots.await_arrival(slot, compute)
            host = torch.tensor(slots, dtype=torch.int32)
            slots_E = torch.empty_like(host, device=self.streams.device)
            compute.copy_async(slots_E, host)
            self._tables[layer] = slots_E
        return self._tables[layer]

    def note_use(self, layer: int, mask_E: torch.Tensor, compute: Stream) -> None:
        """`layer` uses the experts marked in `mask_E`, which the host learns later."""
        if self._use_log.is_full:
            self.counts.num_syncs += 1
            with self.deciding():
                self.read_use_log()
        self._use_log.write(layer, mask_E, compute)

    def read_use_log(self) -> None:
        """Tell the cache of uses noted so far, in their order.

        Before every decision, so that decisions depend on routing alone, not on when it was read.
        """
        for layer, experts in self._use_log.read():
            keys = [ExpertKey(layer, expert) for expert in experts]
            self.cache.decide([key for key in keys if key in self.cache])

    def start_read(self, key: ExpertKey, slot: int) -> None:
        """Read `key` into host `slot`, which no copy reads any more."""
        load = self._new_load(key, slot)
        self.source.start(key, self.host_slots.blob(slot), load)

    def can_fill_host(self, slot: int) -> bool:
        """Whether nothing reads or writes host `slot`. Never blocks."""
        is_written = slot in self._reads and not self._reads[slot][1].is_done
        return not is_written and self.host_slots.is_free(slot)

    def new_read_ahead(self, key: ExpertKey, slot: int) -> AheadRead:
        """A read of `key` into host `slot` for the line of the source; the slot can be filled."""
        load = self._new_load(key, slot)
        return self.source.ahead_read(key, self.host_slots.blob(slot), load)

    def forget_read(self, slot: int) -> None:
        """Nothing is on its way to host `slot` any more."""
        self._reads.pop(slot, None)

    def _new_load(self, key: ExpertKey, slot: int) -> Load:
        if slot in self._reads:  # of a key that was evicted, or that no layer waited for
            self._reads[slot][1].settle()
        self._host_keys[slot] = None
        if self._poison:
            self.host_slots.poison(slot)
        # In the books before it starts: an interrupt must not lose sight of bytes on their way.
        load = self.source.new_load()
        self._reads[slot] = key, load
        return load

    def finish_read(self, key: ExpertKey, slot: int, *, may_wait: bool) -> bool:
        """Whether host `slot` holds `key`, after a wait if need be. Raises ExpertReadError."""
        if slot in self._reads:
            load = self._reads[slot][1]
            if not may_wait and not load.is_done:
                return False
            self._wait_for(load)
            self._host_keys[slot] = self._reads[slot][0]
            del self._reads[slot]
        assert self._host_keys[slot] == key, (self._host_keys[slot], key)
        return True

    def _wait_for(self, load: Load) -> None:
        watch = self.watch
        if watch is None or load.is_done:
            load.wait()
            return
        began = time.perf_counter()
        try:
            load.wait()
        finally:
            watch.waited(began, time.perf_counter())

    def copy(
        self, key: ExpertKey, *, host_slot: int, device_slot: int, stream: Stream
    ) -> tuple[Event, Event]:
        """Queue the copy of `key` to its device slot; timed events before and after it."""
        previous, self._device_keys[device_slot] = self._device_keys[device_slot], None
        used = None
        if previous is not None:
            self._tables.pop(previous.layer, None)
            used = self._used.get(previous.layer)
        layout = self.blobs.layout(key)
        num_bytes = layout.stored_bytes
        events = self.device_slots.fill(
            device_slot,
            self.host_slots.bytes(host_slot)[:num_bytes],
            layout,
            stream,
            used=used,
            poison=self._poison,
        )
        self.host_slots.mark_copy(host_slot, events[1])
        self._device_keys[device_slot] = key
        self.counts.copied_bytes += num_bytes
        if self.watch is not None:
            self.watch.copied(*events)
        return events

    def copy_ahead(self, key: ExpertKey, device_slot: int) -> Event:
        """Queue the copy of `key`, which is in host memory, behind all demand; where it ends."""
        host_slot = self.host_cache.slot(key)
        stream = self.streams.prefetch
        events = self.copy(key, host_slot=host_slot, device_slot=device_slot, stream=stream)
        self.counts.num_prefetched += 1
        return events[1]

    def mark_used(self, layer: int, compute: Stream) -> None:
        """Every kernel that reads experts of `layer` is launched on `compute`."""
        self._last_used = self._used[layer] = compute.record()

    def end_layer(self, computed: Collection[ExpertKey]) -> None:
        """The layer ended well; `computed` were computed on the CPU.

        Those that may be wanted again are copied to the device behind its back: any while there are
        free slots, then what the CPU computed before, lately enough.
        """
        for key in computed:
            was_seen = key in self._seen_on_host
            self._seen_on_host[key] = None
            self._seen_on_host.move_to_end(key)
            if was_seen or len(self.cache) < self.cache.num_slots:
                self._keep(key)
                del self._seen_on_host[key]
        while len(self._seen_on_host) > self.cache.num_slots:
            self._seen_on_host.popitem(last=False)
        self.ahead.look()
        self._end_turn()

    def abandon(self) -> None:
        """After an error or an interrupt: let everything end, and keep what arrived."""
        if self._is_deciding:
            self._reset()
            return
        self._settle()
        for cache, held in ((self.host_cache, self._host_keys), (self.cache, self._device_keys)):
            for key in cache.resident():
                if held[cache.slot(key)] != key:
                    cache.discard(key)
        self._end_turn()

    def _reset(self) -> None:
        """Forget every expert: the plan of the last layer may be half made."""
        self._settle()
        for cache, held in ((self.host_cache, self._host_keys), (self.cache, self._device_keys)):
            cache.clear()
            held[:] = [None] * len(held)
        self.ahead.forget()
        self._is_deciding = False
        self._end_turn()

    def _end_turn(self) -> None:
        self._current = None
        self._is_open = False

    def _settle(self) -> None:
        self.ahead.stop()
        for slot, (key, load) in self._reads.items():
            load.settle()
            if load.has_arrived:
                self._host_keys[slot] = key
        self._reads.clear()
        self.counts.num_syncs += 1
        self.streams.synchronize()  # sync: after an error, nothing may be left in flight
        self._tables.clear()

    def _keep(self, key: ExpertKey) -> None:
        """Copy `key`, which the CPU computed, to the device, if something there can make room."""
        if key not in self.cache and self.has_arrived(key):
            with self.deciding():
                room = self.cache.prefetch(key, self.running, lambda key, victim: True)
                if room is not None:
                    self.ahead.left([room[1]])
            if room is not None:
                self.copy_ahead(key, room[0])

    def free_host_slot(self, slot: int) -> None:
        """Wait, if need be, until no copy reads host `slot` any more."""
        if not self.host_slots.is_free(slot):
            self.counts.num_syncs += 1
            self.host_slots.wait_free(slot)
