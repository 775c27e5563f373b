"""The baseline that knows how often each expert is used, and nothing of the moment."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.predictors.counts import check_fit, frequency
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
class Frequency:
    """Every token is given the shares of the fitted trace."""

    name: ClassVar[str] = "frequency"
    needs: ClassVar[frozenset[str]] = frozenset()

    fingerprint: Fingerprint
    shares: Array  # [L, E] float32

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        return cls(fingerprint=facts.fingerprint, shares=frequency(trace))

    def start(self) -> "FrequencySession":
        return FrequencySession(self.shares)

    def state(self) -> State:
        return State(settings={}, tensors={"shares": self.shares})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        return cls(fingerprint=fingerprint, shares=state.tensors["shares"])


class FrequencySession:
    """Says the same of every row."""

    def __init__(self, shares: Array) -> None:
        self._shares = shares
        self._num_rows = 0

    def begin(self, rows: StepRows) -> Forecast:
        self._num_rows = len(rows)
        return Forecast(first_layer=0, probability=self._for_rows(0))

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        is_last = layer == len(self._shares) - 1
        return Forecast(
            first_layer=layer + 1,
            probability=self._for_rows(layer + 1),
            next_step=self._for_rows(0) if is_last else None,
        )

    def forget(self, sequence_id: int) -> None:
        """Nothing is remembered."""

    def _for_rows(self, first_layer: int) -> Array:
        shares = self._shares[first_layer:]
        return np.broadcast_to(shares, (self._num_rows, *shares.shape))
