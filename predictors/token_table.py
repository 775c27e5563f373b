"""Counts of which experts a token id uses, after Sem-MoE (arXiv 2503.04398, section 4.1).

Every layer is predicted before the first one runs, from the id alone. An id that was not seen in
fitting takes the counts of the seen id whose embedding is nearest, by cosine.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.predictors.counts import check_fit, frequency, shrunk
from moe_runtime.predictors.predictor import (
    Fingerprint,
    Forecast,
    ModelFacts,
    Progress,
    State,
    StepRows,
    silent,
)
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

_BLOCK_IDS = 1024  # rows of cosines at a time


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTable:
    """A row of shares for each seen id, a last one for everybody else, and who is whose nearest.

    S seen ids. Ids beyond `row_of_id` have no embedding here, and take the last row.
    """

    name: ClassVar[str] = "token_table"
    needs: ClassVar[frozenset[str]] = frozenset({"token_id"})

    fingerprint: Fingerprint
    shares: Array  # [S + 1, L, E] float32
    row_of_id: Array  # [V] int32: which row of `shares` an id takes

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        assert trace.token_id is not None  # checked
        rows = np.flatnonzero((trace.phase != Phase.PADDING) & (trace.token_id >= 0))
        seen, index = np.unique(trace.token_id[rows], return_inverse=True)
        everybody = frequency(trace)
        counts = np.zeros((len(seen), trace.num_layers, trace.num_experts), np.float32)
        layers = np.arange(trace.num_layers)[:, None]
        topk = trace.topk[rows]
        known_rows = np.zeros((len(seen), trace.num_layers, 1), np.float32)
        np.add.at(known_rows[..., 0], index, (topk >= 0).any(-1))
        where = np.broadcast_arrays(index[:, None, None], layers, topk)
        is_known = topk >= 0
        np.add.at(counts, tuple(axis[is_known] for axis in where), 1.0)
        size = max(len(facts.embedding) if facts.embedding is not None else 0, seen.max() + 1)
        row_of_id = np.full(size, len(seen), np.int32)
        if facts.embedding is not None:
            inside = seen[seen < len(facts.embedding)]
            row_of_id[: len(facts.embedding)] = _nearest(facts.embedding, inside)
        row_of_id[seen] = np.arange(len(seen))
        shares = np.concatenate([shrunk(counts, known_rows, everybody), everybody[None]])
        return cls(fingerprint=facts.fingerprint, shares=shares, row_of_id=row_of_id)

    def start(self) -> "TokenTableSession":
        return TokenTableSession(self)

    def state(self) -> State:
        return State(settings={}, tensors={"shares": self.shares, "row_of_id": self.row_of_id})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        shares, row_of_id = state.tensors["shares"], state.tensors["row_of_id"]
        if row_of_id.size and not 0 <= row_of_id.min() <= row_of_id.max() < len(shares):
            raise ValueError(f"row_of_id goes beyond the {len(shares)} rows of shares")
        return cls(fingerprint=fingerprint, shares=shares, row_of_id=row_of_id)

    def of_ids(self, token_id: Array) -> Array:
        """`[T, L, E]` for the ids `[T]`."""
        inside = (token_id >= 0) & (token_id < len(self.row_of_id))
        rows = np.where(inside, self.row_of_id[np.where(inside, token_id, 0)], -1)
        found: Array = self.shares[rows]
        return found


class TokenTableSession:
    """Looks the ids of a forward up; what was routed changes nothing."""

    def __init__(self, predictor: TokenTable) -> None:
        self._of = predictor
        self._said = np.empty((0, 0, 0), np.float32)

    def begin(self, rows: StepRows) -> Forecast:
        self._said = self._of.of_ids(rows.token_id)
        return Forecast(first_layer=0, probability=self._said)

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        return Forecast(first_layer=layer + 1, probability=self._said[:, layer + 1 :])

    def forget(self, sequence_id: int) -> None:
        """Nothing is remembered."""


def _nearest(embedding: Array, seen: Array) -> Array:
    """`[V]` int32: the index in `seen` of the id whose embedding is nearest to each id's."""
    lengths = np.linalg.norm(embedding, axis=1, keepdims=True)
    directions = embedding / np.maximum(lengths, 1e-12)
    found = [
        np.argmax(directions[start : start + _BLOCK_IDS] @ directions[seen].T, axis=1)
        for start in range(0, len(directions), _BLOCK_IDS)
    ]
    return np.concatenate(found).astype(np.int32)
