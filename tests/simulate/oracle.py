"""A predictor that knows a trace, for tests of what predictions are worth."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.predictors.predictor import (
    Fingerprint,
    Forecast,
    ModelFacts,
    Progress,
    State,
    StepRows,
    silent,
)
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Oracle:
    """Says what a trace of one token a step will do."""

    name: ClassVar[str] = "oracle"
    needs: ClassVar[frozenset[str]] = frozenset()
    fingerprint: Fingerprint
    uses: Array  # [N, L, E]

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        uses = np.zeros((trace.num_tokens, trace.num_layers, trace.num_experts), np.float32)
        token, layer, rank = np.nonzero(trace.topk >= 0)
        uses[token, layer, trace.topk[token, layer, rank]] = 1.0
        return cls(fingerprint=facts.fingerprint, uses=uses)

    def start(self) -> "OracleSession":
        return OracleSession(self.uses)

    def state(self) -> State:
        return State(settings={}, tensors={"uses": self.uses})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        return cls(fingerprint=fingerprint, uses=state.tensors["uses"])


class OracleSession:
    def __init__(self, uses: Array) -> None:
        self._uses = np.concatenate([uses, np.zeros_like(uses[:1])])
        self._token = -1

    def begin(self, rows: StepRows) -> Forecast:
        self._token += 1
        return Forecast(first_layer=0, probability=self._uses[self._token][None])

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        return Forecast(
            first_layer=layer + 1,
            probability=self._uses[self._token][None, layer + 1 :],
            next_step=self._uses[self._token + 1][None],
        )

    def forget(self, sequence_id: int) -> None:
        pass
