"""Replays a trace through the runtime's own cache and policies, without any weights."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_runtime.cache.belady import BeladyPolicy
from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.predictions import Predictions
from moe_runtime.expert import ExpertKey
from moe_runtime.predictors.predictor import Predictor
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.advice import advice
from moe_runtime.simulate.policy_maker import POLICIES, PolicyMaker, check_policies, check_slots
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

__all__ = ["POLICIES", "check_policies", "check_slots"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulationResult:
    """What a cache of `slots` experts, shared by all layers, would have done."""

    policy: str
    slots: int
    layer_hits: tuple[int, ...]  # by layer
    layer_misses: tuple[int, ...]
    seconds: float  # that the replay took, without the predictor's
    predictor: str | None  # whose predictions the policy was told
    sees_future: bool  # the policy knew the trace it was replayed on
    is_hit: Array | None  # [A] bool, access by access, where asked for

    @property
    def hits(self) -> int:
        return sum(self.layer_hits)

    @property
    def misses(self) -> int:
        return sum(self.layer_misses)

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses)

    @property
    def bytes_fetched_experts(self) -> int:
        """Bytes read, in units of one expert's bytes: every miss reads one expert, also again."""
        return self.misses


def simulate(
    trace: Trace,
    *,
    slots: Sequence[int],
    policies: Sequence[str] = POLICIES,
    policy_trace: Trace | None = None,
) -> list[SimulationResult]:
    """Every policy at every number of slots, policy by policy.

    `slots` are shared by all layers. The favourites of `static` are the most used experts of
    `policy_trace`, or of `trace` itself without one.
    """
    policy_accesses = None if policy_trace is None else Accesses.of(policy_trace)
    return replay_all(
        Accesses.of(trace), slots=slots, policies=policies, policy_accesses=policy_accesses
    )


def replay_all(
    accesses: Accesses,
    *,
    slots: Sequence[int],
    policies: Sequence[str],
    policy_accesses: Accesses | None = None,
    queue: Accesses | None = None,
    predictor: Predictor | None = None,
    trace: Trace | None = None,
    keep_hits: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SimulationResult]:
    """As `simulate`, on accesses; `on_progress` hears how many of the replays are done.

    `queue` holds the predicted paths of `queue_belady`. What `predictor` says while it lives
    through `trace`, whose accesses these are, is told to `plec`.
    """
    pairs = [(policy, size) for policy in policies for size in slots]
    makers = PolicyMaker(
        accesses, policies=policies, slots=slots, policy_accesses=policy_accesses, queue=queue
    )
    results: dict[tuple[str, int], SimulationResult] = {}
    advised = [pair for pair in pairs if predictor is not None and pair[0] == PLECPolicy.name]
    for pair in pairs:
        on_progress(len(results), len(pairs))
        if pair in advised:
            continue
        name, size = pair
        results[pair] = replay(
            accesses,
            makers.make(name, size),
            size,
            sees_future=makers.sees_future(name),
            keep_hits=keep_hits,
        )
    if advised and predictor is not None and trace is not None:
        replays = [Replay(makers.make(*pair), pair[1], keep_hits=keep_hits) for pair in advised]
        # All sizes at once, as a predictor costs more than a cache.
        for keys, told in zip(accesses.visits(), advice(predictor, trace), strict=True):
            for one in replays:
                one.visit(keys, told)
        for pair, one in zip(advised, replays, strict=True):
            results[pair] = one.result(accesses.num_layers, predictor=predictor.name)
    on_progress(len(pairs), len(pairs))
    return [results[pair] for pair in pairs]


def replay(
    accesses: Accesses,
    policy: EvictionPolicy,
    num_slots: int,
    *,
    sees_future: bool = False,
    keep_hits: bool = False,
) -> SimulationResult:
    """One cache with a fresh `policy`: visit by visit the decisions that the runtime would take."""
    one = Replay(policy, num_slots, keep_hits=keep_hits)
    one.run(accesses.visits())
    return one.result(accesses.num_layers, sees_future=sees_future)


class Replay:
    """One cache on its way through the visits of a trace."""

    def __init__(self, policy: EvictionPolicy, num_slots: int, *, keep_hits: bool) -> None:
        self._cache = ExpertCache(num_slots, policy)
        self._is_hit: bytearray | None = bytearray() if keep_hits else None
        self._seconds = 0.0

    def run(self, visits: Iterable[Sequence[ExpertKey]]) -> None:
        """All visits, of which nothing is foretold."""
        start = time.perf_counter()
        decide = self._cache.decide
        for keys in visits:
            held, _ = decide(keys)
            if self._is_hit is not None:
                self._is_hit.extend([slot is not None for slot in held])
        self._seconds += time.perf_counter() - start

    def visit(self, keys: Sequence[ExpertKey], told: Predictions) -> None:
        """One visit, and what was predicted of those after it."""
        start = time.perf_counter()
        self._cache.policy.advise(told)
        held, _ = self._cache.decide(keys)
        self._seconds += time.perf_counter() - start
        if self._is_hit is not None:
            self._is_hit.extend([slot is not None for slot in held])

    def result(
        self, num_layers: int, *, sees_future: bool = False, predictor: str | None = None
    ) -> SimulationResult:
        counts = [self._cache.counts[layer] for layer in range(num_layers)]
        return SimulationResult(
            policy=self._cache.policy.name,
            slots=self._cache.num_slots,
            layer_hits=tuple(count.hits for count in counts),
            layer_misses=tuple(count.misses for count in counts),
            seconds=self._seconds,
            sees_future=sees_future,
            predictor=predictor,
            is_hit=None if self._is_hit is None else np.frombuffer(self._is_hit, np.bool_),
        )


def gap_closed(result: SimulationResult, results: Iterable[SimulationResult]) -> float | None:
    """Share of the hits that Belady has over LRU at the same slots; None where one is absent."""
    hits = {other.policy: other.hits for other in results if other.slots == result.slots}
    lru, belady = hits.get(LRUPolicy.name), hits.get(BeladyPolicy.name)
    if lru is None or belady is None or lru == belady:
        return None
    return (result.hits - lru) / (belady - lru)
