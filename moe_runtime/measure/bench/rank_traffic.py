"""Bytes that ranks exchange for replayed routing: by formula, and counted on a part of it.

G ranks, L MoE layers, E experts a layer, N tokens, K top-k, T tokens a rank, D model dim.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_runtime.errors import TraceError
from moe_runtime.parallel.allreduce import AllReduceDispatcher
from moe_runtime.parallel.alltoall import AllToAllDispatcher, Visits
from moe_runtime.parallel.auto import AutoDispatcher
from moe_runtime.parallel.dispatcher import Dispatcher, Rows
from moe_runtime.parallel.hierarchical import HierarchicalDispatcher, node_visits
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.traffic import (
    COUNT_BYTES,
    RowBytes,
    allreduce_bytes,
    alltoall_bytes,
    auto_bytes,
    deepspeed_bytes,
    hierarchical_bytes,
    transformers_all_reduce_bytes,
    transformers_all_to_all_bytes,
)
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]

WITHOUT_DEDUPLICATION = "alltoall, a row each pair"
PEER_ALL_TO_ALL = "transformers all_to_all"
PEER_ALL_REDUCE = "transformers all_reduce"
PEER_DEEPSPEED = "DeepSpeed-MoE, no drop"
_PEERS = (PEER_ALL_TO_ALL, PEER_ALL_REDUCE, PEER_DEEPSPEED)
DTYPE = torch.bfloat16
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRow:
    """One dispatcher under one placement. `counted` of the tokens that were really sent."""

    placement: str
    dispatcher: str
    tokens_per_rank: int
    tokens: int  # that the formula saw
    bytes_per_token_layer: float
    bytes_between_nodes: float  # of them, those that leave a node
    ratio: float  # to a row each pair, under the placement of equal parts
    counted_bytes: int | None
    counted_formula_bytes: int | None
    moe_bytes_per_token_layer: float | None = None  # where others carry context or attention
    local_activation_rate: dict[str, float | None] | None = None  # by whether tables saw the id


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Routing `[N, L, K]`, of which neighbouring tokens are dealt out to ranks, T to each."""

    topk: Array
    num_experts: int
    num_ranks: int
    model_dim: int

    @property
    def row(self) -> RowBytes:
        """Of one token."""
        return self._row(self.topk.shape[2])

    @property
    def row_of_pair(self) -> RowBytes:
        """Of one token for one of its experts."""
        return self._row(1)

    def spans(self, tokens_per_rank: int, limit: int) -> list[slice]:
        """Batches at even distances over the trace, of `limit` tokens together at most."""
        step = self.num_ranks * tokens_per_rank
        num_batches = min(len(self.topk), limit) // step
        firsts = np.linspace(0, len(self.topk) - step, num_batches).astype(int)
        return [slice(int(first), int(first) + step) for first in firsts]

    def batches(self, tokens_per_rank: int, limit: int) -> Iterator[Array]:
        """`[G, T, L, K]` of each span."""
        for span in self.spans(tokens_per_rank, limit):
            batch = self.topk[span]
            yield batch.reshape(self.num_ranks, tokens_per_rank, *batch.shape[1:])

    def _row(self, top_k: int) -> RowBytes:
        return RowBytes.sized(
            model_dim=self.model_dim,
            item_bytes=DTYPE.itemsize,
            top_k=top_k,
            weight_bytes=DTYPE.itemsize,
        )


def token_ids_of(topk: Array, token_id: Array | None) -> Array:
    """`[N]` of the tokens of `routing_of`; -1 where the trace has no ids."""
    if token_id is None:
        token_id = np.full(len(topk), -1)
    known: Array = token_id[(topk >= 0).all(axis=(1, 2))]
    return known


def routing_of(topk: Array, *, top_k: int | None, source: str) -> Array:
    """`[N, L, K]` of the tokens that have all their experts, of each the first `top_k`."""
    if top_k is not None and not 1 <= top_k <= topk.shape[2]:
        raise TraceError(
            f"top_k is {top_k}, and {source} has {topk.shape[2]} experts a token; give a number "
            f"from 1 to {topk.shape[2]}"
        )
    whole = topk[(topk >= 0).all(axis=(1, 2))]
    if not len(whole):
        raise TraceError(f"{source} has no token whose experts are known in all layers")
    return whole if top_k is None else whole[..., :top_k]


def formula_bytes(
    replay: Replay, plans: list[ExpertPlan], batch: Array, layer: int
) -> dict[str, Array]:
    """Bytes of one layer by dispatcher, `[G, G]`; of peers where ranks divide the experts."""
    index = torch.from_numpy(batch[:, :, layer].astype(np.int64))
    tokens = np.full(replay.num_ranks, batch.shape[1])
    rows = np.array(
        [Visits.of(plan, layer, mine).counts for plan, mine in zip(plans, index, strict=True)]
    )
    pairs = np.array(
        [
            np.bincount(
                plan.nearest.owners(layer, mine.reshape(-1, 1), plan.rank).flatten().numpy(),
                minlength=replay.num_ranks,
            )
            for plan, mine in zip(plans, index, strict=True)
        ]
    )
    chosen = np.array(
        [np.bincount(mine.flatten().numpy(), minlength=replay.num_experts) for mine in index]
    )
    alltoall = alltoall_bytes(rows, replay.row)
    allreduce = allreduce_bytes(tokens, replay.row)
    counts = COUNT_BYTES * (1 - np.eye(replay.num_ranks, dtype=int))
    is_fewer = allreduce.sum() <= (alltoall - counts).sum()
    found = {
        AllToAllDispatcher.name: alltoall,
        WITHOUT_DEDUPLICATION: alltoall_bytes(pairs, replay.row_of_pair),
        AllReduceDispatcher.name: allreduce,
        AutoDispatcher.name: auto_bytes(replay.num_ranks)
        + (allreduce if is_fewer else alltoall - counts),
    }
    if plans[0].num_nodes > 1:
        between, within = _rows_by_node(plans, layer, index)
        found[HierarchicalDispatcher.name] = hierarchical_bytes(
            between, within, replay.row, plans[0].num_nodes
        )
    if replay.num_experts % replay.num_ranks:  # peers refuse that
        return found
    return found | {
        PEER_ALL_TO_ALL: transformers_all_to_all_bytes(pairs, replay.row, replay.num_experts),
        PEER_ALL_REDUCE: transformers_all_reduce_bytes(tokens, replay.row),
        PEER_DEEPSPEED: deepspeed_bytes(chosen, replay.row),
    }


def _rows_by_node(plans: list[ExpertPlan], layer: int, index: torch.Tensor) -> tuple[Array, Array]:
    """Rows `[G, G]` that go to peers on other nodes, and from there, or at once, within a node."""
    visits = [node_visits(plan, layer, mine) for plan, mine in zip(plans, index, strict=True)]
    between = np.array([visit.counts for visit in visits])
    within = []
    for rank, plan in enumerate(plans):
        others = [g for g in range(len(plans)) if g != rank]
        passing = []
        for source in (rank, *others):  # in the order in which the rank hands them on
            comes = visits[source].to_rank[rank]
            is_here = visits[source].owner[comes] == rank
            passing.append(index[source][comes].masked_fill(~is_here, plan.num_experts))
        within.append(Visits.of(plan, layer, torch.cat(passing)).counts)
    return between, np.array(within)


def send_batch(ledger: Ledger, plan: ExpertPlan, replay: Replay, name: str, batch: Array) -> None:
    """This rank's tokens of `batch` through a dispatcher, every layer, experts left out."""
    dispatcher = _dispatcher(name, plan, ledger)
    generator = torch.Generator().manual_seed(_SEED)
    for layer in range(batch.shape[2]):
        index = torch.from_numpy(batch[plan.rank, :, layer].astype(np.int64))
        if name == WITHOUT_DEDUPLICATION:
            index = index.reshape(-1, 1)
        hidden = torch.randn((len(index), replay.model_dim), generator=generator).to(DTYPE)
        rows = Rows(hidden, index, torch.ones(index.shape, dtype=DTYPE))
        here, state = dispatcher.dispatch(layer, rows, [len(index)] * plan.num_ranks)
        back = dispatcher.combine(here.hidden, state)
        assert back.shape == hidden.shape


def measure_traffic(
    ledger: Ledger,
    replay: Replay,
    placements: Mapping[str, Placement],
    *,
    tokens_per_rank: list[int],
    max_tokens: int,
    sent_tokens: int,
    on_progress: Callable[[int, int], None],
) -> list[TrafficRow]:
    """All dispatchers under all placements; collective. The first placement is the yardstick's.

    The formula sees `max_tokens`, of which about `sent_tokens` are sent and counted too.
    """
    found: list[TrafficRow] = []
    done, num_cells = 0, len(placements) * len(tokens_per_rank)
    for size in tokens_per_rank:
        yardstick = 0.0
        for placement_name, placement in placements.items():
            plans = [ExpertPlan.of(placement, rank) for rank in range(replay.num_ranks)]
            sums, tokens = _sums(replay, plans, replay.batches(size, max_tokens))
            if not tokens:
                raise TraceError(
                    f"{len(replay.topk)} tokens are fewer than {replay.num_ranks} ranks of {size} "
                    "need; give a longer trace or fewer --tokens"
                )
            yardstick = yardstick or float(sums[WITHOUT_DEDUPLICATION].sum())
            node = np.arange(replay.num_ranks) * placement.nodes // replay.num_ranks
            leaves_node = node[:, None] != node
            limit = max(sent_tokens, replay.num_ranks * size)
            expected, _ = _sums(replay, plans, replay.batches(size, limit))
            for name, matrix in sums.items():
                total = float(matrix.sum())
                counted = None
                if name not in _PEERS:
                    counted = _count(ledger, plans[ledger.rank], replay, name, size, limit)
                found.append(
                    TrafficRow(
                        placement=placement_name,
                        dispatcher=name,
                        tokens_per_rank=size,
                        tokens=tokens,
                        bytes_per_token_layer=total / tokens / replay.topk.shape[1],
                        bytes_between_nodes=float(matrix[leaves_node].sum())
                        / tokens
                        / replay.topk.shape[1],
                        ratio=total / yardstick,
                        counted_bytes=counted,
                        counted_formula_bytes=None
                        if counted is None
                        else round(expected[name].sum()),
                    )
                )
            done += 1
            on_progress(done, num_cells)
    return found


def _sums(
    replay: Replay, plans: list[ExpertPlan], batches: Iterator[Array]
) -> tuple[dict[str, Array], int]:
    sums: dict[str, Array] = {}
    tokens = 0
    for batch in batches:
        tokens += batch.shape[0] * batch.shape[1]
        for layer in range(batch.shape[2]):
            for name, num_bytes in formula_bytes(replay, plans, batch, layer).items():
                sums[name] = sums[name] + num_bytes if name in sums else num_bytes
    return sums, tokens


def _count(
    ledger: Ledger, plan: ExpertPlan, replay: Replay, name: str, size: int, limit: int
) -> int:
    """Bytes that all ranks sent, by their ledgers."""
    counting = ledger.fresh()
    for batch in replay.batches(size, limit):
        send_batch(counting, plan, replay, name, batch)
    mine = sum(sum(line.num_bytes) for line in counting.sent().values())
    return sum(int(text) for text in ledger.gather_texts(str(mine)))


def _dispatcher(name: str, plan: ExpertPlan, ledger: Ledger) -> Dispatcher[Any]:
    if name == AllReduceDispatcher.name:
        return AllReduceDispatcher(plan, ledger)
    if name == AutoDispatcher.name:
        return AutoDispatcher(plan, ledger)
    if name == HierarchicalDispatcher.name:
        return HierarchicalDispatcher(plan, ledger)
    return AllToAllDispatcher(plan, ledger)
