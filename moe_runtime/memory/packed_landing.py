"""Where packed experts land on a device, to be unpacked from there into their slots."""

import torch

from moe_runtime.memory.packed_blob import PackedBlob, Unpack
from moe_runtime.memory.stream import Stream, Streams


class PackedLanding:
    """`num_bytes` for each stream of copies: a copy runs behind the unpacking of the last one."""

    def __init__(self, num_bytes: int, streams: Streams, unpack: Unpack) -> None:
        self._memory = {
            stream: streams.allocate(num_bytes) for stream in (streams.demand, streams.prefetch)
        }
        self._unpack = unpack

    def copy(
        self, blob: torch.Tensor, packed: PackedBlob, target: torch.Tensor, stream: Stream
    ) -> None:
        """Queue the copy of `blob` to the device, and behind it its unpacking to `target`."""
        landed = self._memory[stream][: len(blob)]
        stream.copy_async(landed, blob)
        stream.launch(lambda: packed.unpack(landed, target, self._unpack))

    def poison(self, stream: Stream) -> None:
        """Fill what the next copy on `stream` fills with NaN bytes (tests)."""
        memory = self._memory[stream]
        stream.launch(lambda: memory.fill_(0xFF))

    def close(self) -> None:
        """Free the memory, once the device is idle."""
        self._memory.clear()
