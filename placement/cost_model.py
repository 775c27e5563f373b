"""A problem with its replica counts chosen: pairs of items, what they pay, and their loads.

L MoE layers, E experts a layer, P items (slots) a layer, G GPUs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.placement.problem import Problem
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostModel:
    """Items are the replicas of a layer's experts; an assignment `gpu[l, p]` places them.

    Data         chain[l, p, q], within[l, p, q], unary[l, g, p], load[l, p], costs C[g, h]
    Variables    gpu[l, p] in 0 .. G - 1
    Objective    sum chain[l, p, q] C[gpu[l, p], gpu[l + 1, q]]
                 + sum_{p < q} within[l, p, q] [gpu[l, p] != gpu[l, q]]
                 + sum unary[l, gpu[l, p], p] + sum price max(load_g - 1, 0)^2 + offset
    Constraints  P / G items on every GPU, no two of one expert on a GPU, load_g <= balance

    A hop goes to the nearest replica. As a GPU holds at most one replica of an expert, the sum over
    replicas q counts the hops saved exactly where all hops cost the same: with n_p replicas of
    p's expert and n_q of q's, chain = A / n_p, and the offset takes back n_q - 1 of n_q hops. With
    other costs the sum guides the search, and `objective` takes the nearest.
    """

    chain: Array  # [L-1, P, P] float64
    within: Array | None  # [L, P, P] float64, symmetric, 0 on the diagonal
    unary: Array | None  # [L, G, P] float64
    load: Array  # [L, P] float64; the mean GPU of each layer has 1
    expert: Array  # [L, P] int32
    replicas: Array  # [L, P] float64: how many replicas the item's expert has
    costs: Array  # [G, G] float64
    balance: float | None
    price: float
    offset: float
    is_flat: bool
    num_experts: int

    @classmethod
    def of(
        cls, problem: Problem, expert: Array, cocluster_unary: Array | None = None
    ) -> "CostModel":
        """For the items `expert` `[L, P]`; `cocluster_unary` `[L, G, E]` prices their GPUs."""
        counts, objective, topology = problem.counts, problem.objective, problem.topology
        L, E = counts.loads.shape
        expert = np.ascontiguousarray(expert, np.int32)
        replicas = np.stack([np.bincount(row, minlength=E)[row] for row in expert]).astype(float)
        chain, offset = _chain(problem, expert, replicas)
        return cls(
            chain=chain,
            within=_within(problem, expert, replicas) if objective.fanout else None,
            unary=_unary(problem, expert, cocluster_unary),
            load=_loads(counts.loads, expert, replicas, topology.gpus),
            expert=expert,
            replicas=replicas,
            costs=np.array(topology.costs),
            balance=problem.balance,
            price=objective.load / L,
            offset=offset + (objective.cocluster if cocluster_unary is not None else 0.0),
            is_flat=topology.is_flat,
            num_experts=E,
        )

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_items(self) -> int:
        return int(self.load.shape[1])

    @property
    def num_gpus(self) -> int:
        return len(self.costs)

    @property
    def capacity(self) -> int:
        return self.num_items // self.num_gpus

    @property
    def is_replicated(self) -> bool:
        return self.num_items > self.num_experts

    @property
    def has_free_names(self) -> bool:
        """Whether renaming the GPUs of a placement changes nothing."""
        return self.is_flat and self.unary is None

    def paid_beside(self, layer: int, neighbour: int, gpu: Array) -> Array:
        """`[G, P]`: what items of `layer` pay on each GPU for hops from or to `neighbour`'s.

        The neighbour's items are on `gpu` `[P]`.
        """
        if neighbour > layer:
            return paid_for_hops(self.costs, gpu, self.chain[layer].T, is_flat=self.is_flat)
        return paid_for_hops(self.costs.T, gpu, self.chain[neighbour], is_flat=self.is_flat)

    def gpu_loads(self, gpu: Array) -> Array:
        """`[L, G]`, the mean of each layer being 1."""
        loads = np.zeros((self.num_layers, self.num_gpus))
        for layer in range(self.num_layers):
            loads[layer] = np.bincount(gpu[layer], self.load[layer], minlength=self.num_gpus)
        return loads

    def is_within_limit(self, gpu: Array) -> bool:
        """Whether every GPU's load is at most `balance`."""
        return self.balance is None or bool(self.gpu_loads(gpu).max() <= self.balance + 1e-9)

    def objective(self, gpu: Array) -> float:
        """The objective of an assignment, every hop going to the nearest replica."""
        total = self.offset if self.is_flat else self._own_offset()
        for layer in range(self.num_layers - 1):
            here, there = gpu[layer], gpu[layer + 1]
            if self.is_flat or not self.is_replicated:
                hop = self.costs[np.ix_(here, there)]
                total += float(np.einsum("pq,pq->", self.chain[layer], hop))
            else:
                total += self._nearest_cost(layer, here, there)
        for layer in range(self.num_layers):
            here = gpu[layer]
            if self.within is not None:
                apart = here[:, None] != here[None, :]
                total += 0.5 * float((self.within[layer] * apart).sum())
            if self.unary is not None:
                total += float(self.unary[layer][here, np.arange(self.num_items)].sum())
        if self.price:
            over = np.maximum(self.gpu_loads(gpu) - 1.0, 0.0)
            total += self.price * float((over**2).sum())
        return total

    def _own_offset(self) -> float:
        """The part of the offset that does not stand for replicas out of reach."""
        saved = float(self.costs.max()) * sum(
            float((chain * (1.0 - 1.0 / self.replicas[layer + 1])[None, :]).sum())
            for layer, chain in enumerate(self.chain)
        )
        return self.offset + saved

    def _nearest_cost(self, layer: int, here: Array, there: Array) -> float:
        nearest = np.full((self.num_gpus, self.num_experts), np.inf)
        for gpu, expert in zip(there, self.expert[layer + 1], strict=True):
            nearest[:, expert] = np.minimum(nearest[:, expert], self.costs[:, gpu])
        hop = nearest[np.ix_(here, self.expert[layer + 1])]  # each of n replicas of q pays this
        return float((self.chain[layer] / self.replicas[layer + 1][None, :] * hop).sum())


def paid_for_hops(costs: Array, gpu: Array, tokens_QP: Array, *, is_flat: bool) -> Array:
    """`costs[:, gpu] @ tokens_QP`, `[G, P]`; each GPU has equally many of the items of `gpu` `[Q]`.

    Without BLAS: its threads, in every process of a search, would wait for each other (measured,
    two processes on two cores: descents of 58 x 256 items on 64 GPUs took 9.5 s instead of .5).
    """
    order = np.argsort(gpu, kind="stable")
    sums_GP = tokens_QP[order].reshape(len(costs), -1, tokens_QP.shape[1]).sum(axis=1)
    if is_flat:
        paid: Array = costs.max() * (sums_GP.sum(axis=0) - sums_GP)
    else:
        paid = np.einsum("gh,hp->gp", costs, sums_GP)
    return paid


def to_placement(problem: Problem, expert: Array, gpu: Array, made: dict[str, object]) -> Placement:
    """The placement of an assignment; each GPU's slots are in the order of experts."""
    order = np.lexsort((expert, gpu), axis=1)
    counts = problem.counts
    return Placement(
        model=counts.model,
        checkpoint=counts.checkpoint,
        num_experts=counts.num_experts,
        num_hidden_layers=counts.num_hidden_layers,
        layer_ids=counts.layer_ids,
        gpus=problem.gpus,
        nodes=problem.topology.nodes,
        slots=np.take_along_axis(expert, order, axis=1),
        made=made,
    )


def _chain(problem: Problem, expert: Array, replicas: Array) -> tuple[Array, float]:
    transitions = problem.counts.transitions
    weight = problem.objective.transitions
    P = expert.shape[1]
    if not weight or not len(transitions):
        return np.zeros((len(transitions), P, P)), 0.0
    weight /= float(transitions.sum())
    chain = np.empty((len(transitions), P, P))
    offset = 0.0
    for layer, pairs_EE in enumerate(transitions):
        share = weight / replicas[layer][:, None]
        chain[layer] = pairs_EE[np.ix_(expert[layer], expert[layer + 1])] * share
        offset -= float((chain[layer] * (1.0 - 1.0 / replicas[layer + 1])[None, :]).sum())
    return chain, offset * float(problem.topology.costs.max())


def _within(problem: Problem, expert: Array, replicas: Array) -> Array:
    counts = problem.counts
    # A replica is picked at random here: a pair of them carries 1 / (n_p n_q) of the experts' pair.
    tokens = counts.loads.sum(axis=1) / counts.top_k
    weight = problem.objective.fanout * 2.0 / counts.top_k / (tokens * counts.num_layers)
    return np.stack(
        [
            pairs_EE[np.ix_(expert[layer], expert[layer])]
            * (weight[layer] / np.outer(replicas[layer], replicas[layer]))
            for layer, pairs_EE in enumerate(counts.coactivation)
        ]
    )


def _unary(problem: Problem, expert: Array, cocluster_unary: Array | None) -> Array | None:
    L, P = expert.shape
    unary = np.zeros((L, problem.gpus, P))
    if cocluster_unary is not None:
        for layer in range(L):
            unary[layer] += problem.objective.cocluster * cocluster_unary[layer][:, expert[layer]]
    if problem.previous is not None and problem.move_cost:
        hosts = problem.previous.hosts()
        price = problem.move_cost / max(L - 1, 1)
        for layer in range(L):
            unary[layer] += price * ~hosts[layer][:, expert[layer]]
    return unary if unary.any() else None


def _loads(loads_LE: Array, expert: Array, replicas: Array, gpus: int) -> Array:
    shares = np.take_along_axis(loads_LE, expert.astype(np.int64), axis=1) / replicas
    relative: Array = shares * gpus / loads_LE.sum(axis=1, keepdims=True)
    return relative
