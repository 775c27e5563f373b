"""Predicted uses of all experts, in arrays.

L MoE layers, E experts a layer.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from moe_runtime.expert import ExpertKey

Array = np.ndarray[Any, Any]

# Probability of use from which a read ahead is considered at all.
LEAST_PREFETCHED = 0.5


class Predictions(Mapping[ExpertKey, float]):
    """Probabilities of use at the next visit of each layer, by key; NaN where nothing is said.

    `later_LE`, where a predictor can tell, is the rate of use in the visits after that one: the
    expected number of visits until the use after an unused one is its inverse.
    """

    def __init__(self, next_LE: Array, later_LE: Array | None = None) -> None:
        self.next_LE = next_LE
        self.later_LE = later_LE

    @classmethod
    def of(cls, predictions: Mapping[ExpertKey, float], shape: tuple[int, int]) -> Self:
        """As arrays of `shape`; keys outside of it are left out."""
        next_LE = np.full(shape, np.nan)
        for key, probability in predictions.items():
            if 0 <= key.layer < shape[0] and 0 <= key.expert < shape[1]:
                next_LE[key] = probability
        return cls(next_LE)

    def __getitem__(self, key: ExpertKey) -> float:
        found = float(self.next_LE[key])
        if found != found:
            raise KeyError(key)
        return found

    def __iter__(self) -> Iterator[ExpertKey]:
        for layer, expert in np.argwhere(~np.isnan(self.next_LE)).tolist():
            yield ExpertKey(layer, expert)

    def __len__(self) -> int:
        return int(np.count_nonzero(~np.isnan(self.next_LE)))
