"""Lower bounds that no placement can beat, found without any placement.

P items a layer, G GPUs, s = P / G items on each.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse
from scipy.optimize import linear_sum_assignment, linprog

from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.problem import Problem
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
    problem: Problem,
    model: CostModel,
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
    near, far = _hops(problem.topology)
    value = cocluster
    kinds: list[str] = []
    weight = problem.objective.transitions
    transitions = problem.counts.transitions if weight else problem.counts.transitions[:0]
    if len(transitions):
        flows = transitions * (weight / float(transitions.sum()))
        copies = np.stack(
            [np.bincount(row, minlength=model.num_experts) for row in model.expert]
        ).astype(np.float64)
        parts = {model.num_gpus: near}
        if far > near:
            parts[problem.topology.nodes] = far - near
        jobs = [
            _pair_job(flow, copies[layer], copies[layer + 1], num_parts)
            for num_parts in parts
            for layer, flow in enumerate(flows)
        ]
        # Small layers are not worth a process.
        matched = run_jobs(
            jobs, control, num_processes=num_processes if model.num_items > 64 else 1
        )
        pairs = [(flow, copies[i : i + 2], part) for part in parts for i, flow in enumerate(flows)]
        # Here, as the threads of BLAS in every process would wait for each other.
        kept = [
            _least_kept(matching, flow, num_parts, is_single=bool((here_next == 1).all()))
            for matching, (flow, here_next, num_parts) in zip(matched, pairs, strict=True)
        ]
        kinds = [kind for _, kind in kept]
        prices = np.repeat(list(parts.values()), len(flows))
        totals = np.tile(flows.sum(axis=(1, 2)), len(parts))
        most = np.array([amount for amount, _ in kept])
        value += float((prices * np.maximum(totals - most, 0.0)).sum())
    if model.within is not None and not model.is_replicated:
        value += sum(_split_bound(pairs, model.num_gpus) for pairs in model.within)
    if model.unary is not None:
        value += sum(_unary_bound(unary_GP) for unary_GP in model.unary)
    return Bound(value=value, kind=max(sorted(set(kinds)), key=kinds.count) if kinds else "terms")


def most_matched(
    flow: Array, num_parts: int, copies: tuple[Array, Array], *, is_quick: bool = False
) -> float:
    """At least the part of `flow` `[E, E]` that any two balanced partitions keep together.

    With n_i replicas of expert i in the one layer and m_j of j in the next (`copies`), and s slots
    on each part, let y[i, j] count the replicas of i whose part holds j. Each replica shares its
    part with at most s experts, and each of j's with at most s replicas, so

        kept <= max sum flow[i, j] / n_i y[i, j]
        s. t. sum_j y[i, j] <= n_i s,  sum_i y[i, j] <= m_j s,  0 <= y[i, j] <= n_i

    a transportation problem (b-matching where all n and m are 1).
    """
    if num_parts == 1 or not flow.any():
        return float(flow.sum())
    n, m = copies
    share = int(n.sum()) // num_parts
    problem = _Transport(weight=flow / n[:, None], rows=n * share, columns=m * share, most=n)
    is_single = bool((n == 1).all() and (m == 1).all())
    return _b_matching(problem, share, is_quick=is_quick, is_single=is_single)


def _least_kept(
    matching: float, flow: Array, num_parts: int, *, is_single: bool
) -> tuple[float, str]:
    """The smaller of `most_matched` and, without replicas, the spectral bound; and its name.

    y - 1 / G is s times a partial isometry of rank G - 1, orthogonal to the vector of ones, so it
    keeps at most sum / G + s x (the G - 1 largest singular values of the centred flow).
    """
    if num_parts == 1 or not flow.any():
        return matching, "trivial"
    spectral = _spectral(flow, num_parts) if is_single else np.inf
    return (matching, "b-matching") if matching <= spectral else (spectral, "spectral")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Transport:
    """Maximise sum weight y; rows and columns sum to at most `rows`, `columns`; y[i] <= most[i]."""

    weight: Array  # [E, E]
    rows: Array  # [E]
    columns: Array  # [E]
    most: Array  # [E]

    def dual_value(self, row: Array, column: Array) -> float:
        """What no solution can exceed, by weak duality, whatever prices of at least 0 these are."""
        surplus = np.maximum(self.weight - row[:, None] - column[None, :], 0.0)
        priced = float((self.rows * row).sum() + (self.columns * column).sum())
        return priced + float((surplus * self.most[:, None]).sum())


def _hops(topology: Topology) -> tuple[float, float]:
    costs, node = topology.costs, topology.node_of()
    leaves_node = node[:, None] != node[None, :]
    leaves_gpu = ~np.eye(topology.gpus, dtype=bool)
    near = float(costs[leaves_gpu].min()) if leaves_gpu.any() else 0.0
    far = float(costs[leaves_node].min()) if leaves_node.any() else near
    return near, far


def _pair_job(flow: Array, n: Array, m: Array, num_parts: int) -> Job[float]:
    def job(control: Control) -> float:
        return most_matched(flow, num_parts, (n, m), is_quick=control.should_stop())

    return job


def _spectral(flow: Array, num_parts: int) -> float:
    centred = flow - flow.mean(axis=0) - flow.mean(axis=1)[:, None] + flow.mean()
    values = np.linalg.svd(centred, compute_uv=False)[: num_parts - 1]
    # 1e-12: so that rounding in the decomposition cannot make the bound too small
    share = len(flow) / num_parts
    return float(flow.sum() / num_parts + share * values.sum() * (1 + 1e-12))


def _b_matching(problem: _Transport, share: int, *, is_quick: bool, is_single: bool) -> float:
    """The linear programme's dual value; exact up to `_CLOSE_ENOUGH`, and never too small."""
    if share == 1 and is_single:
        rows, columns = linear_sum_assignment(problem.weight, maximize=True)
        return float(problem.weight[rows, columns].sum())
    scale = float(problem.weight.max())
    scaled = replace(problem, weight=problem.weight / scale)
    row, column = _first_duals(scaled.weight, share)
    best = scaled.dual_value(row, column)
    if not is_quick:
        best = min(best, _by_columns(scaled, row, column, share))
    return best * scale


def _first_duals(weight: Array, share: int) -> tuple[Array, Array]:
    """Prices at which each row and column would take `share` others, by damped alternation."""
    size = len(weight)
    place = max(size - share, 0)
    row, column = np.zeros(size), np.zeros(size)
    for _ in range(_DUAL_STEPS):
        wanted = np.partition(weight - column[None, :], place, axis=1)[:, place]
        row = np.maximum(0.5 * (row + wanted), 0.0)
        wanted = np.partition(weight - row[:, None], place, axis=0)[place]
        column = np.maximum(0.5 * (column + wanted), 0.0)
    return row, column


def _by_columns(problem: _Transport, row: Array, column: Array, share: int) -> float:
    """Solve for the pairs that could matter, then add those that its prices would take."""
    weight = problem.weight
    size = len(weight)
    surplus = weight - row[:, None] - column[None, :]
    likely = min(size, share + share // 2 + 4)
    is_there = np.zeros((size, size), np.bool_)
    for axis in (0, 1):
        first = np.argpartition(-surplus, likely - 1, axis=axis)
        first = first[:likely] if axis == 0 else first[:, :likely]
        np.put_along_axis(is_there, first, True, axis=axis)
    best = np.inf
    limits = np.concatenate([problem.rows, problem.columns])
    for _ in range(_MAX_ROUNDS):
        i, j = np.nonzero(is_there)
        entry = np.arange(len(i))
        places = (np.concatenate([i, size + j]), np.concatenate([entry, entry]))
        sums = scipy.sparse.csr_matrix((np.ones(2 * len(i)), places), shape=(2 * size, len(i)))
        bounds = np.stack([np.zeros(len(i)), problem.most[i]], axis=1)
        solved = linprog(-weight[i, j], A_ub=sums, b_ub=limits, bounds=bounds, method="highs-ds")
        if solved.status != 0:
            break
        prices = np.maximum(-solved.ineqlin.marginals, 0.0)
        best = min(best, problem.dual_value(prices[:size], prices[size:]))
        wanted = (weight - prices[:size, None] - prices[None, size:] > 1e-9) & ~is_there
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
