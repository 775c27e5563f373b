"""The model's own gates, ahead of time, trusted as far as they proved right while the model runs.

As `gate_lookahead`, with nothing fitted: gate l + d ranks the experts of its layer by what the
router of layer l saw, and the r-th of them is used with the probability that the r-th was used
with until now, at that layer and distance.

T rows, K experts a token, E experts a layer, R ranks.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from moe_runtime.predictors.gate import gate_choice
from moe_runtime.predictors.predictor import Fingerprint, Forecast, Gate, StepRows
from moe_runtime.trace_fields import Array

HORIZON = 2
_MORE_RANKS = 2  # than a token uses
_FIRST_CHANCE = 0.5
_RATE = 0.05
_LEAST_CHANCE = 1e-3


class LiveGates:
    """Gates of all layers, and how often each rank of theirs was right so far."""

    name: ClassVar[str] = "gate_lookahead"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __init__(self, fingerprint: Fingerprint, gates: Sequence[Gate]) -> None:
        assert len(gates) == fingerprint.num_layers, (len(gates), fingerprint)
        self.fingerprint = fingerprint
        self.gates = gates
        num_ranks = min(fingerprint.top_k + _MORE_RANKS, fingerprint.num_experts)
        # [L, HORIZON, R] float32; learned by every session.
        self.chances = np.full((len(gates), HORIZON, num_ranks), _FIRST_CHANCE, np.float32)

    def start(self) -> "LiveSession":
        return LiveSession(self)


class LiveSession:
    """Remembers of a step what was said of its layers, until they have routed."""

    def __init__(self, predictor: LiveGates) -> None:
        self._of = predictor
        self._said: dict[int, list[tuple[int, Array]]] = {}  # distance and [T, R], by layer

    def begin(self, rows: StepRows) -> Forecast:
        self._said.clear()
        nothing = np.empty((len(rows), 0, self._of.fingerprint.num_experts), np.float32)
        return Forecast(first_layer=0, probability=nothing)

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        self._learn(layer, topk)
        gates, chances = self._of.gates, self._of.chances
        end = min(len(gates), layer + 1 + HORIZON) if hidden is not None else layer + 1
        num_experts = self._of.fingerprint.num_experts
        said = np.empty((len(topk), end - layer - 1, num_experts), np.float32)
        for target in range(layer + 1, end):
            distance = target - layer
            assert hidden is not None
            value, is_used = gate_choice(gates[target], hidden)
            chance = chances[target, distance - 1]
            ranked = np.argsort(-np.where(is_used > 0, value, -np.inf), axis=-1)[:, : len(chance)]
            self._said.setdefault(target, []).append((distance, ranked))
            said[:, distance - 1] = self._elsewhere(chance)
            np.put_along_axis(said[:, distance - 1], ranked, chance[None], axis=-1)
        return Forecast(first_layer=layer + 1, probability=said)

    def forget(self, sequence_id: int) -> None:
        """Nothing is remembered of a sequence."""

    def _learn(self, layer: int, topk: Array) -> None:
        for distance, ranked in self._said.pop(layer, ()):
            if len(ranked) == len(topk):
                is_right = (ranked[:, :, None] == topk[:, None, :]).any(-1).mean(0)
                chance = self._of.chances[layer, distance - 1]
                chance += _RATE * (is_right - chance)

    def _elsewhere(self, chance: Array) -> float:
        """The probability that is left for each expert below the ranks."""
        of = self._of.fingerprint
        num_others = max(1, of.num_experts - len(chance))
        return max(_LEAST_CHANCE, (of.top_k - float(chance.sum())) / num_others)
