"""What the routing so far says of every expert, kept up visit by visit.

L MoE layers, E experts a layer.
"""

from typing import Self

import numpy as np

from moe_runtime.trace_fields import Array

# How fast each moving average of an expert's use forgets, per visit of its layer.
RATES = (0.5, 0.25, 0.1, 0.03, 0.01, 0.003)
FIRST_AVERAGE = 0.1
LEAST_AVERAGE = 0.002  # bounds the log-odds
AS_INPUT = (1, 2, 3, 5)  # of the averages
INPUT_SCALE = (2.0, 3.0, 3.0, 3.0)
NUM_INPUTS = 3 + len(AS_INPUT)  # used, used one visit before, rank, averages
NUM_DIRECT = len(RATES) + 4  # log-odds of the averages, used, used before, log of the age, 1

_RATES = np.array(RATES, np.float32)[:, None]
_INPUT_SCALE = np.array(INPUT_SCALE, np.float32)[:, None]
_AS_INPUT = list(AS_INPUT)


class ReuseHistory:
    """Of one sequence. A visit without experts, -1 throughout, leaves its layer as it was."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.inputs = np.zeros((num_layers, NUM_INPUTS, num_experts), np.float32)
        shape = num_layers, len(RATES), num_experts
        self.averages = np.full(shape, FIRST_AVERAGE, np.float32)
        self.age = np.full((num_layers, num_experts), 1 / FIRST_AVERAGE, np.float32)
        self.inputs[:, 3:] = _INPUT_SCALE * self.averages[:, _AS_INPUT]

    def copy(self) -> Self:
        found = type(self).__new__(type(self))
        found.inputs, found.averages = self.inputs.copy(), self.averages.copy()
        found.age = self.age.copy()
        return found

    def visit(self, layer: int, chosen: Array) -> None:
        """`layer` used `chosen` `[K]`, largest weight first, -1 missing."""
        is_known = chosen >= 0
        if not is_known.any():
            return
        inputs, averages, age = self.inputs[layer], self.averages[layer], self.age[layer]
        expert = chosen[is_known].astype(np.intp)
        used, used_before, rank = inputs[:3]
        used_before[:] = used
        used.fill(0.0)
        rank.fill(0.0)
        used[expert] = 1.0
        rank[expert] = (1.0 - np.arange(len(chosen)) / len(chosen))[is_known]
        averages += _RATES * (used - averages)
        np.multiply(averages[_AS_INPUT], _INPUT_SCALE, out=inputs[3:])
        age += 1.0
        age[expert] = 0.0

    def direct(self, layer: int) -> Array:
        """`[NUM_DIRECT, E]`: of each expert of the layer its own past."""
        averages = np.maximum(self.averages[layer], LEAST_AVERAGE)
        np.minimum(averages, 1.0 - LEAST_AVERAGE, out=averages)
        found = np.empty((NUM_DIRECT, averages.shape[1]), np.float32)
        np.log(averages / (1.0 - averages), out=found[: len(RATES)])
        found[-4:-2] = self.inputs[layer, :2]
        np.log1p(self.age[layer], out=found[-2])
        found[-1] = 1.0
        return found
