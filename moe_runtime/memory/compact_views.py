"""Experts in compact blobs, as a kernel reads them in place, or expanded one at a time."""

from collections.abc import Callable, Iterator, Mapping

import torch

from moe_runtime.kernels.cpu.matrix import Weight
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.slots import HostSlots


class CompactViews:
    """Views of the blobs in `memory` (uint8, `[slots, slot bytes]`, in host memory).

    With `room_bytes`, each use expands one expert into room of that size; one is enough, and better
    than several: what is expanded is used at once, out of the caches. Where a kernel computes from
    the blobs, room is only made when it is needed: for an expert with many rows of a prompt.
    """

    def __init__(self, memory: torch.Tensor, room_bytes: int) -> None:
        self.max_views = 1 if room_bytes else len(memory)
        self._memory = memory
        self._computes_in_place = not room_bytes
        self._room = HostSlots(1, room_bytes) if room_bytes else None
        self._in_place: dict[int, tuple[ExpertLayout, Mapping[str, Weight]]] = {}
        self._expanders: dict[int, tuple[ExpertLayout, Callable[[], None]]] = {}
        self._expanded: tuple[int, ExpertLayout] | None = None  # what the room holds
        self._checked: set[int] = set()  # slots whose content is known to be sound

    def get(self, slot: int, layout: ExpertLayout) -> Mapping[str, torch.Tensor]:
        """The parameters that stand in `slot`; of more than `max_views`, the oldest are lost."""
        assert layout.compact is not None, "a plain expert in a compact slot"
        if slot not in self._checked:
            layout.compact.check(self._memory[slot])
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

    def forget(self, slot: int) -> None:
        """`slot` is about to be overwritten."""
        self._checked.discard(slot)
        if self._expanded is not None and self._expanded[0] == slot:
            self._expanded = None

    def close(self) -> None:
        """Let go of the memory."""
        self._in_place.clear()
        self._expanders.clear()
        self._memory = torch.empty((0, 0), dtype=torch.uint8)
        if self._room is not None:
            self._room.close()

    def _matrices(self, slot: int, layout: ExpertLayout) -> Mapping[str, Weight]:
        known = self._in_place.get(slot)
        if known is None or known[0] is not layout:
            assert layout.compact is not None
            matrices = layout.compact.matrices(layout.parameters, self._memory[slot])
            known = self._in_place[slot] = (layout, matrices)
        return known[1]

    def _expand(self, slot: int, layout: ExpertLayout, room: HostSlots) -> None:
        known = self._expanders.get(slot)
        if known is None or known[0] is not layout:
            assert layout.compact is not None
            target = torch.from_numpy(room.blob(0))
            expand = layout.compact.expander(layout.parameters, self._memory[slot], target)
            known = self._expanders[slot] = (layout, expand)
        known[1]()


class CompactWeights(Mapping[str, torch.Tensor]):
    """An expert in its slot: `matrices` for the kernel, and ordinary weights for whoever asks.

    The latter are those of `CompactViews.expanded`.
    """

    def __init__(
        self,
        views: CompactViews,
        slot: int,
        layout: ExpertLayout,
        matrices: Mapping[str, Weight],
    ) -> None:
        self.matrices = matrices
        self._views = views
        self._slot = slot
        self._layout = layout

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._views.expanded(self._slot, self._layout)[name]

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec in self._layout.parameters)

    def __len__(self) -> int:
        return len(self._layout.parameters)
