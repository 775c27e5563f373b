"""Slots whose experts stay packed, and are unpacked when they are used."""

import torch

from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.packed_blocks import INTACT, BlockTask
from moe_runtime.memory.disk import Blob
from moe_runtime.memory.layout import ExpertLayout, PackedBlob
from moe_runtime.memory.slots import HostSlots


class PackedSlots:
    """`num_slots` packed blobs, and room for one expert as it was.

    One is enough, and better than several: what is unpacked is used at once, out of the caches.
    Blocks were checked when they were read, so that their checksums are not looked at again.
    """

    max_views = 1

    def __init__(self, num_slots: int, slot_bytes: int, plain_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._packed = HostSlots(num_slots, slot_bytes)
        self._plain = HostSlots(1, plain_bytes)
        self._codec = load_codec()
        self._tasks: dict[int, tuple[ExpertLayout, list[BlockTask]]] = {}
        self._unpacked: tuple[int, ExpertLayout] | None = None  # what `_plain` holds

    def blob(self, slot: int) -> Blob:
        if self._unpacked is not None and self._unpacked[0] == slot:
            self._unpacked = None  # it is about to be overwritten
        return self._packed.blob(slot)

    def commit(self, slot: int, blob: Blob) -> None:
        """Nothing to do: experts are read in place."""

    def views(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        packed = layout.packed
        assert packed is not None, "a plain expert in a packed slot"
        if self._unpacked is None or self._unpacked[0] != slot or self._unpacked[1] is not layout:
            self._unpacked = None
            self._unpack(slot, layout, packed)
            self._unpacked = (slot, layout)
        return self._plain.views(0, layout)

    def poison(self, slot: int) -> None:
        self.blob(slot).fill(0xFF)

    def close(self) -> None:
        self._tasks.clear()
        self._packed.close()
        self._plain.close()

    def _unpack(self, slot: int, layout: ExpertLayout, packed: PackedBlob) -> None:
        known = self._tasks.get(slot)
        if known is None or known[0] is not layout:
            known = self._tasks[slot] = (layout, self._tasks_of(slot, packed))
        status = self._codec.run(known[1], num_threads=torch.get_num_threads(), is_known=True)
        assert all(found == INTACT for found in status), (slot, status)
        source, target = self._packed.blob(slot), self._plain.blob(0)
        for place in packed.plain:
            data = source[place.offset : place.offset + place.num_bytes]
            target[place.target_offset : place.target_offset + place.num_bytes] = data

    def _tasks_of(self, slot: int, packed: PackedBlob) -> list[BlockTask]:
        source = torch.from_numpy(self._packed.blob(slot))
        target = torch.from_numpy(self._plain.blob(0))
        tasks = []
        for place in packed.blocks:
            end = place.target_offset + place.block.num_elements * 2
            tasks.append(
                place.block.task(
                    source[place.offset : place.offset + place.block.num_bytes],
                    target[place.target_offset : end],
                )
            )
        return tasks
