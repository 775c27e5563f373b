"""How fast this processor runs small operators now: what a step's software waits for."""

import statistics
import time

import numpy as np

_NUM_VALUES, _NUM_OPERATORS = 256, 250
_REPEATS = 21


def operator_seconds(repeats: int = _REPEATS) -> float:
    """Of one addition of 256 numbers from Python; the median of loops of a tenth of a millisecond.

    On a shared host it is half as long again from one minute to the next, while memory is as fast.
    """
    values = np.ones(_NUM_VALUES, np.float32)
    result = np.empty_like(values)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(_NUM_OPERATORS):
            np.add(values, values, out=result)
        seconds.append((time.perf_counter() - start) / _NUM_OPERATORS)
    return statistics.median(seconds)
