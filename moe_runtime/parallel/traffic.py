"""Formulas for the bytes that expert parallelism moves off a rank.

G ranks. `rows[r, d]` counts, for the tokens of rank r: distinct tokens with an expert on rank d, or
(token, expert) pairs on it. All results are `[G, G]`, from a rank to a rank, with a zero diagonal.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

COUNT_BYTES = 4  # of a row count in our messages
INDEX_BYTES = 2  # of an expert id
CHOICE_BYTES = 2  # of the rank that was chosen for an expert
NUMBER_BYTES = 4  # of a row's number, of a sequence's and of a position
_PEER_COUNT_BYTES = 8  # of a count in transformers' messages, one an expert


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """One token's hidden state, and the same with its routing, as they travel."""

    hidden: int
    routed: int

    @classmethod
    def of(cls, hidden_bytes: int, weights: torch.Tensor) -> "RowBytes":
        """Of rows that take so many bytes, and weights `[n, K]`."""
        return cls(
            hidden=hidden_bytes,
            routed=hidden_bytes + weights.shape[1] * (weights.element_size() + INDEX_BYTES),
        )

    @classmethod
    def sized(cls, *, model_dim: int, item_bytes: int, top_k: int, weight_bytes: int) -> "RowBytes":
        """Of numbers of such sizes."""
        hidden = model_dim * item_bytes
        return cls(hidden=hidden, routed=hidden + top_k * (weight_bytes + INDEX_BYTES))


def alltoall_bytes(rows: Array, row: RowBytes) -> Array:
    """A count to every rank, the rows, and a hidden state back for each."""
    return _off_rank(rows * row.routed + rows.T * row.hidden + COUNT_BYTES)


def auto_bytes(num_ranks: int) -> Array:
    """What choosing costs: every rank learns all counts."""
    return _off_rank(np.full((num_ranks, num_ranks), num_ranks * COUNT_BYTES))


def allreduce_bytes(tokens: Array, row: RowBytes) -> Array:
    """Every rank's tokens, filled up to the most, to every rank, and their partial sums back."""
    num_ranks = len(tokens)
    return _off_rank(np.full((num_ranks, num_ranks), int(tokens.max()) * (row.routed + row.hidden)))


def hierarchical_bytes(between: Array, within: Array, row: RowBytes, num_nodes: int) -> Array:
    """`alltoall` among ranks of one number in their nodes, and then among those of each node.

    `between[r, d]` and `within[r, d]` count the rows that rank r sends to d in either.
    """
    num_ranks = len(between)
    node, place = np.divmod(np.arange(num_ranks), num_ranks // num_nodes)
    counts = (place[:, None] == place).astype(int) + (node[:, None] == node)
    rows = between + within
    return _off_rank(rows * row.routed + rows.T * row.hidden + COUNT_BYTES * counts)


def coherent_bytes(rows: Array, sums: Array, row: RowBytes, top_k: int) -> Array:
    """One MoE layer: counts of two kinds to all, `rows` one way, `sums[r, d]` to where rows stay.

    `rows[r, d]` counts tokens of rank r that have an expert on rank d or go on there.
    """
    traveller = row.routed + top_k * CHOICE_BYTES + NUMBER_BYTES
    return _off_rank(rows * traveller + sums * row.hidden + 2 * len(rows) * COUNT_BYTES)


def context_bytes(rows: Array, kv_bytes: int) -> Array:
    """One decoder layer: keys and values of `rows [G]`, with their numbers, to every rank."""
    return _off_rank(np.tile(rows[:, None] * (kv_bytes + NUMBER_BYTES), len(rows)))


def announced_bytes(tokens: Array) -> Array:
    """Once a forward: sequence and position of every token to every rank."""
    return _off_rank(np.tile(tokens[:, None] * (2 * NUMBER_BYTES), len(tokens)))


def shuffled_bytes(tokens: Array, row: RowBytes, *, shows_path: bool) -> Array:
    """One decoder layer of shared attention: sums to the `tokens [G]` of each rank, rows to all.

    `shows_path`: the rank of a token's first expert comes along, for the tables.
    """
    sums = np.tile(tokens * row.hidden, (len(tokens), 1))
    gathered = tokens * (row.hidden + shows_path * CHOICE_BYTES)
    return _off_rank(sums + gathered[:, None])


def shared_slices_bytes(rows: Array, slices: Array, row: RowBytes) -> Array:
    """All ranks have the same tokens: each sends its `slices [G]` of them, and all get results."""
    return _off_rank(rows * row.routed + rows.T * row.hidden + slices[:, None] * row.hidden)


def shared_sums_bytes(slices: Array, row: RowBytes) -> Array:
    """All ranks have the same tokens: partial sums go to the slice's rank, and the sums to all."""
    return _off_rank((slices[None, :] + slices[:, None]) * row.hidden)


def transformers_all_to_all_bytes(pairs: Array, row: RowBytes, num_experts: int) -> Array:
    """transformers 5.23, `AllToAllEP`: counts of each expert, a row each (token, expert) pair."""
    counts = num_experts // len(pairs) * _PEER_COUNT_BYTES
    return _off_rank(pairs * row.hidden + pairs.T * row.hidden + counts)


def transformers_all_reduce_bytes(tokens: Array, row: RowBytes) -> Array:
    """transformers 5.23, `AllReduceEP`: every rank computes for all tokens, sums are all-reduced.

    By the all-reduce that moves least: parts to be summed to each rank, and the sums to all. The
    batch is the same on all ranks, so nothing is dispatched, and attention runs G times.
    """
    num_ranks = len(tokens)
    total = int(tokens.sum()) * row.hidden
    return _off_rank(np.full((num_ranks, num_ranks), 2 * total / num_ranks))


def deepspeed_bytes(counts: Array, row: RowBytes) -> Array:
    """DeepSpeed 0.19.8, `MOELayer` that drops nothing; `counts [G, E]`: tokens for an expert.

    Every rank sends each expert as many rows as the fullest has from any rank, and gets as many
    back; before, all ranks agree on that number of 8 bytes, by an all-reduce as above.
    """
    num_ranks, num_experts = counts.shape
    rows = int(counts.max()) * (num_experts // num_ranks)
    agreed = 2 * _PEER_COUNT_BYTES / num_ranks
    return _off_rank(np.full((num_ranks, num_ranks), 2.0 * rows * row.hidden + agreed))


def _off_rank(num_bytes: Array) -> Array:
    num_bytes = np.array(num_bytes)
    np.fill_diagonal(num_bytes, 0)
    return num_bytes
