"""What a disk reader tells of its reads to whoever listens."""

from typing import Protocol


class ReadWatch(Protocol):
    """Hears of every read of the disk, on the thread that makes it."""

    def begun(self) -> None:
        """A read begins."""

    def ended(self, num_bytes: int) -> None:
        """One that has begun is over, and asked for so many bytes."""
