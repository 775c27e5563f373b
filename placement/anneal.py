"""Simulated annealing over swaps, by the C library in `native` or by numpy.

L layers, P items a layer, G GPUs, E experts.
"""

import ctypes
from typing import Any, Protocol

import numpy as np

from moe_runtime.placement.anneal_status import open_anneal_library
from moe_runtime.placement.cost_model import CostModel, paid_for_hops

Array = np.ndarray[Any, Any]

_LOG_STEPS = 4096  # as in anneal.c
_LEAST_GAIN = 1e-13  # of the objective, whose terms are near 1: below it is rounding


class Annealing(Protocol):
    """An assignment under change. Costs are the model's, plus `penalty` x load above its limit."""

    gpu: Array  # [L, P] int32

    def sweep(self, num_proposals: int, temperature: float, penalty: float) -> float:
        """Propose `num_proposals` swaps in each layer; returns the sum of the changes made."""

    def descend(self, penalty: float, max_rounds: int = 1000) -> float:
        """Take every item's best swap while any gains; returns the sum of the changes made."""


def start_annealing(model: CostModel, gpu: Array, seed: int) -> Annealing:
    """From the assignment `gpu`, which is copied; compiled where that is possible."""
    library = open_anneal_library()
    state = _State(model, gpu)
    return _Numpy(state, seed) if isinstance(library, str) else _Compiled(state, seed, library)


def is_compiled() -> bool:
    """Whether `start_annealing` uses the C library."""
    return not isinstance(open_anneal_library(), str)


class _State:
    """The arrays of both engines; see anneal.c for their meaning."""

    def __init__(self, model: CostModel, gpu: Array) -> None:
        self.model = model
        self.gpu = np.array(gpu, dtype=np.int32, order="C")
        self.chain = np.ascontiguousarray(model.chain)
        self.chain_back = np.ascontiguousarray(model.chain.transpose(0, 2, 1))
        self.within = None if model.within is None else np.ascontiguousarray(model.within)
        self.costs = np.ascontiguousarray(model.costs)
        self.apart = 1.0 - np.eye(model.num_gpus)
        self.load = np.ascontiguousarray(model.load)
        self.limit = np.inf if model.balance is None else model.balance
        self.gpu_load = model.gpu_loads(self.gpu)
        self.attraction = self._attraction()
        self.expert = np.ascontiguousarray(model.expert, np.int32) if model.is_replicated else None
        self.holds = self._holds() if model.is_replicated else None

    def _attraction(self) -> Array:
        """`[L, G, P]`: what an item would pay on a GPU with all others where they are."""
        model, gpu = self.model, self.gpu
        L, P, G = model.num_layers, model.num_items, model.num_gpus
        paid = np.zeros((L, G, P)) if model.unary is None else model.unary.copy()
        for layer in range(L):
            if layer + 1 < L:
                paid[layer] += model.paid_beside(layer, layer + 1, gpu[layer + 1])
            if layer > 0:
                paid[layer] += model.paid_beside(layer, layer - 1, gpu[layer - 1])
            if self.within is not None:
                paid[layer] += paid_for_hops(
                    self.apart, gpu[layer], self.within[layer], is_flat=True
                )
        return np.ascontiguousarray(paid)

    def _holds(self) -> Array:
        L, G, E = self.model.num_layers, self.model.num_gpus, self.model.num_experts
        holds = np.zeros((L, G, E), np.uint8)
        for layer in range(L):
            holds[layer, self.gpu[layer], self.model.expert[layer]] = 1
        return holds


class _Annealing(ctypes.Structure):
    """`struct moe_annealing`."""

    _fields_ = (
        ("num_layers", ctypes.c_int64),
        ("num_items", ctypes.c_int64),
        ("num_gpus", ctypes.c_int64),
        ("num_experts", ctypes.c_int64),
        ("chain", ctypes.c_void_p),
        ("chain_back", ctypes.c_void_p),
        ("within", ctypes.c_void_p),
        ("costs", ctypes.c_void_p),
        ("sym", ctypes.c_void_p),
        ("load", ctypes.c_void_p),
        ("expert", ctypes.c_void_p),
        ("neg_log", ctypes.c_void_p),
        ("limit", ctypes.c_double),
        ("price", ctypes.c_double),
        ("gpu", ctypes.c_void_p),
        ("attraction", ctypes.c_void_p),
        ("gpu_load", ctypes.c_void_p),
        ("holds", ctypes.c_void_p),
        ("difference", ctypes.c_void_p),
        ("random", ctypes.c_uint64 * 2),
        ("accepted", ctypes.c_int64),
    )


class _Compiled:
    """The loop of anneal.c on the arrays of a `_State`; releases the GIL while it runs."""

    def __init__(self, state: _State, seed: int, library: ctypes.CDLL) -> None:
        self._state = state
        self.gpu = state.gpu
        self._difference = np.empty(state.model.num_items)
        self._neg_log = -np.log((np.arange(_LOG_STEPS) + 0.5) / _LOG_STEPS)
        random = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self._struct = _Annealing(
            num_layers=state.model.num_layers,
            num_items=state.model.num_items,
            num_gpus=state.model.num_gpus,
            num_experts=state.model.num_experts,
            chain=state.chain.ctypes.data,
            chain_back=state.chain_back.ctypes.data,
            within=_address(state.within),
            costs=state.costs.ctypes.data,
            sym=state.apart.ctypes.data,
            load=state.load.ctypes.data,
            expert=_address(state.expert),
            neg_log=self._neg_log.ctypes.data,
            limit=state.limit,
            price=state.model.price,
            gpu=state.gpu.ctypes.data,
            attraction=state.attraction.ctypes.data,
            gpu_load=state.gpu_load.ctypes.data,
            holds=_address(state.holds),
            difference=self._difference.ctypes.data,
            random=(ctypes.c_uint64 * 2)(*(int(word) for word in random)),
            accepted=0,
        )
        self._sweep = library.moe_annealing_sweep
        self._sweep.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_double)
        self._sweep.restype = ctypes.c_double
        self._descend = library.moe_annealing_descend
        self._descend.argtypes = (ctypes.c_void_p, ctypes.c_double, ctypes.c_double, ctypes.c_int64)
        self._descend.restype = ctypes.c_double

    def sweep(self, num_proposals: int, temperature: float, penalty: float) -> float:
        address = ctypes.addressof(self._struct)
        return float(self._sweep(address, num_proposals, temperature, penalty))

    def descend(self, penalty: float, max_rounds: int = 1000) -> float:
        address = ctypes.addressof(self._struct)
        return float(self._descend(address, penalty, _LEAST_GAIN, max_rounds))


class _Numpy:
    """The same by numpy: proposals are drawn as disjoint pairs of a layer and priced together."""

    def __init__(self, state: _State, seed: int) -> None:
        self._state = state
        self.gpu = state.gpu
        self._rng = np.random.default_rng(seed)

    def sweep(self, num_proposals: int, temperature: float, penalty: float) -> float:
        P = self._state.model.num_items
        total = 0.0
        for layer in range(self._state.model.num_layers):
            proposed = 0
            while proposed < num_proposals:
                order = self._rng.permutation(P)[: P // 2 * 2].reshape(2, -1)
                e, f = order[:, : num_proposals - proposed]
                # Pairs on one GPU are proposals too, so that both engines spend alike.
                proposed += max(len(e), 1)
                thresholds = -temperature * np.log(self._rng.random(len(e)))
                deltas = self._changes(layer, e, f, penalty)
                for i in np.flatnonzero(deltas < thresholds):
                    total += self._take(layer, int(e[i]), int(f[i]), thresholds[i], penalty)
        return total

    def descend(self, penalty: float, max_rounds: int = 1000) -> float:
        P = self._state.model.num_items
        every = np.arange(P)
        total = 0.0
        for _ in range(max_rounds):
            before = total
            for layer in range(self._state.model.num_layers):
                for e in range(P):
                    deltas = self._changes(layer, np.full(P, e), every, penalty)
                    f = int(deltas.argmin())
                    total += self._take(layer, e, f, -_LEAST_GAIN, penalty)
            if total == before:
                break
        return total

    def _take(self, layer: int, e: int, f: int, threshold: float, penalty: float) -> float:
        """Swap if it still changes the cost by less than `threshold`: returns the change."""
        delta = float(self._changes(layer, np.array([e]), np.array([f]), penalty)[0])
        if delta >= threshold:
            return 0.0
        self._swap(layer, e, f)
        return delta

    def _changes(self, layer: int, e: Array, f: Array, penalty: float) -> Array:
        """What each swap of e[i] and f[i] alone would add to the cost; inf where it may not be."""
        s = self._state
        gpu, paid = s.gpu[layer], s.attraction[layer]
        ge, gf = gpu[e], gpu[f]
        deltas: Array = paid[gf, e] - paid[ge, e] + paid[ge, f] - paid[gf, f]
        if s.within is not None:
            deltas += 2.0 * s.within[layer][e, f]
        if penalty > 0 or s.model.price > 0:
            moved = s.load[layer, f] - s.load[layer, e]
            le, lf = s.gpu_load[layer, ge], s.gpu_load[layer, gf]
            deltas += self._over(le + moved, penalty) - self._over(le, penalty)
            deltas += self._over(lf - moved, penalty) - self._over(lf, penalty)
        is_barred = ge == gf
        if s.expert is not None and s.holds is not None:
            ee, ef = s.expert[layer, e], s.expert[layer, f]
            is_barred |= (ee == ef) | (s.holds[layer, gf, ee] > 0) | (s.holds[layer, ge, ef] > 0)
        deltas[is_barred] = np.inf
        return deltas

    def _over(self, load: Array, penalty: float) -> Array:
        s = self._state
        limited = penalty * np.maximum(load - s.limit, 0.0) if penalty > 0 else 0.0
        return limited + s.model.price * np.maximum(load - 1.0, 0.0) ** 2

    def _swap(self, layer: int, e: int, f: int) -> None:
        s = self._state
        gpu = s.gpu[layer]
        ge, gf = int(gpu[e]), int(gpu[f])
        if layer + 1 < s.model.num_layers:
            difference = s.chain[layer, e] - s.chain[layer, f]
            s.attraction[layer + 1] += np.outer(s.costs[gf] - s.costs[ge], difference)
        if layer > 0:
            difference = s.chain_back[layer - 1, e] - s.chain_back[layer - 1, f]
            s.attraction[layer - 1] += np.outer(s.costs[:, gf] - s.costs[:, ge], difference)
        if s.within is not None:
            difference = s.within[layer, e] - s.within[layer, f]
            s.attraction[layer] += np.outer(s.apart[gf] - s.apart[ge], difference)
        moved = s.load[layer, f] - s.load[layer, e]
        s.gpu_load[layer, ge] += moved
        s.gpu_load[layer, gf] -= moved
        if s.expert is not None and s.holds is not None:
            ee, ef = s.expert[layer, e], s.expert[layer, f]
            s.holds[layer, ge, ee] = s.holds[layer, gf, ef] = 0
            s.holds[layer, gf, ee] = s.holds[layer, ge, ef] = 1
        gpu[e], gpu[f] = gf, ge


def _address(array: Array | None) -> int | None:
    return None if array is None else int(array.ctypes.data)
