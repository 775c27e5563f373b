"""The fixed memory that experts live in while they are cached."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from moe_runtime.memory.anonymous_memory import Blob, anonymous_memory
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.slot_views import SlotViews


class Slots(Protocol):
    """`num_slots` blobs of `slot_bytes`, allocated once."""

    num_slots: int
    slot_bytes: int
    max_views: int  # experts whose views are valid together

    def blob(self, slot: int) -> Blob:
        """Host memory to read into, before `commit`."""

    def commit(self, slot: int, blob: Blob) -> None:
        """Make what was read into `blob` the content of `slot`."""

    def views(self, slot: int, layout: ExpertLayout) -> Mapping[str, torch.Tensor]:
        """The parameters in `slot`, by name; valid until the slot is reused.

        Of more than `max_views` slots, the oldest views are overwritten.
        """

    def poison(self, slot: int) -> None:
        """Fill `slot` with NaN bytes, so that using it before it is read shows."""

    def close(self) -> None:
        """Free the memory; views die with it."""


class HostSlots:
    """Slots in host memory: one anonymous mapping, huge pages where the kernel grants them."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = self.max_views = num_slots
        self.slot_bytes = slot_bytes
        self._memory = anonymous_memory(num_slots * slot_bytes)
        self._views = SlotViews(self.memory)

    @property
    def memory(self) -> torch.Tensor:
        """All blobs: uint8 `[slots, slot bytes]`."""
        return torch.from_numpy(self._memory).view(self.num_slots, self.slot_bytes)

    def blob(self, slot: int) -> Blob:
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def commit(self, slot: int, blob: Blob) -> None:
        """Nothing to do: experts are read in place."""

    def views(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        return self._views.get(slot, layout)

    def poison(self, slot: int) -> None:
        self.blob(slot).fill(0xFF)

    def close(self) -> None:
        self._views.clear()
        self._memory = np.empty(0, np.uint8)
