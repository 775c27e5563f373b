"""What an offloaded model tells of the weights that it read."""

from typing import Protocol


class WeightReads(Protocol):
    """Counts since loading."""

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the disk, those of dense layers and of reads ahead included."""

    @property
    def experts_loaded(self) -> int:
        """Experts that were read for a use: each counts once it is used, whenever it was read."""

    @property
    def stall_seconds(self) -> float:
        """Time spent waiting for weights."""
