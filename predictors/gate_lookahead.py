"""The model's own gates, ahead of time: gate l + d on what the router of layer l saw.

Between two layers the residual stream changes little, so a later gate often chooses the same from
an earlier layer's input (AdapMoE, arXiv 2408.10284; HOBBIT, arXiv 2411.01433). Scores become
probabilities by a logistic curve of their margin over the k-th score, fitted for every layer and
distance. `GateCorrected` adds a linear map of the router's input, learnt for every layer and
distance, to what the gate says, in the manner of ProMoE (arXiv 2410.22134).

T rows, K experts a token, E experts a layer, D model dim, F features of an expert's score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch.nn import functional

from moe_runtime.errors import PredictorError
from moe_runtime.predictors.counts import check_fit, frequency, membership
from moe_runtime.predictors.gate import gate_choice
from moe_runtime.predictors.logistic import fit_logistic, sigmoid
from moe_runtime.predictors.predictor import (
    Fingerprint,
    Forecast,
    Gate,
    ModelFacts,
    Progress,
    State,
    StepRows,
    silent,
)
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

HORIZON = 3
_FIT_ROWS = 40_000  # enough for a curve of three numbers, and for the correction of a small model
_NUM_FEATURES = 3
_EPOCHS = 6
_BATCH_ROWS = 512
_LEARNING_RATE = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateLookahead:
    """Gates, and for each layer and distance the curve that makes probabilities of their scores.

    `curves[l, d - 1]` weighs margin, group and 1 for layer `l` foretold `d` layers earlier.
    """

    name: ClassVar[str] = "gate_lookahead"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    fingerprint: Fingerprint
    shares: Array  # [L, E] float32, for the layers that no gate can see yet
    gates: tuple[Gate, ...]
    curves: Array  # [L, HORIZON, F] float32

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        gates, shares, curves = _fit_curves(cls.name, cls.needs, trace, facts)
        return cls(fingerprint=facts.fingerprint, shares=shares, gates=gates, curves=curves)

    def start(self) -> "GateSession":
        return GateSession(self.fingerprint, self.shares, self.gates, self.curves, {})

    def state(self) -> State:
        return _state(self.shares, self.gates, self.curves, {})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        return cls(
            fingerprint=fingerprint,
            shares=state.tensors["shares"],
            gates=_gates_of(state, fingerprint.num_layers),
            curves=state.tensors["curves"],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateCorrected:
    """A GateLookahead, and for each layer and distance the map `[E, D + 1]` added to its logits."""

    name: ClassVar[str] = "gate_corrected"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    fingerprint: Fingerprint
    shares: Array  # [L, E] float32
    gates: tuple[Gate, ...]
    curves: Array  # [L, HORIZON, F] float32
    corrections: dict[tuple[int, int], Array]  # [E, D + 1] float32 by layer and distance

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        gates, shares, curves = _fit_curves(cls.name, cls.needs, trace, facts)
        rows = _rows_to_fit(trace)
        corrections = {
            (layer, distance): _fit_correction(
                _hidden(trace, rows, layer - distance),
                _logits(gates[layer], _hidden(trace, rows, layer - distance), curve, trace.top_k),
                membership(trace.topk[rows, layer], trace.num_experts),
            )
            for layer in range(trace.num_layers)
            for distance, curve in enumerate(curves[layer][:layer], start=1)
        }
        return cls(
            fingerprint=facts.fingerprint,
            shares=shares,
            gates=gates,
            curves=curves,
            corrections=corrections,
        )

    def start(self) -> "GateSession":
        return GateSession(self.fingerprint, self.shares, self.gates, self.curves, self.corrections)

    def state(self) -> State:
        return _state(self.shares, self.gates, self.curves, self.corrections)

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        num_layers = fingerprint.num_layers
        return cls(
            fingerprint=fingerprint,
            shares=state.tensors["shares"],
            gates=_gates_of(state, num_layers),
            curves=state.tensors["curves"],
            corrections={
                (layer, distance): state.tensors[f"correction.{layer}.{distance}"]
                for layer in range(num_layers)
                for distance in range(1, min(layer, HORIZON) + 1)
            },
        )


class GateSession:
    """Remembers nothing from layer to layer: each router's input says it all."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        shares: Array,
        gates: Sequence[Gate],
        curves: Array,
        corrections: dict[tuple[int, int], Array],
    ) -> None:
        self._top_k = fingerprint.top_k
        self._shares, self._gates, self._curves = shares, gates, curves
        self._corrections = corrections

    def begin(self, rows: StepRows) -> Forecast:
        return Forecast(
            first_layer=0,
            probability=np.broadcast_to(self._shares, (len(rows), *self._shares.shape)),
        )

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        num_layers, num_experts = self._shares.shape
        end = min(num_layers, layer + 1 + HORIZON) if hidden is not None else layer + 1
        said = np.empty((len(topk), end - layer - 1, num_experts), np.float32)
        for distance in range(1, end - layer):
            assert hidden is not None
            seen = hidden.astype(np.float32)
            target = layer + distance
            curve = self._curves[target, distance - 1]
            logits = _logits(self._gates[target], seen, curve, self._top_k)
            correction = self._corrections.get((target, distance))
            if correction is not None:
                logits += seen @ correction[:, :-1].T + correction[:, -1]
            said[:, distance - 1] = sigmoid(logits)
        return Forecast(first_layer=layer + 1, probability=said)

    def forget(self, sequence_id: int) -> None:
        """Nothing is remembered."""


def _features(gate: Gate, hidden: Array, top_k: int) -> Array:
    """`[T, E, F]`: margin over the middle between the k-th and the next value, group, 1."""
    value, is_used = gate_choice(gate, hidden)
    ordered = np.sort(np.where(is_used > 0, value, -np.inf), axis=-1)[:, ::-1]
    last = ordered[:, top_k - 1]
    following = ordered[:, top_k] if value.shape[1] > top_k else last
    middle = np.where(np.isfinite(following), (last + following) / 2, last)[:, None]
    margin = value - middle
    found: Array = np.stack([margin, is_used, np.ones_like(margin)], axis=-1)
    return found


def _logits(gate: Gate, hidden: Array, curve: Array, top_k: int) -> Array:
    found: Array = np.clip(_features(gate, hidden, top_k) @ curve, -30, 30)
    return found


def _rows_to_fit(trace: Trace) -> Array:
    rows = np.flatnonzero(trace.phase != Phase.PADDING)
    if len(rows) <= _FIT_ROWS:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, _FIT_ROWS, replace=False))


def _hidden(trace: Trace, rows: Array, layer: int) -> Array:
    assert trace.hidden is not None
    found: Array = trace.hidden[rows, layer].astype(np.float32)
    return found


def _fit_curves(
    name: str, needs: frozenset[str], trace: Trace, facts: ModelFacts
) -> tuple[tuple[Gate, ...], Array, Array]:
    check_fit(name, needs, trace, facts)
    if len(facts.gates) != trace.num_layers:
        raise PredictorError(
            f"predictor {name} needs the gates of the model's {trace.num_layers} layers, and has "
            f"{len(facts.gates)}; give the checkpoint with --model"
        )
    rows = _rows_to_fit(trace)
    curves = np.zeros((trace.num_layers, HORIZON, _NUM_FEATURES), np.float32)
    for layer in range(1, trace.num_layers):
        truth = membership(trace.topk[rows, layer], trace.num_experts)
        for distance in range(1, min(layer, HORIZON) + 1):
            seen = _hidden(trace, rows, layer - distance)
            features = _features(facts.gates[layer], seen, trace.top_k)
            curves[layer, distance - 1] = fit_logistic(
                features.reshape(-1, _NUM_FEATURES), truth.reshape(-1)
            )
    return facts.gates, frequency(trace), curves


def _fit_correction(hidden: Array, logits: Array, truth: Array) -> Array:
    """`[E, D + 1]`: a linear map from `hidden` `[N, D]` that is added to `logits` `[N, E]`."""
    generator = torch.Generator().manual_seed(0)
    scale = np.sqrt(np.square(hidden).mean()) + 1e-6
    inputs, offsets, labels = (torch.from_numpy(x) for x in (hidden / scale, logits, truth))
    weight = torch.zeros(truth.shape[1], hidden.shape[1], requires_grad=True)
    bias = torch.zeros(truth.shape[1], requires_grad=True)
    optimiser = torch.optim.AdamW([weight, bias], lr=_LEARNING_RATE, weight_decay=1e-2)
    num_batches = max(1, len(inputs) // _BATCH_ROWS)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS * num_batches)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(inputs), generator=generator).tensor_split(num_batches):
            said = offsets[rows] + functional.linear(inputs[rows], weight, bias)
            loss = functional.binary_cross_entropy_with_logits(said, labels[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            plan.step()
    found = torch.cat([weight.detach() / float(scale), bias.detach()[:, None]], dim=1)
    correction: Array = found.numpy()
    return correction


def _state(
    shares: Array,
    gates: Sequence[Gate],
    curves: Array,
    corrections: dict[tuple[int, int], Array],
) -> State:
    tensors = {"shares": shares, "curves": curves}
    for layer, gate in enumerate(gates):
        tensors[f"gate.{layer}.weight"] = gate.weight
        tensors[f"gate.{layer}.bias"] = gate.bias
        tensors[f"gate.{layer}.selection_bias"] = gate.selection_bias
    for (layer, distance), correction in corrections.items():
        tensors[f"correction.{layer}.{distance}"] = correction
    return State(
        settings={
            "gates": [
                {
                    "is_sigmoid": gate.is_sigmoid,
                    "num_groups": gate.num_groups,
                    "groups_used": gate.groups_used,
                }
                for gate in gates
            ]
        },
        tensors=tensors,
    )


def _gates_of(state: State, num_layers: int) -> tuple[Gate, ...]:
    tensors = state.tensors
    return tuple(
        Gate(
            weight=tensors[f"gate.{layer}.weight"],
            bias=tensors[f"gate.{layer}.bias"],
            selection_bias=tensors[f"gate.{layer}.selection_bias"],
            **state.settings["gates"][layer],
        )
        for layer in range(num_layers)
    )
