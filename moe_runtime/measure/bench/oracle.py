"""The upper bound of all predictors: knows the routing that is replayed. For benchmarks only.

N rows, L MoE layers, E experts a layer.
"""

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from moe_runtime.predictors.counts import membership
from moe_runtime.predictors.predictor import Fingerprint, Forecast, StepRows
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array


class Oracle:
    """Says what the rows of `trace` from `position()` on will use, and the row after them."""

    name: ClassVar[str] = "oracle"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, trace: Trace, num_layers: int, position: Callable[[], int]) -> None:
        # [N, L, E]
        self.uses = membership(trace.topk[:, :num_layers], trace.num_experts)
        self.position = position
        self.fingerprint = Fingerprint(
            model=trace.model,
            num_layers=num_layers,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
        )

    def start(self) -> "OracleSession":
        return OracleSession(self)


class OracleSession:
    """Remembers which rows a forward runs."""

    def __init__(self, oracle: Oracle) -> None:
        self._of = oracle
        self._rows = np.zeros(1, np.intp)

    def begin(self, rows: StepRows) -> Forecast:
        first = self._of.position()
        self._rows = np.arange(first, first + len(rows)) % len(self._of.uses)
        return Forecast(first_layer=0, probability=self._of.uses[self._rows])

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        uses = self._of.uses
        following = np.broadcast_to(
            uses[(self._rows[-1:] + 1) % len(uses)], (len(self._rows), *uses.shape[1:])
        )
        return Forecast(
            first_layer=layer + 1,
            probability=uses[self._rows, layer + 1 :],
            next_step=following,
        )

    def forget(self, sequence_id: int) -> None:
        """Nothing is remembered of a sequence."""
