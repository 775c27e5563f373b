"""What a session remembers: the routing of the forward that runs, and of the tokens before it.

T rows, L MoE layers, K experts a token.
"""

import numpy as np

from moe_runtime.predictors.predictor import StepRows
from moe_runtime.trace_fields import Array


class StepLog:
    """Keeps the last routed token of every sequence."""

    def __init__(self, num_layers: int, top_k: int) -> None:
        self._shape = num_layers, top_k
        self._last: dict[int, Array] = {}  # [L, K] by sequence
        self._sequences: list[int] = []  # of the rows of the forward that runs; -1 for padding
        self.topk = np.empty((0, *self._shape), np.int16)  # [T, L, K] of that forward; -1 not yet

    def begin(self, rows: StepRows) -> Array:
        """`[T, L, K]`: the routing of the token before each row, -1 where it is not known.

        Of several tokens of one sequence that run together only the first one's is known.
        """
        self._sequences = np.where(rows.is_token, rows.sequence_id, -1).tolist()
        self.topk = np.full((len(rows), *self._shape), -1, np.int16)
        before = np.full((len(rows), *self._shape), -1, np.int16)
        met = set()
        starts = (rows.position == 0).tolist()
        for row, sequence in enumerate(self._sequences):
            if sequence >= 0 and sequence not in met:
                met.add(sequence)
                if sequence in self._last and not starts[row]:
                    before[row] = self._last[sequence]
        return before

    def add(self, layer: int, topk: Array) -> None:
        """Layer `layer` chose `topk` `[T, K]`; after the last layer the rows are remembered."""
        self.topk[:, layer] = topk
        if layer == self._shape[0] - 1:
            for row, sequence in enumerate(self._sequences):
                if sequence >= 0:
                    self._last[sequence] = self.topk[row]

    def forget(self, sequence_id: int) -> None:
        self._last.pop(sequence_id, None)
