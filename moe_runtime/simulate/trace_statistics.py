"""What a routing trace says of its model: load, reuse, and how much a layer tells of the next.

N tokens, L MoE layers, K experts a token, E experts a layer, S steps.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

_PERMUTATION_SEED = 0
_CHUNK_STEPS = 2048  # keeps the tables of a chunk in the processor's caches


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """One MoE layer. Load and information leave padding out; reuse does not, as a cache would not.

    `max_load` is the busiest expert's share of tokens over the mean of all E experts;
    `load_entropy` the entropy of those shares over log E, 1 when balanced.

    A reuse is a step that uses an expert which an earlier step used, whatever the sequence. Its
    distance is counted in steps (1: the step before) and in other experts of the layer that the
    steps strictly between use: the LRU stack distance of Mattson, Gecsei, Slutz and Traiger
    (Evaluation techniques for storage hierarchies, IBM Systems Journal, 1970), a step's experts
    being one reference. None if nothing is used twice.

    `next_layer_bits` is the mutual information between the first expert of a token here and in the
    next layer, plugged in from counts, which overestimates it; `permuted_bits` is the same after
    the next layer's tokens were permuted, so all of it is that bias. None for the last layer.
    """

    layer: int
    layer_id: int
    num_used_experts: int
    max_load: float
    load_entropy: float
    median_reuse_steps: float | None
    median_reuse_experts: float | None
    next_layer_bits: float | None
    permuted_bits: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStatistics:
    """A whole trace; `phases` counts rows by name, `domains` rows by label if there are any."""

    model: str
    num_tokens: int
    num_sequences: int
    num_steps: int
    num_layers: int
    num_hidden_layers: int
    num_experts: int
    top_k: int
    num_missing: int
    phases: Mapping[str, int]
    domains: Mapping[str, int]
    fields: tuple[str, ...]
    layers: tuple[LayerStatistics, ...]

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)


def trace_statistics(trace: Trace) -> TraceStatistics:
    """Count everything; time and memory grow with N*L*(K + E)."""
    phases = np.bincount(trace.phase, minlength=len(Phase))
    domains = Counter(trace.domain.tolist()) if trace.domain is not None else Counter()
    domains.pop("", None)
    return TraceStatistics(
        model=trace.model,
        num_tokens=trace.num_tokens,
        num_sequences=len(np.unique(trace.sequence_id)),
        num_steps=trace.num_steps,
        num_layers=trace.num_layers,
        num_hidden_layers=trace.num_hidden_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        num_missing=int(np.count_nonzero(trace.topk < 0)),
        phases={phase.name.lower(): int(phases[phase]) for phase in Phase},
        domains=dict(domains),
        fields=tuple(trace.arrays()),
        layers=tuple(_layer(trace, layer) for layer in range(trace.num_layers)),
    )


def _layer(trace: Trace, layer: int) -> LayerStatistics:
    is_text = trace.phase != Phase.PADDING
    chosen = trace.topk[is_text, layer]
    load = np.bincount(chosen[chosen >= 0], minlength=trace.num_experts)
    steps, experts = reuse_distances(trace, layer)
    bits, permuted_bits = None, None
    if layer + 1 < trace.num_layers:
        here, there = chosen[:, 0], trace.topk[is_text, layer + 1, 0]
        bits = mutual_information_bits(here, there, trace.num_experts)
        permuted = np.random.default_rng(_PERMUTATION_SEED).permutation(there)
        permuted_bits = mutual_information_bits(here, permuted, trace.num_experts)
    return LayerStatistics(
        layer=layer,
        layer_id=trace.layer_ids[layer],
        num_used_experts=int(np.count_nonzero(load)),
        max_load=float(load.max() / load.mean()) if load.any() else 0.0,
        load_entropy=_entropy_bits(load) / float(np.log2(trace.num_experts)),
        median_reuse_steps=float(np.median(steps)) if len(steps) else None,
        median_reuse_experts=float(np.median(experts)) if len(experts) else None,
        next_layer_bits=bits,
        permuted_bits=permuted_bits,
    )


def reuse_distances(trace: Trace, layer: int) -> tuple[Array, Array]:
    """Every reuse of an expert of `layer`: its distance in steps, and in other experts."""
    step = np.cumsum(np.diff(trace.step, prepend=trace.step[:1]) != 0)
    num_experts = trace.num_experts
    is_used = np.zeros((int(step[-1]) + 1, num_experts), np.bool_)  # [S, E]
    chosen = trace.topk[:, layer]
    rows, ranks = np.nonzero(chosen >= 0)
    is_used[step[rows], chosen[rows, ranks]] = True
    last = np.full(num_experts, -1, np.int32)  # last step before the chunk that used each expert
    in_steps, in_experts = [], []
    for start in range(0, len(is_used), _CHUNK_STEPS):
        chunk = is_used[start : start + _CHUNK_STEPS]
        numbers = np.arange(start, start + len(chunk), dtype=np.int32)
        used_at = np.where(chunk, numbers[:, None], np.int32(-1))
        up_to = np.maximum.accumulate(np.vstack([last, used_at]), axis=0)
        before, last = up_to[:-1], up_to[-1]  # [s, E]: strictly before each step
        at, expert = np.nonzero(chunk & (before >= 0))
        previous = before[at, expert]
        in_steps.append(numbers[at] - previous)
        in_experts.append(np.count_nonzero(before[at] > previous[:, None], axis=1))
    return np.concatenate(in_steps), np.concatenate(in_experts)


def mutual_information_bits(here: Array, there: Array, num_experts: int) -> float:
    """Of two columns of expert ids, from their joint counts; rows with a missing id are left out.

    I = sum over (a, b) of p(a, b) log2(p(a, b) / (p(a) p(b))).
    """
    is_whole = (here >= 0) & (there >= 0)
    pairs = here[is_whole].astype(np.int64) * num_experts + there[is_whole]
    joint = np.bincount(pairs, minlength=num_experts**2).reshape(num_experts, num_experts)
    bits = _entropy_bits(joint.sum(1)) + _entropy_bits(joint.sum(0)) - _entropy_bits(joint)
    return max(bits, 0.0)  # rounding may leave -1e-16


def _entropy_bits(counts: Array) -> float:
    counts = counts[counts > 0]
    shares = counts / max(counts.sum(), 1)
    return float(-(shares * np.log2(shares)).sum())
