"""Groups experts together with the token ids that use them, and tabulates who belongs where.

L MoE layers, V token ids, E experts a layer, G groups (one a GPU).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError, TraceError
from moe_runtime.placement_map import Placement
from moe_runtime.trace import Trace
from moe_runtime.trace_file import read_npz

Array = np.ndarray[Any, Any]

_MAX_ALTERNATIONS = 20
_TINY = float(np.finfo(np.float32).tiny)  # for sums that may be 0, in the dtype of counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceTables:
    """What speculative shuffling looks up: the GPU that a token should wait on before a layer.

    Sem-MoE (arXiv 2503.04398) sends a token to `token_group[l, id]` where its confidence is above
    that of `bigram_group[l, a, b]` (a and b: GPUs of its first experts in the two layers before),
    else to the latter. A confidence is the share of recorded activations that were there; ids and
    pairs never seen have 0.
    """

    token_group: Array  # [L, V] int32
    token_confidence: Array  # [L, V] float32
    bigram_group: Array  # [L, G, G] int32; the first two layers hold no pair
    bigram_confidence: Array  # [L, G, G] float32

    @classmethod
    def load(cls, path: str | Path) -> "DeviceTables":
        """From what `placement solve --tables` wrote; raises PlacementError."""
        remedy = "make it again with `moe-runtime placement solve --tables FILE`"
        try:
            found = read_npz(Path(path))
        except TraceError as error:
            raise PlacementError(f"tables: {error}".replace("; ", f"; {remedy}; ", 1)) from error
        names = [field.name for field in fields(cls)]
        if set(found) != set(names):
            raise PlacementError(
                f"tables {path} hold {', '.join(sorted(found))}, not {', '.join(names)}; {remedy}"
            )
        made = cls(**found)
        L, V = made.token_group.shape if made.token_group.ndim == 2 else (0, 0)
        G = made.num_gpus
        shapes = {
            "token_group": (L, V), "token_confidence": (L, V),
            "bigram_group": (L, G, G), "bigram_confidence": (L, G, G),
        }  # fmt: skip
        for name, shape in shapes.items():
            table = found[name]
            if table.shape != shape or not L:
                raise PlacementError(
                    f"tables {path}: {name} is {list(table.shape)}, not {list(shape)}; {remedy}"
                )
            if name.endswith("confidence") and not ((table >= 0) & (table <= 1)).all():
                raise PlacementError(f"tables {path}: {name} is not within 0 and 1; {remedy}")
            if name.endswith("group") and table.size and not 0 <= table.min() <= table.max() < G:
                raise PlacementError(f"tables {path}: {name} names GPUs beyond {G}; {remedy}")
        return made

    @property
    def num_gpus(self) -> int:
        """Of the placement that the tables are for."""
        return int(self.bigram_group.shape[-1])


def group_tokens(counts_VE: Array, gpu_E: Array, num_gpus: int, theta: float) -> Array:
    """`[V]` int32: a group for each token id, for fixed groups of experts.

    Minimise  theta x sum_g |sum_{v in g} a_v - S / G| + (1 - theta) x sum of a token's activations
    outside its group, a_v being the activations of id v and S their sum: ids in the order of their
    activations take the group that adds least, then each moves once more if that helps. theta = 0
    gives every id the group that holds most of its experts.
    """
    mass_VG = np.zeros((len(counts_VE), num_gpus))
    for gpu in range(num_gpus):
        mass_VG[:, gpu] = counts_VE[:, gpu_E == gpu].sum(axis=1)
    if theta == 0:
        most: Array = mass_VG.argmax(axis=1).astype(np.int32)
        return most
    size_V = mass_VG.sum(axis=1)
    mean = size_V.sum() / num_gpus
    group_V = np.full(len(size_V), -1, np.int32)
    total = np.zeros(num_gpus)
    order = [v for v in np.argsort(-size_V, kind="stable") if size_V[v] > 0]
    for _ in range(2):
        for v in order:
            if group_V[v] >= 0:
                total[group_V[v]] -= size_V[v]
            growth = np.abs(total + size_V[v] - mean) - np.abs(total - mean)
            group_V[v] = (theta * growth - (1 - theta) * mass_VG[v]).argmin()
            total[group_V[v]] += size_V[v]
    group_V[group_V < 0] = 0
    return group_V


def cocluster_cost(counts_LVE: Array, group_LV: Array, gpu_LE: Array, num_gpus: int) -> float:
    """The share of activations outside their token's group, mean of the layers."""
    prices = unary_prices(counts_LVE, group_LV, num_gpus)
    every = np.arange(gpu_LE.shape[1])
    return 1.0 + float(sum(prices[layer][gpu, every].sum() for layer, gpu in enumerate(gpu_LE)))


def unary_prices(counts_LVE: Array, group_LV: Array, num_gpus: int) -> Array:
    """`[L, G, E]`: what an expert on a GPU adds to the cost above - minus the activations there."""
    L, _, E = counts_LVE.shape
    prices = np.zeros((L, num_gpus, E))
    for layer, (counts_VE, group_V) in enumerate(zip(counts_LVE, group_LV, strict=True)):
        for gpu in range(num_gpus):
            prices[layer, gpu] = -counts_VE[group_V == gpu].sum(axis=0)
        prices[layer] /= max(float(counts_VE.sum()), 1e-300) * L
    return prices


def cocluster_bound(counts_LVE: Array, num_gpus: int, num_slots: int) -> float:
    """No groups leave less outside: each id can have at most its S / G most used experts inside."""
    share = num_slots // num_gpus
    outside = []
    for counts_VE in counts_LVE:
        E = counts_VE.shape[1]
        best = np.partition(counts_VE, E - share, axis=1)[:, E - share :].sum()
        outside.append(1.0 - float(best) / max(float(counts_VE.sum()), 1e-300))
    return float(np.mean(outside))


def alternate(
    counts_LVE: Array,
    gpu_LE: Array,
    num_gpus: int,
    *,
    theta: float,
    place_experts: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
    """Groups of experts `[L, E]` and of token ids `[L, V]`: each placed given the other, in turns.

    `place_experts(prices, gpu)` improves `gpu` for prices `[L, G, E]`. Ends when the cost does not
    fall; the cost of the two never rises for theta = 0.
    """
    group_LV = _all_groups(counts_LVE, gpu_LE, num_gpus, theta)
    best = cocluster_cost(counts_LVE, group_LV, gpu_LE, num_gpus)
    for _ in range(_MAX_ALTERNATIONS):
        gpu = place_experts(unary_prices(counts_LVE, group_LV, num_gpus), gpu_LE)
        group = _all_groups(counts_LVE, gpu, num_gpus, theta)
        cost = cocluster_cost(counts_LVE, group, gpu, num_gpus)
        if cost >= best - 1e-12:
            break
        best, gpu_LE, group_LV = cost, gpu, group
    return gpu_LE, group_LV


def device_tables(
    placement: Placement, counts_LVE: Array, traces: Sequence[Trace], *, theta: float = 0.0
) -> DeviceTables:
    """The tables of a placement without replicas, from `traces` and token-expert counts."""
    if not 0 <= theta <= 1:
        raise PlacementError(f"theta is {theta}; give 0 (no regard to loads) to 1")
    gpu_LE = placement.gpu_of()
    G = placement.gpus
    group_LV = _all_groups(counts_LVE, gpu_LE, G, theta)
    confidence = np.zeros(group_LV.shape, np.float32)
    for layer, counts_VE in enumerate(counts_LVE):
        inside = (gpu_LE[layer][None, :] == group_LV[layer][:, None]) * counts_VE
        confidence[layer] = inside.sum(axis=1) / np.maximum(counts_VE.sum(axis=1), _TINY)
    seen = _bigrams(gpu_LE, traces, G)
    total = seen.sum(axis=-1)
    return DeviceTables(
        token_group=group_LV,
        token_confidence=confidence,
        bigram_group=seen.argmax(axis=-1).astype(np.int32),
        bigram_confidence=(seen.max(axis=-1) / np.maximum(total, 1)).astype(np.float32),
    )


def _all_groups(counts_LVE: Array, gpu_LE: Array, num_gpus: int, theta: float) -> Array:
    return np.stack(
        [
            group_tokens(counts_VE, gpu_E, num_gpus, theta)
            for counts_VE, gpu_E in zip(counts_LVE, gpu_LE, strict=True)
        ]
    )


def _bigrams(gpu_LE: Array, traces: Sequence[Trace], num_gpus: int) -> Array:
    """`[L, G, G, G]` int64: tokens by the GPUs of first experts two, one and no layers ago."""
    L = len(gpu_LE)
    seen = np.zeros((L, num_gpus**3), np.int64)
    for trace in traces:
        first_NL = trace.topk[:, :, 0].astype(np.int64)
        gpu_NL = np.where(first_NL >= 0, gpu_LE[np.arange(L), first_NL], -1)
        for layer in range(2, L):
            a, b, c = gpu_NL[:, layer - 2], gpu_NL[:, layer - 1], gpu_NL[:, layer]
            known = (a >= 0) & (b >= 0) & (c >= 0)
            flat = (a[known] * num_gpus + b[known]) * num_gpus + c[known]
            seen[layer] += np.bincount(flat, minlength=num_gpus**3)
    return seen.reshape(L, num_gpus, num_gpus, num_gpus)
