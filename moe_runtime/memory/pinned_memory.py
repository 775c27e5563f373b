"""Host memory that an accelerator may copy from by itself."""

import weakref

import torch

from moe_runtime.errors import PinningError
from moe_runtime.memory.anonymous_memory import anonymous_memory
from moe_runtime.memory.stream import Streams


class PinnedMemory:
    """`bytes` (uint8) on whole pages, pinned if the system lets us; `refusal` says why it did not.

    Refused memory serves as well, only slower. `close()` once no copy uses it any more.
    """

    def __init__(self, num_bytes: int, streams: Streams) -> None:
        self.bytes = torch.from_numpy(anonymous_memory(num_bytes))
        self.refusal: str | None = None
        self._unpin: weakref.finalize[..., PinnedMemory] | None = None
        try:
            streams.pin(self.bytes)
        except PinningError as error:
            self.refusal = str(error)
        else:
            # Also when the owner is simply forgotten: memory must not go back while pinned.
            self._unpin = weakref.finalize(self, streams.unpin, self.bytes)

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        if self._unpin is not None:
            self._unpin()
        self.bytes = torch.empty(0, dtype=torch.uint8)
