"""What stands in each slot as tensors, made once for an expert that stays."""

import torch

from moe_runtime.memory.layout import ExpertLayout


class SlotViews:
    """The views of each slot's last layout, over `memory` (uint8, `[slots, slot bytes]`).

    Of the last alone: experts of other layouts come and go, and the views of all pairs of slot and
    layout would take megabytes.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._last: dict[int, tuple[ExpertLayout, dict[str, torch.Tensor]]] = {}

    def get(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        """The parameters in `slot`, by name; valid until the slot is reused."""
        last = self._last.get(slot)
        if last is None or (last[0] is not layout and last[0] != layout):
            last = self._last[slot] = layout, layout.views(self._memory[slot])
        return last[1]

    def clear(self) -> None:
        """Let go of the memory."""
        self._last.clear()
        self._memory = torch.empty((0, 0), dtype=torch.uint8)
