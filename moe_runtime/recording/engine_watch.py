"""What an engine tells of a run to whoever listens."""

from collections.abc import Collection
from typing import Protocol

from moe_runtime.memory.stream import Event


class EngineWatch(Protocol):
    """Hears of every layer, on the thread that runs it; raises nothing.

    Times are those of time.perf_counter(). An engine that nobody watches takes no time for it.
    """

    def planned(self, begin: float, end: float) -> None:
        """Meanwhile the cache decided what makes room, and reads were handed out."""

    def waited(self, begin: float, end: float) -> None:
        """Meanwhile a layer had nothing to compute with: an expert was on its way from disk."""

    def visited(self, layer: int, experts: Collection[int], begin: float, end: float) -> None:
        """A layer asked for `experts`, and was done with them at `end`."""

    def copied(self, start: Event, end: Event) -> None:
        """An expert goes to a device between two timed events."""
