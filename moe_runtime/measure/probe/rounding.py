"""Figures with as many digits as a measurement deserves."""

from moe_runtime.measure.spread import Spread

_DIGITS = 4


def rounded(value: float) -> float:
    """To four significant digits: more would be noise."""
    return float(f"{value:.{_DIGITS}g}")


def rounded_quartiles(spread: Spread) -> tuple[float, float]:
    return rounded(spread.low), rounded(spread.high)
