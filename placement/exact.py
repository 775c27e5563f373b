"""The optimum by a dynamic programme over all partitions of a layer's experts, for few experts.

E experts a layer, c = E / G on each of G GPUs, S states of a layer.
"""

from itertools import combinations
from math import factorial
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.result import StoppedBy
from moe_runtime.placement.workers import Control

Array = np.ndarray[Any, Any]

_MAX_STATES = 41_000  # of a layer; 8 experts on 8 GPUs have 40,320
_MAX_STEPS = 4e9  # pairs of states, over all layers: some seconds each 1e9
_CHUNK_PAIRS = 4_000_000  # bounds the memory of one step


def num_steps(model: CostModel) -> float:
    """Pairs of states that the programme looks at; inf where it does not apply."""
    if model.is_replicated:
        return float("inf")
    states = factorial(model.num_items) // factorial(model.capacity) ** model.num_gpus
    if states > _MAX_STATES:
        return float("inf")
    names = factorial(model.num_gpus) if model.has_free_names else 1
    return float(states / names * states * model.num_layers)


def is_small_enough(model: CostModel) -> bool:
    return num_steps(model) <= _MAX_STEPS


def solve_exactly(model: CostModel, control: Control) -> tuple[Array, StoppedBy] | None:
    """`[L, E]` int32, optimal; None if told to stop before the end.

    Data         the model's chain, within, unary, load and costs
    Variables    state[l]: one of the E! / (c!)^G ways to put a layer's experts on the GPUs
    Objective    sum_l own(state[l]) + between(state[l], state[l + 1])
    Constraints  load on each GPU of a state <= balance

    value[l + 1][t] = own(t) + min over s of value[l][s] + between(s, t). Where GPUs can change
    names, value[l] is the same for all names of one partition, so s runs over partitions only (35
    for 8 experts on 2 GPUs, 105 on 4), and t over states.
    """
    states = _states(model.num_items, model.num_gpus)
    first_of, class_of = _classes(states, model.num_gpus, model.has_free_names)
    one_hot = _one_hot(states, model.num_gpus)
    own = [_own_costs(model, layer, states, one_hot) for layer in range(model.num_layers)]
    _check_feasible(model, states, own)
    value = own[0][first_of]
    steps: list[tuple[Array, Array]] = []
    for layer, chain in enumerate(model.chain):
        if control.should_stop():
            return None
        through, origin = _step(value, chain, model.costs, one_hot, first_of)
        through += own[layer + 1]
        # The best state of each class, and the class that it came from.
        order = np.lexsort((through, class_of))
        _, best = np.unique(class_of[order], return_index=True)
        target = order[best]
        steps.append((origin[target], target))
        value = through[target]
        control.advance()
    return _trace_back(states, first_of, steps, int(value.argmin()), model), StoppedBy.PROOF


def _states(num_items: int, num_gpus: int) -> Array:
    """`[S, E]` int32: every way to put `num_items` on GPUs, equally many each."""
    capacity = num_items // num_gpus
    found = [np.full(num_items, -1, np.int32)]
    for gpu in range(num_gpus):
        grown = []
        for state in found:
            free = np.flatnonzero(state < 0)
            for chosen in combinations(free.tolist(), capacity):
                following = state.copy()
                following[list(chosen)] = gpu
                grown.append(following)
        found = grown
    return np.stack(found)


def _classes(states: Array, num_gpus: int, has_free_names: bool) -> tuple[Array, Array]:
    """The state that stands for each class `[C]`, and the class of each state `[S]`."""
    if not has_free_names:
        every = np.arange(len(states))
        return every, every
    named = np.stack([_in_order(state, num_gpus)[state] for state in states])
    _, first, class_of = np.unique(named, axis=0, return_index=True, return_inverse=True)
    is_own = (named == states).all(axis=1)
    stands = np.empty(len(first), np.int64)
    stands[class_of[is_own]] = np.flatnonzero(is_own)
    return stands, class_of.reshape(-1)


def _in_order(state: Array, num_gpus: int) -> Array:
    """`[G]`: new names, in the order in which the state first uses the GPUs."""
    _, first = np.unique(state, return_index=True)
    names = np.empty(num_gpus, np.int32)
    names[np.argsort(first)] = np.arange(num_gpus)
    return names


def _one_hot(states: Array, num_gpus: int) -> Array:
    """`[S, E x G]` float64."""
    found = states[:, :, None] == np.arange(num_gpus)[None, None, :]
    flat: Array = found.reshape(len(states), -1).astype(np.float64)
    return flat


def _own_costs(model: CostModel, layer: int, states: Array, one_hot: Array) -> Array:
    """`[S]`: what a layer pays by itself; inf above the load limit."""
    G = model.num_gpus
    cost = np.zeros(len(states))
    loads = np.stack([((states == gpu) * model.load[layer]).sum(axis=1) for gpu in range(G)])
    if model.price:
        cost += model.price * (np.maximum(loads - 1.0, 0.0) ** 2).sum(axis=0)
    if model.within is not None:
        together = np.kron(model.within[layer], np.eye(G))
        kept = np.einsum("sa,sa->s", one_hot @ together, one_hot)
        cost += 0.5 * (model.within[layer].sum() - kept)
    if model.unary is not None:
        cost += one_hot @ model.unary[layer].T.ravel()
    if model.balance is not None:
        cost[loads.max(axis=0) > model.balance + 1e-9] = np.inf
    return cost


def _check_feasible(model: CostModel, states: Array, own: list[Array]) -> None:
    if model.balance is None or all(np.isfinite(cost).any() for cost in own):
        return
    smallest = max(
        np.stack([((states == g) * load).sum(axis=1) for g in range(model.num_gpus)])
        .max(axis=0)
        .min()
        for load in model.load
    )
    raise PlacementError(
        f"no placement keeps every GPU within {model.balance:g} of the mean load; the smallest "
        f"feasible limit is {np.ceil(smallest * 1e4) / 1e4:g}; raise --balance to that, or add "
        "--replicas"
    )


def _step(
    value: Array, chain: Array, costs: Array, one_hot: Array, first_of: Array
) -> tuple[Array, Array]:
    """The least cost of reaching each state `[S]`, and the class that it comes from `[S]`."""
    between = np.kron(chain, costs)  # [E x G, E x G]
    best = np.full(len(one_hot), np.inf)
    origin = np.zeros(len(one_hot), np.int64)
    chunk = max(_CHUNK_PAIRS // len(one_hot), 1)
    for start in range(0, len(first_of), chunk):
        rows = slice(start, start + chunk)
        cost = (one_hot[first_of[rows]] @ between) @ one_hot.T
        cost += value[rows, None]
        winner = cost.argmin(axis=0)
        least = cost[winner, np.arange(len(one_hot))]
        is_better = least < best
        best[is_better] = least[is_better]
        origin[is_better] = start + winner[is_better]
    return best, origin


def _trace_back(
    states: Array, first_of: Array, steps: list[tuple[Array, Array]], last: int, model: CostModel
) -> Array:
    chosen = [last]
    for origin, _ in reversed(steps):
        chosen.append(int(origin[chosen[-1]]))
    chosen.reverse()
    gpu = np.empty((model.num_layers, model.num_items), np.int32)
    gpu[0] = states[first_of[chosen[0]]]
    names = np.arange(model.num_gpus, dtype=np.int32)
    for layer, (_, target) in enumerate(steps):
        reached = states[target[chosen[layer + 1]]]
        gpu[layer + 1] = names[reached]
        # The next step starts from the state that stands for this one's class.
        stands = states[first_of[chosen[layer + 1]]]
        renamed = np.empty_like(names)
        renamed[stands] = gpu[layer + 1]
        names = renamed
    return gpu
