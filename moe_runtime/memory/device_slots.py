"""Experts on an accelerator, each filled by one copy that no kernel can overtake."""

import torch

from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.slot_views import SlotViews
from moe_runtime.memory.stream import Event, Stream, Streams


class DeviceSlots:
    """`num_slots` blobs of `slot_bytes` in one slab on the device.

    Two events keep a slot: the copy that fills it runs behind the kernels that read it, and
    behind an earlier copy into it; a kernel that reads it runs behind the copy. The host waits for
    neither.
    """

    def __init__(self, num_slots: int, slot_bytes: int, streams: Streams) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._memory = streams.allocate(num_slots * slot_bytes).view(num_slots, slot_bytes)
        self._arrivals: list[Event | None] = [None] * num_slots  # that no kernel waits for yet
        self._views = SlotViews(self._memory)
        self._stacked: dict[ExpertLayout, dict[str, torch.Tensor]] = {}

    def fill(
        self,
        slot: int,
        blob: torch.Tensor,
        stream: Stream,
        *,
        used: Event | None,
        poison: bool = False,
    ) -> tuple[Event, Event]:
        """Queue the copy of `blob` into `slot`; returns timed events before and after it.

        `used` is behind every kernel that reads what the slot holds now. `poison` puts NaN there
        first (tests).
        """
        arrival = self._arrivals[slot]
        for event in (used, arrival):
            if event is not None:
                stream.wait_event(event)  # sync: of streams, before the slot is written
        target = self._memory[slot]
        if poison:
            stream.launch(lambda: target.fill_(0xFF))
        start = stream.record(is_timed=True)
        stream.copy_async(target[: len(blob)], blob)
        arrived = stream.record(is_timed=True)
        self._arrivals[slot] = arrived
        return start, arrived

    def await_arrival(self, slot: int, stream: Stream) -> None:
        """What `stream` launches from now on finds the slot filled."""
        arrival = self._arrivals[slot]
        if arrival is not None:
            stream.wait_event(arrival)  # sync: of streams, before the slot is read
            self._arrivals[slot] = None

    def views(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        """The parameters in `slot`, by name; valid until the slot is reused."""
        return self._views.get(slot, layout)

    def stacked(self, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        """Each parameter over all slots, `[S, ...]` by name: strided views, nothing is copied."""
        found = self._stacked.get(layout)
        if found is None:
            found = self._stacked[layout] = {
                spec.name: self._memory[:, spec.offset : spec.offset + spec.num_bytes]
                .view(spec.dtype)
                .view(self.num_slots, *spec.shape)
                for spec in layout.parameters
            }
        return found

    def close(self) -> None:
        """Free the memory, once the device is idle; views die with it."""
        self._views.clear()
        self._stacked.clear()
        self._memory = torch.empty((0, 0), dtype=torch.uint8)
