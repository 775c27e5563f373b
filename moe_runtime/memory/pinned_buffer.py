"""Pinned memory for small tensors on their way between host and device."""

import math
from collections.abc import Sequence

import torch

from moe_runtime.memory.pinned_memory import PinnedMemory
from moe_runtime.memory.stream import Streams


class PinnedBuffer:
    """One tensor at a time, in memory that grows and is used again.

    Ask for the next tensor only when no copy uses the last one any more. Memory that was outgrown
    stays until `close`, as unpinning it would wait for all that the device is doing; each has twice
    the bytes of the one before or more, so all before the last are smaller than that.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._memories: list[PinnedMemory] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, valid until the next call."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not self._memories or self._memories[-1].bytes.nbytes < num_bytes:
            self._memories.append(PinnedMemory(max(4096, 2 * num_bytes), self._streams))
        return self._memories[-1].bytes[:num_bytes].view(dtype).view(*shape)

    def close(self) -> None:
        """Free the memory, which nothing uses any more."""
        while self._memories:
            self._memories.pop().close()
