"""Bytes of dispatchers that step decoder layers, by formula, for replayed routing.

G ranks, N tokens of a batch, L MoE layers, K top-k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_runtime.parallel.alltoall import Visits
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.traffic import (
    RowBytes,
    alltoall_bytes,
    announced_bytes,
    coherent_bytes,
    context_bytes,
    shuffled_bytes,
)
from moe_runtime.parallel.waiting_ranks import WaitingRanks

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SteppedBytes:
    """From rank to rank, `[G, G]`: in MoE layers, and for what stands around them."""

    moe: Array
    around: Array  # keys and values, or the sums and rows of shared attention


@dataclass(frozen=True, slots=True, kw_only=True)
class CoherentLayer:
    """Where the rows of one forward go in one MoE layer, all `[G, G]` from rank to rank."""

    tokens: Array  # [G] rows on each rank before the layer
    visits: Array  # rows that have an expert there, or go on there
    sums: Array  # rows whose experts are there, and that go on elsewhere


def coherent_path(
    plans: Sequence[ExpertPlan], topk_NLK: Array, origin_N: Array
) -> Iterator[CoherentLayer]:
    """Token by token, for ids in the order of router weights; behind the last layer all go home."""
    G, L = len(plans), topk_NLK.shape[1]
    standing = [np.flatnonzero(origin_N == g) for g in range(G)]
    for layer in range(L):
        visits, sums = np.zeros((G, G), np.int64), np.zeros((G, G), np.int64)
        arriving: list[list[Array]] = [[] for _ in range(G)]
        for rank, tokens in enumerate(standing):
            index = torch.from_numpy(topk_NLK[tokens, layer].astype(np.int64))
            owner = plans[rank].nearest.owners(layer, index, first_turn=rank).numpy()
            home = origin_N[tokens] if layer == L - 1 else owner[:, 0]
            for peer in range(G):
                is_owner = (owner == peer).any(axis=1)
                visits[rank, peer] += int((is_owner | (home == peer)).sum())
                arriving[peer].append(tokens[home == peer])
                for other in range(G):
                    sums[peer, other] += int((is_owner & (home == other)).sum()) * (peer != other)
        yield CoherentLayer(
            tokens=np.array([len(tokens) for tokens in standing]), visits=visits, sums=sums
        )
        standing = [np.concatenate(parts) for parts in arriving]


def coherent_formula(
    plans: Sequence[ExpertPlan], topk_NLK: Array, origin_N: Array, row: RowBytes, kv_bytes: int
) -> SteppedBytes:
    """A forward of a model whose decoder layers are all MoE layers."""
    G, top_k = len(plans), topk_NLK.shape[2]
    moe = np.zeros((G, G), np.int64)
    around = announced_bytes(np.bincount(origin_N, minlength=G))
    for layer in coherent_path(plans, topk_NLK, origin_N):
        moe += coherent_bytes(layer.visits, layer.sums, row, top_k)
        around += context_bytes(layer.tokens, kv_bytes)
    return SteppedBytes(moe=moe, around=around)


@dataclass(slots=True, kw_only=True)
class ShuffledReplay:
    """A batch that every rank has, with attention shared by heads; without tables, in slices."""

    plans: Sequence[ExpertPlan]
    waiting: WaitingRanks | None
    row: RowBytes

    def run(self, topk_NLK: Array, token_id_N: Array) -> tuple[SteppedBytes, Array]:
        """Its bytes, and `[2, 2]` (token, expert) pairs: of unseen and seen ids, all, local."""
        G, (N, L, K) = len(self.plans), topk_NLK.shape
        waiting = self.waiting
        moe, around = np.zeros((G, G), np.int64), np.zeros((G, G), np.int64)
        ids = torch.from_numpy(token_id_N.astype(np.int64))
        path = (torch.full((N,), -1), torch.full((N,), -1))
        rank_N = torch.arange(N) * G // N
        is_seen = np.zeros(N, np.bool_)
        if waiting is not None:
            is_seen = waiting.is_seen(waiting.rows(ids)).numpy()
        pairs = np.zeros((2, 2), np.int64)
        for layer in range(L):
            if waiting is not None:
                rank_N = waiting.ranks(layer, waiting.rows(ids), *path)
            visits, first = np.zeros((G, G), np.int64), torch.empty(N, dtype=torch.int64)
            for rank, plan in enumerate(self.plans):
                mine = (rank_N == rank).nonzero().squeeze(1)
                index = torch.from_numpy(topk_NLK[mine.numpy(), layer].astype(np.int64))
                found = Visits.of(plan, layer, index)
                visits[rank] = found.counts
                first[mine] = found.owner[:, 0]
                local_M = (found.owner == rank).sum(1).numpy()
                for kind in (0, 1):
                    is_kind = is_seen[mine.numpy()] == kind
                    pairs[kind] += [int(is_kind.sum()) * K, int(local_M[is_kind].sum())]
            path = (path[1], first)
            tokens = torch.bincount(rank_N, minlength=G).numpy()
            moe += alltoall_bytes(visits, self.row)
            around += shuffled_bytes(tokens, self.row, shows_path=waiting is not None)
        return SteppedBytes(moe=moe, around=around), pairs
