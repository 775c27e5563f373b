"""Experts on an accelerator, each filled by one copy that no kernel can overtake."""

import torch

from moe_runtime.memory.device_room import DeviceRoom
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.packed_blob import PackedBlob
from moe_runtime.memory.packed_landing import PackedLanding
from moe_runtime.memory.slot_views import SlotViews
from moe_runtime.memory.stream import Event, Stream, Streams


class DeviceSlots:
    """`num_slots` blobs of `slot_bytes` in one slab on the device.

    Two events keep a slot: the copy that fills it runs behind the kernels that read it, and
    behind an earlier copy into it; a kernel that reads it runs behind the copy. The host waits for
    neither. Packed experts are unpacked when they arrive, which takes a `landing`; quantised ones
    stay so, and whoever wants one as ordinary weights has it dequantised into `room`.
    """

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        streams: Streams,
        *,
        room: DeviceRoom | None = None,
        landing: PackedLanding | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.max_views = num_slots if room is None else 1  # experts whose weights last together
        self._room = room
        self._landing = landing
        self._memory = streams.allocate(num_slots * slot_bytes).view(num_slots, slot_bytes)
        self._arrivals: list[Event | None] = [None] * num_slots  # that no kernel waits for yet
        self._views = SlotViews(self._memory)
        self._stacked: dict[ExpertLayout, dict[str, torch.Tensor]] = {}

    def fill(
        self,
        slot: int,
        blob: torch.Tensor,
        layout: ExpertLayout,
        stream: Stream,
        *,
        used: Event | None,
        poison: bool = False,
    ) -> tuple[Event, Event]:
        """Queue the copy of `blob`, in which an expert stands as `layout` says, into `slot`.

        Returns timed events before it and after it. `used` is behind every kernel that reads what
        the slot holds now. `poison` puts NaN there first (tests).
        """
        arrival = self._arrivals[slot]
        for event in (used, arrival):
            if event is not None:
                stream.wait_event(event)  # sync: of streams, before the slot is written
        target = self._memory[slot]
        packed, landing = layout.compact, self._landing
        if poison:
            stream.launch(lambda: target.fill_(0xFF))
            if landing is not None:
                landing.poison(stream)
        start = stream.record(is_timed=True)
        if isinstance(packed, PackedBlob):
            assert landing is not None, "packed experts, and nowhere to unpack them from"
            landing.copy(blob, packed, target, stream)
        else:
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

    def weights(self, slot: int, layout: ExpertLayout, stream: Stream) -> dict[str, torch.Tensor]:
        """The parameters in `slot`, by name, for what is launched on `stream` next.

        They are valid until the slot is reused, and of more than `max_views` slots the oldest are
        overwritten in the stream's order.
        """
        if layout.compact is None:
            return self._views.get(slot, layout)
        assert self._room is not None, "quantised experts, and no room to dequantise one"
        return self._room.expand(slot, self._memory[slot], layout, stream)

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
        for part in (self._room, self._landing):
            if part is not None:
                part.close()
        self._memory = torch.empty((0, 0), dtype=torch.uint8)
