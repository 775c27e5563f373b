"""A small network that tells a cache when each expert is used again, from the routing so far.

L MoE layers, E experts a layer, H hidden units.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.errors import PredictorError
from moe_runtime.predictors.predictor import (
    Fingerprint,
    Forecast,
    ModelFacts,
    Progress,
    State,
    StepRows,
    silent,
)
from moe_runtime.predictors.reuse_history import NUM_DIRECT, NUM_INPUTS, ReuseHistory
from moe_runtime.predictors.reuse_training import LEAST_TOKENS, train_on_reuse
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

_TENSORS = ("input", "input_bias", "output", "output_bias", "direct")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReuseNetwork:
    """Log-odds `z = direct[l] f[l, e] + output relu(input x + layer l' + bias)` of two things.

    They are that the expert is used at the next visit of its layer, fitted by its cross-entropy;
    and, for one that is not, the rate at the visits after it, fitted by the likelihood of the
    number of visits until the use as a geometric one, so that 1 / rate is its mean. `x` holds, for
    all keys at once, the last two visits, ranks and moving averages; `f` a key's own averages,
    last visits and age; l' is the layer that ran last. Layers up to l' have run for this token and
    run next for another; the others ran for the token before and run next for this one: the two
    sorts have weights of their own, which come first for those of this token, in and out.
    """

    name: ClassVar[str] = "reuse_network"
    needs: ClassVar[frozenset[str]] = frozenset()

    fingerprint: Fingerprint
    input: Array  # [2, L, NUM_INPUTS, E, H] float32
    input_bias: Array  # [L, H], by the layer that ran last
    output: Array  # [2, L, E, 2, H]
    output_bias: Array  # [L, E, 2]
    direct: Array  # [L, NUM_DIRECT, 2]

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        topk = trace.topk[trace.phase != Phase.PADDING]
        if len(topk) < LEAST_TOKENS:
            raise PredictorError(
                f"the trace has {len(topk)} tokens, and {cls.name} learns from {LEAST_TOKENS} or "
                "more; record more prompts"
            )
        weights = train_on_reuse(topk, trace.num_experts, on_progress)
        tensors = {name: getattr(weights, name).detach().numpy() for name in _TENSORS}
        return cls(fingerprint=facts.fingerprint, **tensors)

    def start(self) -> "ReuseSession":
        return ReuseSession(self)

    def state(self) -> State:
        return State(settings={}, tensors={name: getattr(self, name) for name in _TENSORS})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        tensors = {name: state.tensors[name] for name in _TENSORS}
        layers, experts = fingerprint.num_layers, fingerprint.num_experts
        hidden = tensors["input_bias"].shape[-1]
        shapes = {
            "input": (2, layers, NUM_INPUTS, experts, hidden),
            "input_bias": (layers, hidden),
            "output": (2, layers, experts, 2, hidden),
            "output_bias": (layers, experts, 2),
            "direct": (layers, NUM_DIRECT, 2),
        }
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} is {tensors[name].shape} and must be {shape}")
        return cls(fingerprint=fingerprint, **tensors)


class ReuseSession:
    """Keeps each sequence's history; a new sequence starts from the last one that was heard.

    Rows of one sequence that run together share what is said after the last of them. In layers
    that have not run yet, `next_step` repeats what is said of this step.
    """

    def __init__(self, predictor: ReuseNetwork) -> None:
        self._of = predictor
        self._sequences: dict[int, _Running] = {}
        self._last: _Running | None = None
        self._rows: list[_Running] = []

    def begin(self, rows: StepRows) -> Forecast:
        self._rows = []
        for sequence, is_token in zip(
            rows.sequence_id.tolist(), rows.is_token.tolist(), strict=True
        ):
            found = self._sequences.get(sequence) if is_token else _Running(self._of)
            if found is None:
                found = _Running(self._of) if self._last is None else self._last.copy()
                self._sequences[sequence] = found
            if is_token:
                self._last = found
            found.is_new_token = True
            self._rows.append(found)
        return self._said(0)

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        for running, chosen in zip(self._rows, topk, strict=True):
            running.visit(layer, chosen)
        return self._said(layer + 1)

    def forget(self, sequence_id: int) -> None:
        gone = self._sequences.pop(sequence_id, None)
        if gone is self._last:
            self._last = None

    def _said(self, first_layer: int) -> Forecast:
        said = np.stack([running.say() for running in self._rows])  # [T, L, E, 2]
        return Forecast(
            first_layer=first_layer,
            probability=said[:, first_layer:, :, 0],
            next_step=said[..., 0],
            later=said[..., 1],
        )


class _Running:
    """One sequence, with the sums that a visit changes in one layer's part only."""

    def __init__(self, of: ReuseNetwork) -> None:
        self._of = of
        self._history = ReuseHistory(of.fingerprint.num_layers, of.fingerprint.num_experts)
        # [2, L, H]: what each layer's inputs add as this token's, and as those of the one before.
        self._added = np.einsum("lie,tlieh->tlh", self._history.inputs, of.input)
        self._part = self._added[1].copy()  # which of them is in the sum
        self._sum = self._part.sum(axis=0)
        self._direct = np.empty_like(of.output_bias)
        for layer in range(of.fingerprint.num_layers):
            self._tell_own_past(layer)
        self._layer = of.fingerprint.num_layers - 1
        self._answer: Array | None = None
        self.is_new_token = True

    def copy(self) -> "_Running":
        found = _Running.__new__(_Running)
        found._of, found._history = self._of, self._history.copy()
        found._added, found._part = self._added.copy(), self._part.copy()
        found._sum, found._direct = self._sum.copy(), self._direct.copy()
        found._layer, found._answer = self._layer, self._answer
        found.is_new_token = self.is_new_token
        return found

    def visit(self, layer: int, chosen: Array) -> None:
        of, history = self._of, self._history
        if self.is_new_token:
            self.is_new_token = False
            np.copyto(self._part, self._added[1])
            self._sum = self._part.sum(axis=0)
        history.visit(layer, chosen)
        inputs = history.inputs[layer].ravel()
        num_hidden = of.input_bias.shape[1]
        for which in range(2):
            # Views: a copy of the weights would cost more than the product.
            weights = of.input[which, layer].reshape(-1, num_hidden)
            np.matmul(inputs, weights, out=self._added[which, layer])
        added = self._added[0, layer]
        self._sum += added
        self._sum -= self._part[layer]
        self._part[layer] = added
        self._tell_own_past(layer)
        self._layer = layer
        self._answer = None

    def _tell_own_past(self, layer: int) -> None:
        own = self._history.direct(layer).T @ self._of.direct[layer]
        self._direct[layer] = own + self._of.output_bias[layer]

    def say(self) -> Array:
        """`[L, E, 2]`: probability at the next visit, rate after it."""
        if self._answer is None:
            of, after = self._of, self._layer + 1
            hidden = np.maximum(self._sum + of.input_bias[self._layer], 0.0)
            found = self._direct.copy()
            for which, layers in ((1, slice(after)), (0, slice(after, None))):
                weights = of.output[which, layers]
                found[layers] += (weights.reshape(-1, len(hidden)) @ hidden).reshape(
                    weights.shape[:-1]
                )
            found *= 0.5
            np.tanh(found, out=found)
            found *= 0.5
            found += 0.5
            self._answer = found
        return self._answer
