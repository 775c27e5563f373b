"""Packs the items of one layer onto GPUs so that the busiest has as little load as possible.

P items, G GPUs, E experts.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_LEAST_GAIN = 1e-9  # of the busiest load: less is rounding, and would never end


def pack(load: Array, expert: Array, num_gpus: int, *, gpu: Array | None = None) -> Array:
    """`[P]` int32: the GPU of each item, P / G items each, no two of one expert on a GPU.

    `load` `[P]`, `expert` `[P]` (at most G items of one). Heaviest first onto the least loaded GPU
    that has room and not this expert (Graham's rule with equal numbers, as EPLB packs), then swaps
    of the busiest GPU with the others while its load falls. `gpu` is a packing to start from
    instead.
    """
    if gpu is None:
        gpu = _heaviest_first(load, expert, num_gpus)
    return _swap_down(load, expert, num_gpus, gpu.astype(np.int32))


def _heaviest_first(load: Array, expert: Array, num_gpus: int) -> Array:
    capacity = len(load) // num_gpus
    gpu = np.full(len(load), -1, np.int32)
    total = np.zeros(num_gpus)
    room = np.full(num_gpus, capacity)
    holds = np.zeros((num_gpus, int(expert.max()) + 1), np.bool_)
    for item in np.argsort(-load, kind="stable"):
        free = (room > 0) & ~holds[:, expert[item]]
        if not free.any():
            item_there = _make_room(gpu, expert, room, holds, int(item))
            total -= np.bincount([gpu[item_there]], [load[item_there]], minlength=num_gpus)
            target = int(np.flatnonzero((room > 0) & ~holds[:, expert[item_there]])[0])
            source = int(gpu[item_there])
            holds[source, expert[item_there]] = False
            room[source] += 1
            _put(gpu, expert, room, holds, item_there, target)
            total[target] += load[item_there]
            free = (room > 0) & ~holds[:, expert[item]]
        target = int(np.where(free, total, np.inf).argmin())
        _put(gpu, expert, room, holds, int(item), target)
        total[target] += load[item]
    return gpu


def _put(gpu: Array, expert: Array, room: Array, holds: Array, item: int, target: int) -> None:
    gpu[item] = target
    room[target] -= 1
    holds[target, expert[item]] = True


def _make_room(gpu: Array, expert: Array, room: Array, holds: Array, item: int) -> int:
    """An item to move to a GPU with room, off a full GPU that does not hold `item`'s expert.

    One exists: the GPUs with room all hold `item`'s expert, so some full GPU does not; it has P / G
    different experts, and a GPU with room fewer, so one of them is not there.
    """
    full = np.flatnonzero((room == 0) & ~holds[:, expert[item]])
    target = int(np.flatnonzero(room > 0)[0])
    for there in full:
        movable = np.flatnonzero((gpu == there) & ~holds[target, expert])
        if movable.size:
            return int(movable[-1])
    raise AssertionError(f"expert {expert[item]} has more items than there are GPUs")


def _swap_down(load: Array, expert: Array, num_gpus: int, gpu: Array) -> Array:
    """Swap an item of the busiest GPU for a lighter one elsewhere while the worse of two falls."""
    total = np.bincount(gpu, load, minlength=num_gpus).astype(np.float64)
    holds = np.zeros((num_gpus, int(expert.max()) + 1), np.bool_)
    holds[gpu, expert] = True
    while True:
        busiest = int(total.argmax())
        mine = np.flatnonzero(gpu == busiest)
        others = np.flatnonzero(gpu != busiest)
        moved = load[mine][:, None] - load[others][None, :]
        there = gpu[others]
        worse = np.maximum(total[busiest] - moved, total[there][None, :] + moved)
        same = expert[mine][:, None] == expert[others][None, :]
        barred = holds[there][:, expert[mine]].T | holds[busiest][expert[others]][None, :]
        worse[same | barred] = np.inf
        if not worse.size or worse.min() >= total[busiest] * (1 - _LEAST_GAIN):
            return gpu
        a, b = np.unravel_index(int(worse.argmin()), worse.shape)
        e, f = int(mine[a]), int(others[b])
        target = int(gpu[f])
        total[busiest] -= moved[a, b]
        total[target] += moved[a, b]
        holds[busiest, expert[e]] = holds[target, expert[f]] = False
        holds[target, expert[e]] = holds[busiest, expert[f]] = True
        gpu[e], gpu[f] = target, busiest
