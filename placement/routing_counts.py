"""Counts of a routing: what flows between layers, what each expert gets, what is used together.

N tokens, L MoE layers, K experts a token, E experts a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.trace import Trace

Array = np.ndarray[Any, Any]

_CHUNK_TOKENS = 65536  # bounds the memory of indices while counting
# Below this many tokens for each expert, counts say more about the sample than about the model
# (measured: 36 tokens an expert gave .34 crossings on the sample and .47 on others).
TOKENS_PER_EXPERT = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingCounts:
    """Weighted counts over all tokens of some traces; a missing id (-1) counts nowhere."""

    model: str
    num_experts: int
    num_hidden_layers: int
    layer_ids: tuple[int, ...]
    top_k: int
    num_tokens: int  # rows, unweighted
    transitions: Array  # [L-1, E, E] float64: the first expert of a layer to that of the next
    pair_transitions: Array  # [L-1, E, E] float64: any expert of a layer to any of the next
    loads: Array  # [L, E] float64: all K experts
    coactivation: Array  # [L, E, E] float64, symmetric, 0 on the diagonal: tokens that use both
    checkpoint: str = ""  # digest of the model's weights; "" unknown

    @classmethod
    def of(
        cls, traces: Sequence[Trace], *, domain_weights: Mapping[str, float] | None = None
    ) -> "RoutingCounts":
        """Sums over `traces` of one model; a token counts as its domain's weight says, else once.

        Raises PlacementError for traces of different models, unknown domains, impossible weights
        and layers that no token reaches.
        """
        _check_same_model(traces)
        weights = [_token_weights(trace, domain_weights or {}) for trace in traces]
        _check_domains(traces, domain_weights or {})
        first = traces[0]
        L, E = first.num_layers, first.num_experts
        transitions = np.zeros((L - 1, E, E))
        pair_transitions = np.zeros((L - 1, E, E))
        loads = np.zeros((L, E))
        coactivation = np.zeros((L, E, E))
        for trace, weight_N in zip(traces, weights, strict=True):
            for start in range(0, trace.num_tokens, _CHUNK_TOKENS):
                rows = slice(start, start + _CHUNK_TOKENS)
                topk_nLK = trace.topk[rows].astype(np.int64)
                weight_n = weight_N[rows]
                for layer in range(L):
                    here_nK = topk_nLK[:, layer]
                    one_hot_nE = _one_hot(here_nK, E)
                    loads[layer] += weight_n @ one_hot_nE
                    coactivation[layer] += (one_hot_nE * weight_n[:, None]).T @ one_hot_nE
                    if layer + 1 < L:
                        next_nE = _one_hot(topk_nLK[:, layer + 1], E)
                        pair_transitions[layer] += (one_hot_nE * weight_n[:, None]).T @ next_nE
                        transitions[layer] += _count_pairs(
                            here_nK[:, 0], topk_nLK[:, layer + 1, 0], weight_n, E
                        )
        diagonal = np.arange(E)
        coactivation[:, diagonal, diagonal] = 0.0
        counts = cls(
            model=first.model,
            num_experts=E,
            num_hidden_layers=first.num_hidden_layers,
            layer_ids=first.layer_ids,
            top_k=max(trace.top_k for trace in traces),
            num_tokens=sum(trace.num_tokens for trace in traces),
            transitions=transitions,
            pair_transitions=pair_transitions,
            loads=loads,
            coactivation=coactivation,
            checkpoint=next((t.checkpoint for t in traces if t.checkpoint), ""),
        )
        counts.check_layers()
        return counts

    @property
    def num_layers(self) -> int:
        return int(self.loads.shape[0])

    @property
    def is_scant(self) -> bool:
        """Whether there are too few tokens for the counts to hold on others."""
        return self.num_tokens < TOKENS_PER_EXPERT * self.num_experts

    def check_layers(self) -> None:
        """Raise PlacementError for a layer without a single routed token."""
        for layer, load_E in enumerate(self.loads):
            if not load_E.sum() > 0:
                raise PlacementError(
                    f"layer {self.layer_ids[layer]} (row {layer}) has no routed token in the "
                    "traces, so nothing says where its experts belong; record it, or leave the "
                    "layer out of the trace"
                )


def _check_same_model(traces: Sequence[Trace]) -> None:
    if not traces:
        raise PlacementError("no trace was given; a placement needs at least one")
    first = traces[0]
    for trace in traces[1:]:
        for name in ("model", "num_experts", "num_hidden_layers", "layer_ids"):
            mine, other = getattr(first, name), getattr(trace, name)
            if mine != other:
                raise PlacementError(
                    f"the traces are of different models: {name} is {_short(mine)} and "
                    f"{_short(other)}; solve for each model on its own"
                )
    digests = sorted({trace.checkpoint for trace in traces} - {""})
    if len(digests) > 1:
        raise PlacementError(
            f"the traces are of {len(digests)} checkpoints with the same name, {first.model}: "
            f"{', '.join(digests)}; solve for each on its own"
        )


def _short(value: object) -> str:
    return f"{value!r:.60}"


def _check_domains(traces: Sequence[Trace], domain_weights: Mapping[str, float]) -> None:
    known = {str(name) for t in traces if t.domain is not None for name in np.unique(t.domain)}
    for name, weight in domain_weights.items():
        if name not in known:
            there = ", ".join(sorted(filter(None, known))) or "none"
            raise PlacementError(
                f"the traces have no domain {name!r} to give a weight to; they have {there}"
            )
        if not 0 <= weight < np.inf:
            raise PlacementError(f"the weight of domain {name!r} is {weight}; give 0 or more")


def _token_weights(trace: Trace, domain_weights: Mapping[str, float]) -> Array:
    """`[N]` float64."""
    weights = np.ones(trace.num_tokens)
    if trace.domain is not None:
        for name, weight in domain_weights.items():
            weights[trace.domain == name] = weight
    return weights


def _one_hot(ids_nK: Array, num_experts: int) -> Array:
    """`[n, E]` float64: 1 where a token uses an expert; -1 falls into a column that is cut off."""
    found = np.zeros((len(ids_nK), num_experts + 1))
    np.put_along_axis(found, ids_nK, 1.0, axis=1)
    return found[:, :num_experts]


def _count_pairs(here_n: Array, next_n: Array, weight_n: Array, num_experts: int) -> Array:
    """`[E, E]` float64: the weight of the tokens that go from an expert to an expert."""
    known = (here_n >= 0) & (next_n >= 0)
    flat = here_n[known] * num_experts + next_n[known]
    counted = np.bincount(flat, weights=weight_n[known], minlength=num_experts**2)
    return counted.reshape(num_experts, num_experts)
