"""Slots whose experts stay quantised, and are dequantised when they are used."""

from collections.abc import Mapping

import torch

from moe_runtime.kernels.cpu.dequant import load_dequantizer
from moe_runtime.kernels.scaled_blocks import ScaledWeights
from moe_runtime.memory.disk import Blob
from moe_runtime.memory.layout import ExpertLayout, ScaledBlob, ScaledPart
from moe_runtime.memory.scaled_tensor import unsound
from moe_runtime.memory.slots import HostSlots


class ScaledSlots:
    """`num_slots` blobs of quantised experts, and room for one expert as it computes.

    What a slot holds is named by the layout's parts, format and all; the room is for code that
    computes with ordinary weights.
    """

    max_views = 1

    def __init__(self, num_slots: int, slot_bytes: int, computed_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._stored = HostSlots(num_slots, slot_bytes)
        self._computed = HostSlots(1, computed_bytes)
        self._dequantizer = load_dequantizer()
        self._sound: set[int] = set()  # slots whose scales were looked at
        self._held: tuple[int, ExpertLayout] | None = None  # what `_computed` holds
        self._views: dict[str, torch.Tensor] = {}  # of it

    def blob(self, slot: int) -> Blob:
        if self._held is not None and self._held[0] == slot:
            self._held = None  # it is about to be overwritten
        self._sound.discard(slot)
        return self._stored.blob(slot)

    def commit(self, slot: int, blob: Blob) -> None:
        """Nothing to do: experts are read in place."""

    def views(self, slot: int, layout: ExpertLayout) -> dict[str, torch.Tensor]:
        """Raises CheckpointError, naming the tensor and its file, where a scale is no number."""
        if layout.scaled is None:
            return self._stored.views(slot, layout)
        if self._held is None or self._held[0] != slot or self._held[1] is not layout:
            self._held = None
            self._views = self._dequantize(slot, layout, layout.scaled)
            self._held = (slot, layout)
        return self._views

    def poison(self, slot: int) -> None:
        self.blob(slot).fill(0xFF)

    def close(self) -> None:
        self._held = None
        self._views = {}
        self._stored.close()
        self._computed.close()

    def _dequantize(
        self, slot: int, layout: ExpertLayout, scaled: ScaledBlob
    ) -> dict[str, torch.Tensor]:
        stored = scaled.stored.views(torch.from_numpy(self._stored.blob(slot)))
        found = layout.views(torch.from_numpy(self._computed.blob(0)))
        for part in scaled.parts:
            weights = weights_of(part, stored)
            if slot not in self._sound and not weights.is_sound:
                raise unsound(part.source)
            self._dequantizer.run(weights, _region(part, found[part.parameter]))
        self._sound.add(slot)
        return found | {name: stored[name] for name in found if name in stored}


def weights_of(part: ScaledPart, stored: Mapping[str, torch.Tensor]) -> ScaledWeights:
    """The weight of `part` as it lies in the slot that `stored` are the views of."""
    values = stored[part.values]
    if part.format == "mxfp4":
        values = values.flatten(1)
    return ScaledWeights(format=part.format, values=values, scales=stored[part.scales])


def _region(part: ScaledPart, parameter: torch.Tensor) -> torch.Tensor:
    """Where the weight of `part` goes, as `[N, K]`."""
    size = part.shape[::-1] if part.is_transposed else part.shape
    region = parameter.narrow(0, part.start[0], size[0]).narrow(1, part.start[1], size[1])
    return region.mT if part.is_transposed else region
