"""Slots whose experts stay packed or quantised, to compute from as they are or to expand."""

from collections.abc import Callable, Iterator, Mapping

import torch

from moe_runtime.kernels.cpu.matrix import Weight
from moe_runtime.memory.disk import Blob
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.slots import HostSlots


class CompactSlots:
    """`num_slots` compact blobs. With `room_bytes`, also room for one expert as it was.

    Each use expands into the room then; one is enough, and better than several: what is expanded is
    used at once, out of the caches. Where a kernel computes from the blobs, room is only made when
    it is needed: for an expert with many rows of a prompt.
    """

    def __init__(self, num_slots: int, slot_bytes: int, room_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.max_views = 1 if room_bytes else num_slots
        self._computes_in_place = not room_bytes
        self._compact = HostSlots(num_slots, slot_bytes)
        self._room = HostSlots(1, room_bytes) if room_bytes else None
        self._in_place: dict[int, tuple[ExpertLayout, Mapping[str, Weight]]] = {}
        self._expanders: dict[int, tuple[ExpertLayout, Callable[[], None]]] = {}
        self._expanded: tuple[int, ExpertLayout] | None = None  # what the room holds
        self._checked: set[int] = set()  # slots whose content is known to be sound

    def blob(self, slot: int) -> Blob:
        self._checked.discard(slot)
        if self._expanded is not None and self._expanded[0] == slot:
            self._expanded = None  # it is about to be overwritten
        return self._compact.blob(slot)

    def commit(self, slot: int, blob: Blob) -> None:
        """Nothing to do: experts are read in place."""

    def views(self, slot: int, layout: ExpertLayout) -> Mapping[str, torch.Tensor]:
        assert layout.compact is not None, "a plain expert in a compact slot"
        if slot not in self._checked:
            layout.compact.check(self._tensor(slot))
            self._checked.add(slot)
        if self._computes_in_place:
            return CompactWeights(self, slot, layout, self._matrices(slot, layout))
        return self.expanded(slot, layout)

    def expanded(self, slot: int, layout: ExpertLayout) -> Mapping[str, torch.Tensor]:
        """Ordinary weights, until another slot's are asked for."""
        room = self._room
        if room is None or room.slot_bytes < layout.num_bytes:
            self._expanders.clear()
            self._expanded = None
            room = self._room = HostSlots(1, layout.num_bytes)
        if self._expanded is None or self._expanded[0] != slot or self._expanded[1] is not layout:
            self._expanded = None
            self._expand(slot, layout, room)
            self._expanded = (slot, layout)
        return room.views(0, layout)

    def poison(self, slot: int) -> None:
        self.blob(slot).fill(0xFF)

    def close(self) -> None:
        self._in_place.clear()
        self._expanders.clear()
        self._compact.close()
        if self._room is not None:
            self._room.close()

    def _tensor(self, slot: int) -> torch.Tensor:
        return torch.from_numpy(self._compact.blob(slot))

    def _matrices(self, slot: int, layout: ExpertLayout) -> Mapping[str, Weight]:
        known = self._in_place.get(slot)
        if known is None or known[0] is not layout:
            assert layout.compact is not None
            matrices = layout.compact.matrices(layout.parameters, self._tensor(slot))
            known = self._in_place[slot] = (layout, matrices)
        return known[1]

    def _expand(self, slot: int, layout: ExpertLayout, room: HostSlots) -> None:
        known = self._expanders.get(slot)
        if known is None or known[0] is not layout:
            assert layout.compact is not None
            target = torch.from_numpy(room.blob(0))
            expand = layout.compact.expander(layout.parameters, self._tensor(slot), target)
            known = self._expanders[slot] = (layout, expand)
        known[1]()


class CompactWeights(Mapping[str, torch.Tensor]):
    """An expert in its slot: `matrices` for the kernel, and ordinary weights for whoever asks.

    The latter are those of `CompactSlots.expanded`.
    """

    def __init__(
        self,
        slots: CompactSlots,
        slot: int,
        layout: ExpertLayout,
        matrices: Mapping[str, Weight],
    ) -> None:
        self.matrices = matrices
        self._slots = slots
        self._slot = slot
        self._layout = layout

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._slots.expanded(self._slot, self._layout)[name]

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._layout.parameters)

    def __len__(self) -> int:
        return len(self._layout.parameters)
