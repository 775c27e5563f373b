"""Lower bounds that no placement can beat, found without any placement.

P items a layer, G GPUs, s = P / G items on each.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from scipy.optimize import linear_sum_assignment, linprog

from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.topology import Topology
from moe_runtime.placement.workers import Control, Job, run_jobs

Array = np.ndarray[Any, Any]

_DUAL_STEPS = 12
_MAX_ROUNDS = 3  # of adding columns to the linear programme
_CLOSE_ENOUGH = 5e-4  # of what stays; a further round costs more than it could show


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A lower bound of the objective, and the kind that gave most layers theirs."""

    value: float
    kind: str


def lower_bound(
    model: CostModel,
    topology: Topology,
    *,
    control: Control,
    num_processes: int,
    cocluster: float = 0.0,
) -> Bound:
    """The sum of bounds of the objective's terms, each over all placements with these replicas.

    The load limit and the price of load are relaxed away, and `cocluster` bounds its term. A hop
    costs at least `near` if it leaves the GPU and at least `far` if it leaves the node, so that
    transitions cost at least near x (GPU crossings) + (far - near) x (node crossings), each bounded
    on its own. Once `control` says stop, the remaining layers get the weaker, quicker bounds.
    """
    near, far = _hops(topology)
    jobs: list[Job[tuple[float, str]]] = []
    for chain in model.chain:
        jobs.append(_pair_job(chain, model.num_gpus))
        if far > near:
            jobs.append(_pair_job(chain, topology.nodes))
    # Cheap layers are not worth a process.
    num_processes = num_processes if model.num_items > 64 else 1
    kept = run_jobs(jobs, control, num_processes=num_processes) if jobs else []
    value = cocluster
    for layer, chain in enumerate(model.chain):
        # With n replicas of an item's expert, the pairs of one token are n: one is enough.
        total = float((chain / model.replicas[layer + 1][None, :]).sum())
        if far > near:
            value += near * max(total - kept[2 * layer][0], 0.0)
            value += (far - near) * max(total - kept[2 * layer + 1][0], 0.0)
        else:
            value += near * max(total - kept[layer][0], 0.0)
    if model.within is not None:
        value += sum(_split_bound(pairs, model.num_gpus) for pairs in model.within)
    if model.unary is not None:
        value += sum(_unary_bound(unary_GP) for unary_GP in model.unary)
    kinds = [kind for _, kind in kept]
    return Bound(value=value, kind=max(sorted(set(kinds)), key=kinds.count) if kinds else "terms")


def most_kept(chain: Array, num_parts: int, *, is_quick: bool = False) -> tuple[float, str]:
    """At least the weight `sum chain[p, q] z[p, q]` that any two balanced partitions keep together.

    z[p, q] says whether p of the one layer and q of the next share a part. It has s ones in each
    row and column, so the best such 0-1 matrix keeps at least as much (b-matching, an integral
    linear programme). And z - 1 / G is s times a partial isometry of rank G - 1, orthogonal to the
    vector of ones, so it keeps at most sum / G + s x (the G - 1 largest singular values of the
    centred chain). The smaller of both.
    """
    share = len(chain) // num_parts
    if num_parts == 1 or not chain.any():
        return float(chain.sum()), "trivial"
    spectral = _spectral(chain, num_parts)
    matching = _b_matching(chain, share, is_quick=is_quick)
    return (matching, "b-matching") if matching <= spectral else (spectral, "spectral")


def dual_value(chain: Array, row: Array, column: Array, share: int) -> float:
    """What no b-matching can exceed, by weak duality, whatever prices `row` and `column` are."""
    surplus = np.maximum(chain - row[:, None] - column[None, :], 0.0).sum()
    return float(share * (row.sum() + column.sum()) + surplus)


def _hops(topology: Topology) -> tuple[float, float]:
    costs, node = topology.costs, topology.node_of()
    leaves_node = node[:, None] != node[None, :]
    leaves_gpu = ~np.eye(topology.gpus, dtype=bool)
    near = float(costs[leaves_gpu].min()) if leaves_gpu.any() else 0.0
    far = float(costs[leaves_node].min()) if leaves_node.any() else near
    return near, far


def _pair_job(chain: Array, num_parts: int) -> Job[tuple[float, str]]:
    def job(control: Control) -> tuple[float, str]:
        return most_kept(chain, num_parts, is_quick=control.should_stop())

    return job


def _spectral(chain: Array, num_parts: int) -> float:
    centred = chain - chain.mean(axis=0) - chain.mean(axis=1)[:, None] + chain.mean()
    values = np.linalg.svd(centred, compute_uv=False)[: num_parts - 1]
    # 1e-12: so that rounding in the decomposition cannot make the bound too small
    share = len(chain) / num_parts
    return float(chain.sum() / num_parts + share * values.sum() * (1 + 1e-12))


def _b_matching(chain: Array, share: int, *, is_quick: bool) -> float:
    """The linear programme's dual value; exact up to `_CLOSE_ENOUGH`, and never too small."""
    if share == 1:
        rows, columns = linear_sum_assignment(chain, maximize=True)
        return float(chain[rows, columns].sum())
    scale = float(chain.max())
    scaled = chain / scale
    row, column = _first_duals(scaled, share)
    best = dual_value(scaled, row, column, share)
    if not is_quick:
        best = min(best, _by_columns(scaled, row, column, share))
    return best * scale


def _first_duals(chain: Array, share: int) -> tuple[Array, Array]:
    """Prices at which each row and column would take `share` others, by damped alternation."""
    size = len(chain)
    row, column = np.zeros(size), np.zeros(size)
    for _ in range(_DUAL_STEPS):
        wanted = np.partition(chain - column[None, :], size - share, axis=1)[:, size - share]
        row = 0.5 * (row + wanted)
        wanted = np.partition(chain - row[:, None], size - share, axis=0)[size - share]
        column = 0.5 * (column + wanted)
    return row, column


def _by_columns(chain: Array, row: Array, column: Array, share: int) -> float:
    """Solve for the pairs that could matter, then add those that its prices would take."""
    size = len(chain)
    surplus = chain - row[:, None] - column[None, :]
    likely = min(size, share + share // 2 + 4)
    is_there = np.zeros((size, size), np.bool_)
    for axis in (0, 1):
        first = np.argpartition(-surplus, likely - 1, axis=axis)
        first = first[:likely] if axis == 0 else first[:, :likely]
        np.put_along_axis(is_there, first, True, axis=axis)
    best = np.inf
    for _ in range(_MAX_ROUNDS):
        p, q = np.nonzero(is_there)
        entry = np.arange(len(p))
        places = (np.concatenate([p, size + q]), np.concatenate([entry, entry]))
        sums = scipy.sparse.csr_matrix((np.ones(2 * len(p)), places), shape=(2 * size, len(p)))
        solved = linprog(
            -chain[p, q], A_eq=sums, b_eq=np.full(2 * size, share), bounds=(0, 1), method="highs-ds"
        )
        if solved.status != 0:
            break
        prices = -solved.eqlin.marginals
        best = min(best, dual_value(chain, prices[:size], prices[size:], share))
        wanted = (chain - prices[:size, None] - prices[None, size:] > 1e-9) & ~is_there
        if best <= -solved.fun * (1 + _CLOSE_ENOUGH) or not wanted.any():
            break
        is_there |= wanted
    return best


def _split_bound(pairs: Array, num_gpus: int) -> float:
    """The weight of pairs within a layer that any balanced partition splits, at least."""
    size = len(pairs)
    share = size // num_gpus
    total = 0.5 * float(pairs.sum())
    nearest = np.sort(pairs, axis=1)[:, size - share + 1 :].sum() if share > 1 else 0.0
    centred = pairs - pairs.mean(axis=0) - pairs.mean(axis=1)[:, None] + pairs.mean()
    values = np.linalg.eigvalsh(centred)[::-1][: num_gpus - 1].sum()
    spectral = pairs.sum() / num_gpus + share * values
    return max(total - 0.5 * min(float(nearest), float(spectral)), 0.0)


def _unary_bound(unary_GP: Array) -> float:
    """The least that the items of a layer pay on their own, P / G on each GPU."""
    share = unary_GP.shape[1] // unary_GP.shape[0]
    costs = np.repeat(unary_GP, share, axis=0)
    rows, columns = linear_sum_assignment(costs)
    return float(costs[rows, columns].sum())
