"""Room on a device for one dequantised expert, which the next one takes."""

from collections.abc import Callable

import torch

from moe_runtime.kernels.scaled_blocks import Dequantizer
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.scaled_blob import ScaledBlob
from moe_runtime.memory.stream import Stream, Streams


class DeviceRoom:
    """`num_bytes` that kernels fill with an expert right before others compute with it.

    It is safe because both run on one stream, and those of several threads do not overtake. Memory
    is taken at the first use, unless `reserve` came before.
    """

    def __init__(self, num_bytes: int, streams: Streams, dequantizer: Dequantizer) -> None:
        self._num_bytes = num_bytes
        self._streams = streams
        self._dequantizer = dequantizer
        self._memory: torch.Tensor | None = None
        self._expanders: dict[int, tuple[ExpertLayout, Callable[[], None]]] = {}

    def reserve(self) -> torch.Tensor:
        """The memory. Raises DeviceMemoryError."""
        if self._memory is None:
            self._memory = self._streams.allocate(self._num_bytes)
        return self._memory

    def expand(
        self, slot: int, blob: torch.Tensor, layout: ExpertLayout, stream: Stream
    ) -> dict[str, torch.Tensor]:
        """Queue the dequantising of `blob`, which is `slot`; what it gives, until the next call."""
        known = self._expanders.get(slot)
        if known is None or known[0] is not layout:
            assert isinstance(layout.compact, ScaledBlob)
            expand = layout.compact.dequantising(
                layout.parameters, blob, self.reserve(), self._dequantizer
            )
            known = self._expanders[slot] = layout, expand
        stream.launch(known[1])
        return layout.views(self.reserve())

    def close(self) -> None:
        """Free the memory, once the device is idle."""
        self._expanders.clear()
        self._memory = None
