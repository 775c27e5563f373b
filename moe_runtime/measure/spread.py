"""Median and quartiles of what was measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The middle half of a series."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """A single value is its own quartiles."""
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0])
        # Inclusive: a handful of rounds is all there is, not a sample to extrapolate from.
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)

    def text(self, digits: int) -> str:
        """`12.3 (11.9 to 13.0)` with `digits` behind the point."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"
