"""Sequence-level matching of expert activation matrices, after MoE-Infinity (arXiv 2401.14361).

An activation matrix counts how many of a sequence's tokens used each expert in each layer. The
matrix of the sequence at hand, as far as it is observed, is compared with those of stored sequences
by the cosine of each observed layer's row, averaged over those layers; the nearest one's shares
are the prediction. (The released code compares unobserved rows; this is the paper's version.)

T rows, L MoE layers, E experts a layer, M stored matrices.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.predictors.counts import check_fit, frequency, membership, shrunk
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

_CAPACITY = 1000  # stored matrices; the paper finds that more change little


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationMatrix:
    """The stored sequences' shares, of as many sequences as have room: the longest ones."""

    name: ClassVar[str] = "activation_matrix"
    needs: ClassVar[frozenset[str]] = frozenset()

    fingerprint: Fingerprint
    shares: Array  # [L, E] float32, of everybody
    stored: Array  # [M, L, E] float32, of each stored sequence

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        everybody = frequency(trace)
        is_token = trace.phase != Phase.PADDING
        ids, lengths = np.unique(trace.sequence_id[is_token], return_counts=True)
        longest = np.sort(ids[np.argsort(-lengths, kind="stable")[:_CAPACITY]])
        stored = np.empty((len(longest), *everybody.shape), np.float32)
        for index, sequence in enumerate(longest):
            topk = trace.topk[is_token & (trace.sequence_id == sequence)]
            counts = membership(topk, trace.num_experts).sum(0)
            stored[index] = shrunk(counts, (topk >= 0).any(-1).sum(0)[:, None], everybody)
        return cls(fingerprint=facts.fingerprint, shares=everybody, stored=stored)

    def start(self) -> "ActivationMatrixSession":
        return ActivationMatrixSession(self)

    def state(self) -> State:
        return State(settings={}, tensors={"shares": self.shares, "stored": self.stored})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        tensors = state.tensors
        return cls(fingerprint=fingerprint, shares=tensors["shares"], stored=tensors["stored"])


class ActivationMatrixSession:
    """Counts for each sequence what it used, and keeps its likeness to each stored matrix."""

    def __init__(self, predictor: ActivationMatrix) -> None:
        self._of = predictor
        stored = predictor.stored
        lengths = np.linalg.norm(stored, axis=-1, keepdims=True)
        # [L, E, M]: a product with a row of counts is its cosine with every stored row, times its
        # own length.
        self._directions = np.ascontiguousarray((stored / lengths).transpose(1, 2, 0))
        self._matrices: dict[int, _Matrix] = {}
        self._sequences: list[int] = []  # the distinct ones of the forward that runs
        self._index = np.empty(0, np.int64)  # [T]: which of them a row belongs to; -1 padding

    def begin(self, rows: StepRows) -> Forecast:
        is_new = rows.position == 0
        for sequence in np.unique(rows.sequence_id[is_new]).tolist():
            self.forget(sequence)
        sequences, index = np.unique(rows.sequence_id, return_inverse=True)
        self._sequences = sequences.tolist()
        self._index = np.where(rows.is_token, index, -1)
        return Forecast(first_layer=0, probability=self._say(0))

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        used = membership(topk, self._of.fingerprint.num_experts)
        for index, sequence in enumerate(self._sequences):
            counts = used[self._index == index].sum(0)
            if counts.any():
                matrix = self._matrices.setdefault(sequence, _Matrix(self._of.stored))
                matrix.add(layer, counts, self._directions[layer])
        is_last = layer == self._of.fingerprint.num_layers - 1
        return Forecast(
            first_layer=layer + 1,
            probability=self._say(layer + 1),
            next_step=self._say(0) if is_last else None,
        )

    def forget(self, sequence_id: int) -> None:
        self._matrices.pop(sequence_id, None)

    def _say(self, first_layer: int) -> Array:
        """`[T, L - first_layer, E]`: the nearest stored shares, everybody's where none is known."""
        nearest = [self._nearest(sequence) for sequence in self._sequences]
        of_each = np.stack([*nearest, self._of.shares])  # the last for padding
        said: Array = of_each[self._index, first_layer:]
        return said

    def _nearest(self, sequence: int) -> Array:
        matrix = self._matrices.get(sequence)
        if matrix is None:
            return self._of.shares
        found: Array = self._of.stored[int(matrix.likeness.argmax())]
        return found


class _Matrix:
    """One sequence's counts, and the sum over its layers of their cosine with each stored row."""

    def __init__(self, stored: Array) -> None:
        self._counts = np.zeros(stored.shape[1:], np.float32)
        self._cosines = np.zeros(stored.shape[1::-1], np.float32)  # [L, M]
        self.likeness = np.zeros(len(stored), np.float32)  # [M]

    def add(self, layer: int, counts: Array, directions: Array) -> None:
        row = self._counts[layer]
        row += counts
        cosine = row @ directions / np.linalg.norm(row)
        self.likeness += cosine - self._cosines[layer]
        self._cosines[layer] = cosine
