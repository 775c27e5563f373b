"""Scores a placement on traces: hops, fan-out and load, by layer and by domain.

N tokens, L MoE layers, K experts a token, E experts a layer, G GPUs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.placement.topology import Topology
from moe_runtime.placement_map import Placement
from moe_runtime.trace import Trace

Array = np.ndarray[Any, Any]

BATCH_TOKENS = 256  # of load_max_over_mean_256


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvaluation:
    """One layer; its crossings are of the transitions into it, none for the first."""

    layer: int  # row of the placement
    layer_id: int
    crossing_fraction: float
    inter_node_fraction: float
    fanout: float
    load_max_over_mean: float
    load_max_over_mean_256: float
    local_activation_rate: float
    gpu_load: tuple[int, ...]  # [G] top-k assignments


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """Figures of a placement on some tokens; crossings are those of the first expert's path."""

    num_tokens: int
    crossings_per_token: float
    crossing_fraction: float  # of the transitions between layers
    inter_node_fraction: float
    cost_per_transition: float  # by the topology's costs
    fanout: float  # distinct GPUs a token and layer
    load_max_over_mean: float  # busiest GPU's assignments over the mean's, mean of the layers
    load_max_over_mean_256: float  # the same within batches of 256 tokens
    imbalance_ratio: float  # (max - mean) / mean
    local_activation_rate: float  # assignments on the GPU where the token waits
    traffic: Array  # [G, G] transitions from GPU to GPU
    per_layer: tuple[LayerEvaluation, ...]
    per_domain: Mapping[str, "Evaluation"] = field(default_factory=dict)


def evaluate(
    placement: Placement, traces: Sequence[Trace], topology: Topology | None = None
) -> Evaluation:
    """Follow every token of `traces` through the placement (flat topology if None).

    A token waits where its first expert of the layer before was computed (before the first layer:
    nowhere, so every replica is as near as another). Each of its K experts is taken at the replica
    whose GPU is cheapest to reach from there; among equally cheap ones tokens take turns, by the
    number of their row. Batches of 256 are consecutive rows; a last part of one counts only if
    there is nothing else. Raises PlacementError if traces and placement do not fit.
    """
    topology = topology or Topology.of_nodes(placement.nodes, placement.gpus, inter=1.0)
    _check_fit(placement, traces, topology)
    tally = _Tally(placement, topology)
    domains: dict[str, _Tally] = {}
    for trace in traces:
        _follow(trace, tally)
        if trace.domain is not None:
            for name in np.unique(trace.domain):
                if name:
                    domain = domains.setdefault(str(name), _Tally(placement, topology))
                    _follow(trace.select(trace.domain == name), domain)
    return tally.finish({name: domain.finish({}) for name, domain in sorted(domains.items())})


def _check_fit(placement: Placement, traces: Sequence[Trace], topology: Topology) -> None:
    if not traces:
        raise PlacementError("no trace was given; a placement is scored on at least one")
    if topology.gpus != placement.gpus:
        raise PlacementError(
            f"the topology has {topology.gpus} GPUs and the placement {placement.gpus}; give one "
            "for the placement's GPUs"
        )
    for trace in traces:
        for name in ("num_experts", "layer_ids"):
            mine, other = getattr(placement, name), getattr(trace, name)
            if mine != other:
                raise PlacementError(
                    f"the placement has {name} {mine!r:.60} and the trace {other!r:.60}; they are "
                    "of different models"
                )
        if "unknown" not in (placement.model, trace.model) and placement.model != trace.model:
            raise PlacementError(
                f"the placement is for model {placement.model!r} and the trace of "
                f"{trace.model!r}; score it on a trace of its own model"
            )


class _Choices:
    """For each layer, whence and expert: the GPUs of the nearest replicas, and how many."""

    def __init__(self, placement: Placement, costs: Array) -> None:
        # "Nowhere" is the last row: everything is equally near.
        self._hosts = placement.hosts()
        self._costs = np.vstack([costs, np.zeros(len(costs))])
        self._layer = -1

    def of_layer(self, layer: int) -> tuple[Array, Array]:
        """`gpus` `[G + 1, E, R]`, the nearest first, and `count` `[G + 1, E]`."""
        hosts_EG = self._hosts[layer].T
        most = int(hosts_EG.sum(axis=1).max())
        cost = np.where(hosts_EG[None], self._costs[:, None, :], np.inf)  # [G+1, E, G]
        order = np.argsort(cost, axis=2, kind="stable")[..., :most]
        nearest = np.take_along_axis(cost, order, axis=2)
        return order, (nearest == nearest[..., :1]).sum(axis=2)


class _Tally:
    """Sums over tokens that become an Evaluation."""

    def __init__(self, placement: Placement, topology: Topology) -> None:
        L, G = placement.num_layers, placement.gpus
        self.placement = placement
        self.topology = topology
        self.choices = _Choices(placement, topology.costs)
        self.num_tokens = 0
        self.traffic = np.zeros((L, G, G), np.int64)  # into the layer; none into the first
        self.load = np.zeros((L, G), np.int64)
        self.visits = np.zeros(L, np.int64)  # tokens with an expert in the layer
        self.gpus_reached = np.zeros(L, np.int64)
        self.waiting = np.zeros(L, np.int64)  # assignments of tokens that wait somewhere
        self.local = np.zeros(L, np.int64)
        self.batch_ratio = np.zeros(L)
        self.batches = np.zeros(L, np.int64)

    def finish(self, per_domain: Mapping[str, Evaluation]) -> Evaluation:
        layers = tuple(self._layer(layer) for layer in range(self.placement.num_layers))
        reached = [layer for row, layer in enumerate(layers) if self.visits[row]]
        traffic = self.traffic.sum(axis=0)
        crossings = int(traffic.sum() - np.trace(traffic))
        transitions = max(int(traffic.sum()), 1)
        ratio = _mean([layer.load_max_over_mean for layer in reached])
        return Evaluation(
            num_tokens=self.num_tokens,
            crossings_per_token=crossings / max(self.num_tokens, 1),
            crossing_fraction=crossings / transitions,
            inter_node_fraction=self._between_nodes(traffic) / transitions,
            cost_per_transition=float((traffic * self.topology.costs).sum()) / transitions,
            fanout=float(self.gpus_reached.sum()) / max(int(self.visits.sum()), 1),
            load_max_over_mean=ratio,
            load_max_over_mean_256=_mean([layer.load_max_over_mean_256 for layer in reached]),
            imbalance_ratio=ratio - 1.0,
            local_activation_rate=float(self.local.sum()) / max(int(self.waiting.sum()), 1),
            traffic=traffic,
            per_layer=layers,
            per_domain=per_domain,
        )

    def _layer(self, layer: int) -> LayerEvaluation:
        traffic, load = self.traffic[layer], self.load[layer]
        transitions = max(int(traffic.sum()), 1)
        return LayerEvaluation(
            layer=layer,
            layer_id=self.placement.layer_ids[layer],
            crossing_fraction=float(traffic.sum() - np.trace(traffic)) / transitions,
            inter_node_fraction=self._between_nodes(traffic) / transitions,
            fanout=float(self.gpus_reached[layer]) / max(int(self.visits[layer]), 1),
            load_max_over_mean=float(load.max() / max(load.mean(), 1e-300)) if load.any() else 1.0,
            load_max_over_mean_256=float(self.batch_ratio[layer])
            / max(int(self.batches[layer]), 1),
            local_activation_rate=float(self.local[layer]) / max(int(self.waiting[layer]), 1),
            gpu_load=tuple(int(assignments) for assignments in load),
        )

    def _between_nodes(self, traffic: Array) -> float:
        node = self.topology.node_of()
        return float(traffic[node[:, None] != node[None, :]].sum())


def _follow(trace: Trace, tally: _Tally) -> None:
    """Add the tokens of a trace to the tally."""
    N, L, K = trace.topk.shape
    G = tally.placement.gpus
    tally.num_tokens += N
    row_NK = np.repeat(np.arange(N)[:, None], K, axis=1)
    at_N = np.full(N, G)  # where each token waits; G: nowhere
    for layer in range(L):
        gpus, count = tally.choices.of_layer(layer)
        expert_NK = trace.topk[:, layer].astype(np.int64)
        is_used = expert_NK >= 0
        expert = np.where(is_used, expert_NK, 0)
        turn = row_NK % count[at_N[:, None], expert]
        chosen_NK = np.where(is_used, gpus[at_N[:, None], expert, turn], G)
        tally.load[layer] += np.bincount(chosen_NK[is_used], minlength=G)[:G]
        tally.visits[layer] += int(is_used.any(axis=1).sum())
        ordered = np.sort(chosen_NK, axis=1)
        is_new = np.ones_like(is_used)
        is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        tally.gpus_reached[layer] += int((is_new & (ordered < G)).sum())
        is_waiting = is_used & (at_N[:, None] < G)
        tally.waiting[layer] += int(is_waiting.sum())
        tally.local[layer] += int((is_waiting & (chosen_NK == at_N[:, None])).sum())
        _add_batches(tally, layer, chosen_NK, G)
        moves = (at_N < G) & is_used[:, 0]
        flat = at_N[moves] * G + chosen_NK[moves, 0]
        tally.traffic[layer] += np.bincount(flat, minlength=G * G).reshape(G, G)
        at_N = chosen_NK[:, 0]  # a token without a first expert waits nowhere


def _add_batches(tally: _Tally, layer: int, chosen_NK: Array, G: int) -> None:
    whole = len(chosen_NK) // BATCH_TOKENS
    rows = chosen_NK[: whole * BATCH_TOKENS] if whole else chosen_NK
    num_batches = max(whole, 1)
    batch = np.repeat(np.arange(num_batches), rows.size // num_batches)
    flat = batch * (G + 1) + rows.ravel()
    load = np.bincount(flat, minlength=num_batches * (G + 1)).reshape(num_batches, G + 1)[:, :G]
    is_busy = load.any(axis=1)
    tally.batch_ratio[layer] += float(
        (load.max(axis=1) / load.mean(axis=1).clip(1e-300))[is_busy].sum()
    )
    tally.batches[layer] += int(is_busy.sum())


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
