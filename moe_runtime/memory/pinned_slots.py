"""Experts in host memory, from where the device copies them and the CPU computes them."""

from collections.abc import Mapping

import torch

from moe_runtime.memory.anonymous_memory import Blob
from moe_runtime.memory.compact_views import CompactViews
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.pinned_memory import PinnedMemory
from moe_runtime.memory.slot_views import SlotViews
from moe_runtime.memory.stream import Event, Streams


class PinnedSlots:
    """`num_slots` blobs of `slot_bytes` in one slab; knows which of them copies still read.

    Compact blobs are computed from as they are, or expanded into room of `room_bytes`.
    """

    def __init__(
        self, num_slots: int, slot_bytes: int, streams: Streams, *, room_bytes: int = 0
    ) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._memory = PinnedMemory(num_slots * slot_bytes, streams)
        self._copies: list[list[Event]] = [[] for _ in range(num_slots)]
        slots = self._memory.bytes.view(num_slots, slot_bytes)
        self._views = SlotViews(slots)
        self._compact_views = CompactViews(slots, room_bytes)
        self.max_views = self._compact_views.max_views  # experts whose views are valid together

    @property
    def refusal(self) -> str | None:
        """Why the memory is not pinned; None if it is."""
        return self._memory.refusal

    def bytes(self, slot: int) -> torch.Tensor:
        """What a copy to the device reads."""
        return self._memory.bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def blob(self, slot: int) -> Blob:
        """What a read from disk fills, once the slot is free."""
        self._compact_views.forget(slot)
        blob: Blob = self.bytes(slot).numpy()
        return blob

    def views(self, slot: int, layout: ExpertLayout) -> Mapping[str, torch.Tensor]:
        """The parameters in `slot`, by name; valid until the slot is reused.

        Of more than `max_views` slots, the oldest views are overwritten.
        """
        if layout.compact is None:
            return self._views.get(slot, layout)
        return self._compact_views.get(slot, layout)

    def mark_copy(self, slot: int, copied: Event) -> None:
        """A copy that ends with `copied` reads the slot."""
        self.is_free(slot)  # forgets the copies that are over
        self._copies[slot].append(copied)

    def is_free(self, slot: int) -> bool:
        """Whether the slot may be written now. Never blocks."""
        self._copies[slot] = [copy for copy in self._copies[slot] if not copy.is_done()]
        return not self._copies[slot]

    def wait_free(self, slot: int) -> None:
        """Block until the slot may be written."""
        for copied in self._copies[slot]:
            copied.wait()  # sync: the disk would write where a copy still reads
        self._copies[slot] = []

    def poison(self, slot: int) -> None:
        """Fill the slot with NaN bytes, so that using it before it is read shows."""
        self.blob(slot).fill(0xFF)

    def close(self) -> None:
        """Free the memory; views die with it."""
        self._views.clear()
        self._compact_views.close()
        self._memory.close()
