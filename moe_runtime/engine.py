"""Owns slots, cache and disk threads, and hands layers the experts they need."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import torch

from moe_runtime.cache.cache import Access, ExpertCache
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.errors import OffloadedExpertsError
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.disk import DiskReader
from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.slots import Slots
from moe_runtime.memory.tensor_map import Extent, TensorMap

Weights = dict[str, torch.Tensor]


class BlobMap(Protocol):
    """How experts stand in slots, and what to read for it."""

    def extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        """The reads that fill a slot with `key`."""

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """Where the parameters of `key` then are."""


class ExpertEngine:
    """The experts of one model: files behind a cache of slots.

    Not shared between models. One layer runs at a time; a second thread waits its turn. `poison`
    fills a slot with NaN before it is read into, so that a race shows in the output (tests).
    `blobs` says what slots hold, if not experts as `tensor_map` has them.
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
        self._poison = poison
        self._loads: dict[ExpertKey, ExpertLoad] = {}  # not yet known to be done
        # Re-entrant: an interrupt between taking a turn and using it must not block close().
        self._turn = threading.RLock()
        self._is_closed = False
        self._is_open = False  # between a layer's start and its orderly end

    def open_layer(self, layer: int, experts: Sequence[int]) -> "LayerAccess":
        """Start reading what is missing of `experts` (ascending) of `layer`; use it in a `with`."""
        self._turn.acquire()
        try:
            if self._is_closed:
                raise OffloadedExpertsError(
                    "the experts of this model were released by close(); load the model again"
                )
            if self._is_open:  # an interrupt cut short its start, or the clean-up after its end
                self._reset()
            self._is_open = True
            return LayerAccess(self, [ExpertKey(layer, expert) for expert in experts])
        except BaseException:
            self._turn.release()
            raise

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the disk so far, alignment included."""
        return self.reader.bytes_read

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """End the threads, close the files and free the slots. Safe to call twice."""
        with self._turn:
            if not self._is_closed:
                self._is_closed = True
                self.reader.close()
                self.slots.close()

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

    def _drop_load(self, key: ExpertKey) -> None:
        """`key` leaves its slot: nothing may be written there any more."""
        load = self._loads.get(key)
        if load is not None:
            load.settle()
            del self._loads[key]

    def _reset(self) -> None:
        """Forget every expert: the plan of the last layer may be half made."""
        for load in self._loads.values():
            load.settle()
        self._loads.clear()
        self.cache.clear()
        self._is_open = False


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
            load.wait()
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
        finally:
            self._engine._turn.release()

    def _start(self, accesses: list[Access]) -> None:
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
            self._engine._drop_load(access.evicted)
        self._engine._start_load(access.key, access.slot)
        self._started.add(access.key)

    def _abandon(self) -> None:
        """After an error or an interrupt: forget what never arrived, keep what did."""
        for access in self._accesses.values():
            if not access.is_hit and access.key not in self._started:
                self._engine.cache.discard(access.key)
        for key in list(self._engine._loads):
            load = self._engine._loads[key]
            load.settle()
            if not load.has_arrived:
                self._engine.cache.discard(key)
            del self._engine._loads[key]
