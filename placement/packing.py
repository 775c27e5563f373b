"""Holds each expert of one layer on GPUs so that the busiest has as little load as possible.

E experts, G GPUs, `holds` `[G, E]` bool: who has a replica of what; a load splits evenly.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_SQUARINGS = 4  # a sum of 16th powers stands for the greatest load, and sees ties
_LEAST_GAIN = 1e-12  # of it: less may be rounding
_KICK_EFFORT = 1500  # kicks x slots
_MOST_KICKS, _FEWEST_KICKS = 60, 4
_PATIENCE = 10  # times as many kicks while the load is above what must be reached


def gpu_loads(load_E: Array, holds: Array) -> Array:
    """`[G]`: what each GPU has, an expert's load being split evenly over its replicas."""
    loads: Array = holds @ (load_E / holds.sum(axis=0))
    return loads


def first_packing(load_E: Array, count_E: Array, num_gpus: int) -> Array:
    """`holds` with `count_E` replicas: heaviest first, onto the least loaded GPU with room."""
    capacity = int(count_E.sum()) // num_gpus
    share_E = load_E / count_E
    holds = np.zeros((num_gpus, len(load_E)), np.bool_)
    total = np.zeros(num_gpus)
    room = np.full(num_gpus, capacity)
    for expert in np.repeat(*_heaviest_first(share_E, count_E)):
        free = (room > 0) & ~holds[:, expert]
        if not free.any():
            source, target, other = _make_room(holds, room, int(expert))
            holds[source, other], holds[target, other] = False, True
            total[source] -= share_E[other]
            total[target] += share_E[other]
            room[source] += 1
            room[target] -= 1
            free = (room > 0) & ~holds[:, expert]
        gpu = int(np.where(free, total, np.inf).argmin())
        holds[gpu, expert] = True
        total[gpu] += share_E[expert]
        room[gpu] -= 1
    return holds


def least_load(load_E: Array, num_slots: int, num_gpus: int) -> float:
    """What the busiest GPU of any packing has at least.

    The mean; and, of all levels x, the least at which slots suffice: beside a replica of e a GPU
    has capacity - 1 others, each with no less than its load over the most replicas it can have, so
    e needs load[e] / (x - the lightest of those) replicas.
    """
    capacity, spare = num_slots // num_gpus, num_slots - len(load_E)
    floors = np.sort(load_E / min(num_gpus, 1 + spare))
    beside = float(floors[: capacity - 1].sum())
    low, high = float(load_E.sum() / num_gpus), float(load_E.max() + beside)
    if low >= high:
        return low
    for _ in range(60):
        level = (low + high) / 2
        room = level - beside
        fits = room > 0 and np.maximum(np.ceil(load_E / room), 1).sum() <= num_slots
        low, high = (low, level) if fits else (level, high)
    return low


def improve(
    load_E: Array, starts: list[Array], *, goal: float, known: float = np.inf, seed: int = 0
) -> Array:
    """The best of `starts` after swaps, and exchanges of one expert's replica for another's.

    Each descends to a local optimum; the best is then shaken again and again, and kept where that
    does not make it worse, until the busiest has at most the load `goal`; with more patience while
    it has more than `known`, which some other packing is known to reach, and then from the other
    optima in turn, whose counts of replicas may be the better ones. Never worse than a start.
    """
    rng = np.random.default_rng(seed)

    def busiest(holds: Array) -> float:
        return float(gpu_loads(load_E, holds).max())

    best, least = starts[0], busiest(starts[0])
    optima = []
    for start in starts:
        optima.append(_descend(load_E, start, goal))
        for holds in (start, optima[-1]):
            if busiest(holds) < least:
                best, least = holds, busiest(holds)
        if least <= goal:
            return best
    current, level = best, least
    kicks = int(np.clip(_KICK_EFFORT // best.sum(), _FEWEST_KICKS, _MOST_KICKS))
    can_move = 1 < best[0].sum() < best.shape[1]
    for kick in range(kicks * _PATIENCE if can_move else 0):
        if least <= goal or (kick >= kicks and least <= known):
            break
        if kick and kick % kicks == 0:
            current = optima[kick // kicks % len(optima)]
            level = busiest(current)
        trial = _descend(load_E, _kicked(current, rng), goal)
        load = busiest(trial)
        if load <= level * 1.02:
            current, level = trial, min(load, level)
        if load < least:
            best, least = trial, load
    return best


def _heaviest_first(share_E: Array, count_E: Array) -> tuple[Array, Array]:
    order = np.argsort(-share_E, kind="stable")
    return order, count_E[order]


def _make_room(holds: Array, room: Array, expert: int) -> tuple[int, int, int]:
    """(source, target, other): moving `other` gives a GPU without `expert` room for it.

    One exists: the GPUs with room all hold `expert`, so some full GPU does not; it has more
    experts than a GPU with room, so one of them is not there.
    """
    target = int(np.flatnonzero(room > 0)[0])
    for source in np.flatnonzero((room == 0) & ~holds[:, expert]):
        movable = np.flatnonzero(holds[source] & ~holds[target])
        if movable.size:
            return int(source), target, int(movable[-1])
    raise AssertionError(f"expert {expert} has more replicas than there are GPUs")


def _descend(load_E: Array, holds: Array, goal: float) -> Array:
    """The best move that unloads the busiest GPU, while one makes the loads more even."""
    holds = holds.copy()
    mean = load_E.sum() / len(holds)
    while True:
        count_E = holds.sum(axis=0)
        loads = holds @ (load_E / count_E) / mean
        busiest = int(loads.argmax())
        if loads[busiest] * mean <= goal:
            return holds
        moves, after = _swaps(load_E / count_E / mean, holds, loads, busiest)
        if count_E.max() > 1:
            more_moves, more_after = _exchanges(load_E / mean, holds, count_E, loads, busiest)
            moves, after = np.concatenate([moves, more_moves]), np.concatenate([after, more_after])
        if not len(moves):
            return holds
        uneven = _unevenness(after)
        chosen = int(uneven.argmin())
        if uneven[chosen] >= _unevenness(loads) * (1 - _LEAST_GAIN):
            return holds
        gpu, loses, other, gains = (int(i) for i in moves[chosen])
        holds[gpu, loses], holds[gpu, gains] = False, True
        if other >= 0:
            holds[other, gains], holds[other, loses] = False, True


def _unevenness(loads: Array) -> Array:
    """Sum over the last axis of high powers of loads whose mean is 1."""
    for _ in range(_SQUARINGS):
        loads = loads * loads
    total: Array = loads.sum(axis=-1)
    return total


def _swaps(share_E: Array, holds: Array, loads: Array, busiest: int) -> tuple[Array, Array]:
    """Moves (busiest, e, g, f), e for f of another GPU, and the loads `[moves, G]` after each."""
    mine = np.flatnonzero(holds[busiest])
    g, f = np.nonzero(holds & ~holds[busiest][None, :])
    e, pair = (index.ravel() for index in np.meshgrid(mine, np.arange(len(g)), indexing="ij"))
    allowed = ~holds[g[pair], e] & (share_E[e] > share_E[f[pair]])
    e, g, f = e[allowed], g[pair][allowed], f[pair][allowed]
    moved = share_E[e] - share_E[f]
    after = np.repeat(loads[None], len(e), axis=0)
    row = np.arange(len(e))
    after[row, busiest] -= moved
    after[row, g] += moved
    return np.stack([np.full(len(e), busiest), e, g, f], axis=1), after


def _exchanges(
    load_E: Array, holds: Array, count_E: Array, loads: Array, busiest: int
) -> tuple[Array, Array]:
    """Moves (g, x, -1, y): GPU g gives up its replica of x, one of several, for one of y.

    Such as unload the busiest GPU: y is on it, or g is it.
    """
    found = []
    g, x = np.nonzero(holds & (count_E > 1)[None, :])
    for y in np.flatnonzero(holds[busiest] & (count_E < len(holds))):
        fits = ~holds[g, y]
        found.append(np.stack([g[fits], x[fits], np.full(int(fits.sum()), y)], axis=1))
    absent = np.flatnonzero(~holds[busiest])
    for given in np.flatnonzero(holds[busiest] & (count_E > 1)):
        found.append(
            np.stack([np.full(len(absent), busiest), np.full(len(absent), given), absent], axis=1)
        )
    if not found:
        return np.zeros((0, 4), np.int64), np.zeros((0, len(holds)))
    gpu, x, y = np.concatenate(found).T
    fewer, more = load_E[x] / (count_E[x] - 1), load_E[y] / (count_E[y] + 1)
    after = loads[None, :] + holds[:, x].T * (fewer - load_E[x] / count_E[x])[:, None]
    after += holds[:, y].T * (more - load_E[y] / count_E[y])[:, None]
    after[np.arange(len(gpu)), gpu] += more - fewer
    return np.stack([gpu, x, np.full(len(gpu), -1), y], axis=1), after


def _kicked(holds: Array, rng: np.random.Generator) -> Array:
    """Some random swaps, and exchanges where there are replicas, later."""
    holds = holds.copy()
    for _ in range(int(rng.integers(1, 5))):
        a, b = rng.choice(len(holds), 2, replace=False)
        spare = np.flatnonzero(holds[a] & (holds.sum(axis=0) > 1))
        absent = np.flatnonzero(~holds[a])
        if spare.size and rng.random() < 0.5:
            holds[a, rng.choice(spare)] = False
            holds[a, rng.choice(absent)] = True
            continue
        only_a, only_b = np.flatnonzero(holds[a] & ~holds[b]), np.flatnonzero(holds[b] & ~holds[a])
        if only_a.size and only_b.size:
            e, f = rng.choice(only_a), rng.choice(only_b)
            holds[a, e] = holds[b, f] = False
            holds[b, e] = holds[a, f] = True
    return holds
