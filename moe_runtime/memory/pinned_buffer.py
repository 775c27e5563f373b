"""Pinned memory for small tensors on their way between host and device."""

import math
from collections.abc import Sequence

import torch

from moe_runtime.memory.pinned_memory import PinnedMemory
from moe_runtime.memory.stream import Streams


class PinnedBuffer:
    """One tensor at a time, in memory that grows and is used again.

    Ask for the next tensor only when no copy uses the last one any more.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._memory: PinnedMemory | None = None

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, valid until the next call."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._memory is None or self._memory.bytes.nbytes < num_bytes:
            self.close()
            self._memory = PinnedMemory(max(4096, 2 * num_bytes), self._streams)
        return self._memory.bytes[:num_bytes].view(dtype).view(*shape)

    def close(self) -> None:
        """Free the memory."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
