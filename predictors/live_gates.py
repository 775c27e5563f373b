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
        # [L, HORIZON]: for each expert below the ranks
        self.elsewhere = np.full(self.chances.shape[:2], self.left_for_others(self.chances[0, 0]))

    def start(self) -> "LiveSession":
        return LiveSession(self)

    def left_for_others(self, chance: Array) -> float:
        """What the ranks leave of a token's uses, for each expert below them."""
        num_others = max(1, self.fingerprint.num_experts - len(chance))
        return max(_LEAST_CHANCE, (self.fingerprint.top_k - float(chance.sum())) / num_others)


class LiveSession:
    """Remembers of a step what was said of its layers, until they have routed."""

    def __init__(self, predictor: LiveGates) -> None:
        self._of = predictor
        # By layer: how many layers lay between, and [T, R] the ranking.
        self._said: dict[int, list[tuple[int, Array]]] = {}

    def begin(self, rows: StepRows) -> Forecast:
        self._said.clear()
        nothing = np.empty((len(rows), 0, self._of.fingerprint.num_experts), np.float32)
        return Forecast(first_layer=0, probability=nothing)

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        rows = np.arange(len(topk))[:, None]
        self._learn(layer, topk, rows)
        of = self._of
        end = min(len(of.gates), layer + 1 + HORIZON) if hidden is not None else layer + 1
        said = np.empty((len(topk), end - layer - 1, of.fingerprint.num_experts), np.float32)
        for target in range(layer + 1, end):
            ahead = target - layer - 1
            assert hidden is not None
            gate = of.gates[target]
            value, is_used = gate_choice(gate, hidden)
            if gate.groups_used < gate.num_groups:
                value = np.where(is_used > 0, value, -np.inf)
            chance = of.chances[target, ahead]
            ranked = (-value).argsort(axis=-1)[:, : len(chance)]
            self._said.setdefault(target, []).append((ahead, ranked))
            said[:, ahead] = of.elsewhere[target, ahead]
            said[rows, ahead, ranked] = chance
        return Forecast(first_layer=layer + 1, probability=said)

    def forget(self, sequence_id: int) -> None:
        """Nothing is remembered of a sequence."""

    def _learn(self, layer: int, topk: Array, rows: Array) -> None:
        told = self._said.pop(layer, None)
        if told is None or len(told[0][1]) != len(topk):
            return
        of = self._of
        is_used = np.zeros((len(topk), of.fingerprint.num_experts + 1), np.float32)
        is_used[rows, topk] = 1.0  # -1 is the column too many
        for ahead, ranked in told:
            found = is_used[rows, ranked]
            found = found[0] if len(found) == 1 else found.mean(0)
            chance = of.chances[layer, ahead]
            chance += _RATE * (found - chance)
            of.elsewhere[layer, ahead] = of.left_for_others(chance)
