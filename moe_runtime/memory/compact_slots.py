"""Slots whose experts stay packed or quantised, to compute from as they are or to expand."""

from collections.abc import Mapping

import torch

from moe_runtime.memory.anonymous_memory import Blob
from moe_runtime.memory.compact_views import CompactViews
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.slots import HostSlots


class CompactSlots:
    """`num_slots` compact blobs. With `room_bytes`, also room for one expert as it was."""

    def __init__(self, num_slots: int, slot_bytes: int, room_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._compact = HostSlots(num_slots, slot_bytes)
        self._views = CompactViews(self._compact.memory, room_bytes)
        self.max_views = self._views.max_views

    def blob(self, slot: int) -> Blob:
        self._views.forget(slot)
        return self._compact.blob(slot)

    def commit(self, slot: int, blob: Blob) -> None:
        """Nothing to do: experts are read in place."""

    def views(self, slot: int, layout: ExpertLayout) -> Mapping[str, torch.Tensor]:
        return self._views.get(slot, layout)

    def poison(self, slot: int) -> None:
        self.blob(slot).fill(0xFF)

    def close(self) -> None:
        self._views.close()
        self._compact.close()
