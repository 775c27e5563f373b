"""How experts stand in slots, and what to read for it."""

from typing import Protocol

from moe_runtime.expert import ExpertKey
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.tensor_map import Extent


class BlobMap(Protocol):
    """A TensorMap, or a map of experts that slots hold otherwise than they compute."""

    def extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        """The reads that fill a slot with `key`."""

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """Where the parameters of `key` then are."""
