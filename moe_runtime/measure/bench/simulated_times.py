"""Times of a layer's messages on more GPUs than there are: simulated, from an interconnect file.

G GPUs, L MoE layers, E experts a layer, N tokens, K top-k.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError, TraceError
from moe_runtime.measure.bench.rank_traffic import (
    PEER_ALL_REDUCE,
    PEER_ALL_TO_ALL,
    PEER_DEEPSPEED,
    WITHOUT_DEDUPLICATION,
    Replay,
    formula_bytes,
)
from moe_runtime.parallel.allreduce import AllReduceDispatcher
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.hierarchical import HierarchicalDispatcher
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.perf.alpha_beta import AlphaBeta
from moe_runtime.perf.interconnect import Interconnect
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]

GPUS_PER_NODE = 8
_MOST_LAYERS = 4  # at even distances; all of a large model would take minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedTime:
    """Seconds of one layer's messages; never measured."""

    gpus: int
    nodes: int
    tokens_per_rank: int
    dispatcher: str
    simulated_seconds: float
    busiest_bytes: float  # that leave a GPU


def simulate_times(
    interconnect: Interconnect,
    replay: Replay,
    *,
    gpus: list[int],
    tokens_per_rank: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SimulatedTime]:
    """One forward of neighbouring tokens on each number of GPUs, mean over some layers.

    Assumes that a collective takes its measured start for each partner that a GPU has, as many as
    it was measured with making one start, and beta for each byte that leaves the busiest GPU,
    wherever it goes; that nothing overlaps; and equal parts, or where there are more GPUs than
    experts every expert on as many GPUs. Raises TraceError and PlacementError.
    """
    if interconnect.ranks < 2:
        raise PlacementError(
            "the interconnect file was measured on 1 rank, where nothing is sent; measure it with "
            "torchrun --nproc-per-node N -m moe_runtime probe --collectives, N above 1"
        )
    layers = np.unique(np.linspace(0, replay.topk.shape[1] - 1, _MOST_LAYERS).astype(int))
    found = []
    for done, size in enumerate(gpus):
        placement = even_placement(replay.num_experts, len(layers), size)
        needed = size * tokens_per_rank
        if len(replay.topk) < needed:
            raise TraceError(
                f"{len(replay.topk)} tokens are fewer than {size} GPUs of {tokens_per_rank} need; "
                "give a longer trace, or simulate fewer GPUs or tokens"
            )
        batch = replay.topk[:needed, layers].reshape(size, tokens_per_rank, len(layers), -1)
        plans = [ExpertPlan.of(placement, rank) for rank in range(size)]
        one = replace(replay, num_ranks=size)
        books = [formula_bytes(one, plans, batch, layer) for layer in range(len(layers))]
        for name in _KINDS:
            if name in books[0]:
                most = float(np.mean([book[name].sum(1).max() for book in books]))
                seconds = _seconds(interconnect, name, one, placement, most)
                found.append(
                    SimulatedTime(
                        gpus=size,
                        nodes=placement.nodes,
                        tokens_per_rank=tokens_per_rank,
                        dispatcher=name,
                        simulated_seconds=seconds,
                        busiest_bytes=most,
                    )
                )
        on_progress(done + 1, len(gpus))
    return found


def even_placement(num_experts: int, num_layers: int, gpus: int) -> Placement:
    """Equal parts, or one expert a GPU in turn. Raises PlacementError if neither comes out even."""
    if num_experts % gpus and gpus % num_experts:
        raise PlacementError(
            f"{num_experts} experts and {gpus} GPUs do not divide; simulate a number of GPUs that "
            "divides the experts, or a multiple of them"
        )
    slots = np.arange(max(num_experts, gpus)) % num_experts
    return Placement(
        model="",
        num_experts=num_experts,
        num_hidden_layers=num_layers,
        layer_ids=tuple(range(num_layers)),
        gpus=gpus,
        nodes=1 if gpus % GPUS_PER_NODE else gpus // GPUS_PER_NODE,
        slots=np.tile(slots, (num_layers, 1)),
    )


# Of each dispatcher the collectives that it makes of a layer: all-to-alls, and pairs of a gather
# and a reduce-scatter, as which an all-reduce counts.
_KINDS = {
    AllToAllDispatcher.name: (3, 0),
    WITHOUT_DEDUPLICATION: (3, 0),
    HierarchicalDispatcher.name: (3, 0),  # between nodes, and as many within
    AllReduceDispatcher.name: (0, 1),
    PEER_ALL_TO_ALL: (3, 0),
    PEER_ALL_REDUCE: (0, 1),
    PEER_DEEPSPEED: (2, 1),
}


def _seconds(
    interconnect: Interconnect, name: str, replay: Replay, placement: Placement, most_bytes: float
) -> float:
    num_exchanges, num_reductions = _KINDS[name]
    partners = placement.gpus - 1
    if name == HierarchicalDispatcher.name:
        partners = placement.nodes - 1 + placement.gpus // placement.nodes - 1
    measured = interconnect.ranks - 1

    def start(fit: AlphaBeta) -> float:
        return fit.alpha_seconds * partners / measured

    exchange = interconnect.all_to_all
    gather, scatter = interconnect.all_gather, interconnect.reduce_scatter
    starts = num_exchanges * start(exchange) + num_reductions * (start(gather) + start(scatter))
    if num_exchanges:
        return starts + most_bytes * exchange.beta_seconds
    there = 0.5  # of an all-reduce; a gather of rows carries their routing too
    if name == AllReduceDispatcher.name:
        there = replay.row.routed / (replay.row.routed + replay.row.hidden)
    beta = there * gather.beta_seconds + (1 - there) * scatter.beta_seconds
    return starts + most_bytes * beta
