"""Replays a trace through the runtime's own cache and policies, without any weights."""

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from moe_runtime.cache.belady import BeladyPolicy
from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

POLICIES = (LRUPolicy.name, LFUPolicy.name, StaticPolicy.name, BeladyPolicy.name)

_BLOCK_USES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulationResult:
    """What a cache of `slots` experts, shared by all layers, would have done."""

    policy: str
    slots: int
    layer_hits: tuple[int, ...]  # by layer
    layer_misses: tuple[int, ...]
    seconds: float  # that the replay took
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
    keep_hits: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SimulationResult]:
    """As `simulate`, on accesses; `on_progress` hears how many of the replays are done."""
    check_policies(policies)
    check_slots(slots)
    if policy_accesses is not None:
        _check_same_shape(accesses, policy_accesses)
    favourites = (policy_accesses or accesses).most_used()
    next_uses = accesses.next_uses() if BeladyPolicy.name in policies else None
    pairs = [(policy, size) for policy in policies for size in slots]
    results: list[SimulationResult] = []
    for name, size in pairs:
        on_progress(len(results), len(pairs))
        policy: EvictionPolicy
        if name == BeladyPolicy.name:
            assert next_uses is not None
            policy = BeladyPolicy(_numbers(next_uses))
        elif name == StaticPolicy.name:
            policy = StaticPolicy(favourites[:size])
        else:
            policy = LFUPolicy() if name == LFUPolicy.name else LRUPolicy()
        sees_future = name == BeladyPolicy.name or (
            name == StaticPolicy.name and policy_accesses is None
        )
        results.append(replay(accesses, policy, size, sees_future=sees_future, keep_hits=keep_hits))
    on_progress(len(pairs), len(pairs))
    return results


def replay(
    accesses: Accesses,
    policy: EvictionPolicy,
    num_slots: int,
    *,
    sees_future: bool = False,
    keep_hits: bool = False,
) -> SimulationResult:
    """One cache with a fresh `policy`: visit by visit the decisions that the runtime would take."""
    start = time.perf_counter()
    cache = ExpertCache(num_slots, policy)
    is_hit = bytearray()
    for keys in accesses.visits():
        held, _ = cache.decide(keys)
        if keep_hits:
            is_hit.extend([slot is not None for slot in held])
    seconds = time.perf_counter() - start
    counts = [cache.counts[layer] for layer in range(accesses.num_layers)]
    return SimulationResult(
        policy=policy.name,
        slots=num_slots,
        layer_hits=tuple(count.hits for count in counts),
        layer_misses=tuple(count.misses for count in counts),
        seconds=seconds,
        sees_future=sees_future,
        is_hit=np.frombuffer(is_hit, np.bool_) if keep_hits else None,
    )


def check_policies(policies: Iterable[str]) -> None:
    """Raise ValueError for a name that is no policy's."""
    for name in policies:
        if name not in POLICIES:
            near = difflib.get_close_matches(name, POLICIES, n=1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"no policy is called {name!r}; {guess}there are {', '.join(POLICIES)}"
            )


def check_slots(slots: Iterable[int]) -> None:
    """Raise ValueError for a size that no cache can have."""
    for size in slots:
        if size < 1:
            raise ValueError(
                f"slots is {size}; a cache needs at least 1 slot, and one for each expert that a "
                "token uses in all layers before it can hit much"
            )


def _check_same_shape(accesses: Accesses, policy_accesses: Accesses) -> None:
    asked = accesses.num_layers, accesses.num_experts
    found = policy_accesses.num_layers, policy_accesses.num_experts
    if asked != found:
        raise ValueError(
            f"the policy trace has {found[0]} layers of {found[1]} experts, the trace {asked[0]} "
            f"of {asked[1]}; favourites must come from the same model (where only the number of "
            "experts was inferred differently, give num_experts)"
        )


def _numbers(values: Array) -> Iterable[int]:
    """The integers of `values`, a block of them as Python objects at a time."""
    blocks = range(0, len(values), _BLOCK_USES)
    return chain.from_iterable(values[i : i + _BLOCK_USES].tolist() for i in blocks)
