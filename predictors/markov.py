"""Markov chains over layers: the next layer's experts from those of the layers before it.

The chain runs on across the token boundary: the layer before layer 0 is the last layer of the token
before. Layers further ahead are reached by going from layer to layer with probabilities instead of
experts. Order 1 averages, over a token's experts s in a layer, P(e | s); order 2 averages
P(e | s, f) with f the first expert of the layer before that, and falls back on order 1 where a pair
was rare.

N rows, T rows of a forward, L MoE layers, K experts a token, E experts a layer.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.errors import PredictorError
from moe_runtime.predictors.counts import (
    PRIOR_ROWS,
    check_fit,
    frequency,
    membership,
    neighbours,
    tokens_of,
)
from moe_runtime.predictors.predictor import (
    Fingerprint,
    Forecast,
    ModelFacts,
    Progress,
    State,
    StepRows,
    silent,
)
from moe_runtime.predictors.step_log import StepLog
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

HORIZON = 3  # layers that are foretold again whenever a layer has routed
_MAX_TABLE_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Markov:
    """Order 1. `after[l, s]` are the shares in layer `l` after expert `s` in the layer before."""

    name: ClassVar[str] = "markov"
    needs: ClassVar[frozenset[str]] = frozenset()
    order: ClassVar[int] = 1

    fingerprint: Fingerprint
    shares: Array  # [L, E] float32
    after: Array  # [L, E, E] float32

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        shares = frequency(trace)
        return cls(fingerprint=facts.fingerprint, shares=shares, after=_order_1(trace, shares))

    def start(self) -> "MarkovSession":
        return MarkovSession(self.fingerprint, self.shares, self.after, None)

    def state(self) -> State:
        return State(settings={}, tensors={"shares": self.shares, "after": self.after})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        tensors = state.tensors
        return cls(fingerprint=fingerprint, shares=tensors["shares"], after=tensors["after"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Markov2:
    """Order 2. `after_two[l, f, s]`: after expert `s`, and first expert `f` a layer earlier."""

    name: ClassVar[str] = "markov2"
    needs: ClassVar[frozenset[str]] = frozenset()
    order: ClassVar[int] = 2

    fingerprint: Fingerprint
    shares: Array  # [L, E] float32
    after: Array  # [L, E, E] float32
    after_two: Array  # [L, E, E, E] float32

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        size = trace.num_layers * trace.num_experts**3 * 4
        if size > _MAX_TABLE_BYTES:
            raise PredictorError(
                f"predictor {cls.name} would take {size} bytes for {trace.num_layers} layers of "
                f"{trace.num_experts} experts, more than {_MAX_TABLE_BYTES}; use markov"
            )
        shares = frequency(trace)
        after = _order_1(trace, shares)
        return cls(
            fingerprint=facts.fingerprint,
            shares=shares,
            after=after,
            after_two=_order_2(trace, after),
        )

    def start(self) -> "MarkovSession":
        return MarkovSession(self.fingerprint, self.shares, self.after, self.after_two)

    def state(self) -> State:
        tensors = {name: getattr(self, name) for name in ("shares", "after", "after_two")}
        return State(settings={}, tensors=tensors)

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        tensors = state.tensors
        return cls(
            fingerprint=fingerprint,
            shares=tensors["shares"],
            after=tensors["after"],
            after_two=tensors["after_two"],
        )


class MarkovSession:
    """Follows the chain of each row, and remembers the last token of each sequence."""

    def __init__(
        self, fingerprint: Fingerprint, shares: Array, after: Array, after_two: Array | None
    ) -> None:
        self._num_layers, self._num_experts = shares.shape
        self._shares, self._after, self._after_two = shares, after, after_two
        self._log = StepLog(fingerprint.num_layers, fingerprint.top_k)
        self._before = np.empty((0, 0, 0), np.int16)  # [T, L, K] of the tokens before

    def begin(self, rows: StepRows) -> Forecast:
        self._before = self._log.begin(rows)
        earlier = self._before[:, -2] if self._num_layers > 1 else None
        said = self._follow(self._before[:, -1], earlier, 0, self._num_layers)
        return Forecast(first_layer=0, probability=said)

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        self._log.add(layer, topk)
        earlier = self._log.topk[:, layer - 1] if layer else self._before[:, -1]
        if layer == self._num_layers - 1:
            return Forecast(
                first_layer=self._num_layers,
                probability=np.empty((len(topk), 0, self._num_experts), np.float32),
                next_step=self._follow(topk, earlier, 0, self._num_layers),
            )
        end = min(self._num_layers, layer + 1 + HORIZON)
        return Forecast(
            first_layer=layer + 1, probability=self._follow(topk, earlier, layer + 1, end)
        )

    def forget(self, sequence_id: int) -> None:
        self._log.forget(sequence_id)

    def _follow(self, last: Array, earlier: Array | None, start: int, end: int) -> Array:
        """`[T, end - start, E]` for the layers after one that chose `last` `[T, K]`."""
        said = np.empty((len(last), end - start, self._num_experts), np.float32)
        if not said.size:
            return said
        chance = membership(last, self._num_experts)
        total = chance.sum(-1, keepdims=True)
        is_known = total > 0
        weight = chance / np.maximum(total, 1)
        reached = weight @ self._after[start]
        if self._after_two is not None and earlier is not None:
            first = earlier[:, 0]
            has_pair = (first >= 0)[:, None]
            pairs = np.einsum("bs,bse->be", weight, self._after_two[start, np.maximum(first, 0)])
            reached = np.where(has_pair, pairs, reached)
        said[:, 0] = np.where(is_known, reached, self._shares[start])
        for layer in range(start + 1, end):
            chance = said[:, layer - 1 - start]
            said[:, layer - start] = chance @ self._after[layer] / chance.sum(-1, keepdims=True)
        return said


def _order_1(trace: Trace, shares: Array) -> Array:
    counts, num_rows = np.zeros((2, *shares.shape, trace.num_experts), np.float32)
    for layer, before, after in _steps_of_chain(trace):
        first = membership(before, trace.num_experts)
        counts[layer] = first.T @ membership(after, trace.num_experts)
        num_rows[layer] = (first * (after >= 0).any(-1, keepdims=True)).sum(0)[:, None]
    prior = PRIOR_ROWS * shares[:, None]
    found: Array = (counts + prior) / (num_rows + PRIOR_ROWS)
    return found


def _order_2(trace: Trace, after: Array) -> Array:
    num_layers, num_experts = trace.num_layers, trace.num_experts
    found = np.repeat(PRIOR_ROWS * after[:, None], num_experts, axis=1)
    num_rows = np.full((*found.shape[:3], 1), PRIOR_ROWS, np.float32)
    tokens = tokens_of(trace)
    before, later = neighbours(trace)
    for layer in range(num_layers):
        if layer >= 2:
            rows = tokens, tokens, tokens
        elif layer == 1:
            rows = before, later, later
        else:
            rows = before, before, later
        earlier, last, target = (
            trace.topk[which, (layer - back) % num_layers]
            for which, back in zip(rows, (2, 1, 0), strict=True)
        )
        for expert in range(num_experts):
            chosen = earlier[:, 0] == expert
            first = membership(last[chosen], num_experts)
            found[layer, expert] += first.T @ membership(target[chosen], num_experts)
            is_known = (target[chosen] >= 0).any(-1, keepdims=True)
            num_rows[layer, expert] += (first * is_known).sum(0)[:, None]
    found /= num_rows
    return found


def _steps_of_chain(trace: Trace) -> list[tuple[int, Array, Array]]:
    """Layer, choices in the layer before it `[N, K]`, choices in it `[N, K]`."""
    tokens = tokens_of(trace)
    before, later = neighbours(trace)
    inside = [
        (layer, trace.topk[tokens, layer - 1], trace.topk[tokens, layer])
        for layer in range(1, trace.num_layers)
    ]
    return [(0, trace.topk[before, -1], trace.topk[later, 0]), *inside]
