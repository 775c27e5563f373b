"""The baseline that expects a token's experts again for the next token of its sequence."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.predictors.counts import (
    check_fit,
    frequency,
    membership,
    neighbours,
    shrunk,
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreviousToken:
    """Knows for every expert how probable it is after a token that used it, and after one not.

    Where the token before is not known, as inside a prompt that runs as one forward, it is left
    with the expert's share.
    """

    name: ClassVar[str] = "previous_token"
    needs: ClassVar[frozenset[str]] = frozenset()

    fingerprint: Fingerprint
    shares: Array  # [L, E] float32
    after_use: Array  # [L, E] float32
    after_none: Array  # [L, E] float32

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        shares = frequency(trace)
        used = np.zeros((2, *shares.shape))  # among how many pairs; of the second tokens
        stayed, joined = np.zeros_like(used[0]), np.zeros_like(used[0])
        before, after = neighbours(trace)
        for start in range(0, len(before), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            first = membership(trace.topk[before[block]], trace.num_experts)
            second = membership(trace.topk[after[block]], trace.num_experts)
            used += np.stack([first.sum(0), (1 - first).sum(0)])
            stayed += (first * second).sum(0)
            joined += ((1 - first) * second).sum(0)
        return cls(
            fingerprint=facts.fingerprint,
            shares=shares,
            after_use=shrunk(stayed, used[0], shares),
            after_none=shrunk(joined, used[1], shares),
        )

    def start(self) -> "PreviousTokenSession":
        return PreviousTokenSession(self)

    def state(self) -> State:
        tensors = {name: getattr(self, name) for name in ("shares", "after_use", "after_none")}
        return State(settings={}, tensors=tensors)

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        return cls(
            fingerprint=fingerprint,
            shares=state.tensors["shares"],
            after_use=state.tensors["after_use"],
            after_none=state.tensors["after_none"],
        )


_BLOCK_ROWS = 4096  # [block, L, E] floats at a time


class PreviousTokenSession:
    """Remembers the last token of each sequence."""

    def __init__(self, predictor: PreviousToken) -> None:
        self._of = predictor
        self._log = StepLog(predictor.fingerprint.num_layers, predictor.fingerprint.top_k)
        self._said = np.empty((0, 0, 0), np.float32)  # [T, L, E] before the first layer

    def begin(self, rows: StepRows) -> Forecast:
        self._said = self._after(self._log.begin(rows))
        return Forecast(first_layer=0, probability=self._said)

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        self._log.add(layer, topk)
        is_last = layer == self._of.fingerprint.num_layers - 1
        return Forecast(
            first_layer=layer + 1,
            probability=self._said[:, layer + 1 :],
            next_step=self._after(self._log.topk) if is_last else None,
        )

    def forget(self, sequence_id: int) -> None:
        self._log.forget(sequence_id)

    def _after(self, topk: Array) -> Array:
        """`[T, L, E]` for the tokens that follow `topk` `[T, L, K]`."""
        was_used = membership(topk, self._of.fingerprint.num_experts) > 0
        known = (topk >= 0).any(-1, keepdims=True)
        said: Array = np.where(
            known, np.where(was_used, self._of.after_use, self._of.after_none), self._of.shares
        )
        return said
