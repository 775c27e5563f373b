"""What the routing so far says of every expert, kept up visit by visit.

L MoE layers, E experts a layer.
"""

from typing import Self

import numpy as np

from moe_runtime.trace_fields import Array

# How fast each moving average of an expert's use forgets, per visit of its layer.
_RATES = np.array([0.5, 0.25, 0.1, 0.03, 0.01], np.float32)
_FIRST_AVERAGE = 0.1
_LEAST_AVERAGE = 0.002  # bounds the log-odds
_AS_INPUT = slice(1, 4)  # of the averages
_INPUT_SCALE = np.array([2.0, 3.0, 3.0], np.float32)[:, None]
NUM_INPUTS = 6  # used, used one visit before, rank, three averages
NUM_DIRECT = 9  # log-odds of five averages, used, used before, log of the age, 1


class ReuseHistory:
    """Of one sequence. A row without experts, -1 throughout, leaves its layer as it was."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = num_layers, num_experts
        self.inputs = np.zeros((NUM_INPUTS, *shape), np.float32)
        self._averages = np.full((len(_RATES), *shape), _FIRST_AVERAGE, np.float32)
        self._age = np.full(shape, 1 / _FIRST_AVERAGE, np.float32)
        self.inputs[3:] = _INPUT_SCALE[:, None] * self._averages[_AS_INPUT]

    def copy(self) -> Self:
        found = type(self).__new__(type(self))
        found.inputs = self.inputs.copy()
        found._averages, found._age = self._averages.copy(), self._age.copy()
        return found

    def visit(self, layer: int, chosen: Array) -> None:
        """`layer` used `chosen` `[K]`, largest weight first, -1 missing."""
        self._visit(slice(layer, layer + 1), chosen[None])

    def visit_all(self, chosen: Array) -> None:
        """All layers in one: `[L, K]`."""
        self._visit(slice(None), chosen)

    def direct(self) -> Array:
        """`[L, E, NUM_DIRECT]`: of each expert its own past."""
        return self._direct(slice(None))

    def direct_of(self, layer: int) -> Array:
        """`[E, NUM_DIRECT]`."""
        found: Array = self._direct(slice(layer, layer + 1))[0]
        return found

    def _visit(self, layers: slice, chosen: Array) -> None:
        inputs = self.inputs[:, layers]
        row, rank = np.nonzero(chosen >= 0)
        rows = np.unique(row)
        if len(rows) < inputs.shape[1]:
            if not len(rows):
                return
            for one in rows.tolist():  # the others know nothing new
                first = range(self._age.shape[0])[layers][one]
                self._visit(slice(first, first + 1), chosen[one : one + 1])
            return
        expert = chosen[row, rank]
        inputs[1] = inputs[0]
        inputs[0] = inputs[2] = 0.0
        inputs[0][row, expert] = 1.0
        inputs[2][row, expert] = 1.0 - rank / chosen.shape[1]
        averages, age = self._averages[:, layers], self._age[layers]
        averages += _RATES[:, None, None] * (inputs[0] - averages)
        inputs[3:] = _INPUT_SCALE[:, None] * averages[_AS_INPUT]
        age += 1.0
        age[row, expert] = 0.0

    def _direct(self, layers: slice) -> Array:
        averages = np.clip(self._averages[:, layers], _LEAST_AVERAGE, 1 - _LEAST_AVERAGE)
        inputs = self.inputs[:, layers]
        found = np.empty((*inputs.shape[1:], NUM_DIRECT), np.float32)
        found[..., :5] = np.moveaxis(np.log(averages / (1.0 - averages)), 0, -1)
        found[..., 5], found[..., 6] = inputs[0], inputs[1]
        found[..., 7] = np.log1p(self._age[layers])
        found[..., 8] = 1.0
        return found
