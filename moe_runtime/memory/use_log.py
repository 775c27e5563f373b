"""Which experts were used by layers whose routing the host never waited for."""

from collections import deque
from collections.abc import Iterator

import torch

from moe_runtime.memory.pinned_memory import PinnedMemory
from moe_runtime.memory.stream import Event, Stream, Streams

# Layers that may be noted before the oldest must be read: some hundred tokens of a deep model.
_NUM_ENTRIES = 8192


class UseLog:
    """The device writes a mask of experts for each layer, the host reads it when it comes by.

    Entries are read in the order in which they were written.
    """

    def __init__(self, num_experts: int, streams: Streams) -> None:
        self._memory = PinnedMemory(_NUM_ENTRIES * num_experts, streams)
        self._masks = self._memory.bytes.view(_NUM_ENTRIES, num_experts)
        self._entries: deque[tuple[int, int, Event]] = deque()  # layer, experts, written
        self._next = 0

    @property
    def is_full(self) -> bool:
        """Whether `write` must wait for a `read`."""
        return len(self._entries) == _NUM_ENTRIES

    def write(self, layer: int, mask_E: torch.Tensor, stream: Stream) -> None:
        """Queue a note on `stream`: experts used by `layer` are not zero in `mask_E` (uint8)."""
        assert not self.is_full
        target = self._masks[self._next][: len(mask_E)]
        stream.copy_async(target, mask_E)
        self._entries.append((layer, len(mask_E), stream.record()))
        self._next = (self._next + 1) % _NUM_ENTRIES

    def read(self) -> Iterator[tuple[int, list[int]]]:
        """Layer and experts of every note, oldest first; each is forgotten as it is read.

        Blocks for notes that are still to be written: none, where the host has just waited for
        later work of the same stream.
        """
        while self._entries:
            layer, num_experts, written = self._entries[0]
            if not written.is_done():
                written.wait()  # sync: of a caller that did not wait for the layer before
            at = (self._next - len(self._entries)) % _NUM_ENTRIES
            used = self._masks[at][:num_experts].nonzero().flatten().tolist()
            self._entries.popleft()
            yield layer, used

    def close(self) -> None:
        """Free the memory, once the device is idle."""
        self._entries.clear()
        self._masks = torch.empty((0, 0), dtype=torch.uint8)
        self._memory.close()
