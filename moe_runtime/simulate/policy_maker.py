"""Makes the policies that a replay compares, from what each of them is given to know."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np

from moe_runtime.cache.allocation import allocate
from moe_runtime.cache.belady import BeladyPolicy
from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.partitioned import PartitionedPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.queue_belady import QueueBeladyPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.expert import ExpertKey
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.trace_fields import Array

# Belady last: the bound that the others are held against.
POLICIES = (
    LRUPolicy.name,
    LFUPolicy.name,
    StaticPolicy.name,
    PartitionedPolicy.name,
    PLECPolicy.name,
    BeladyPolicy.name,
)
# Needs a predicted trace, so it is not among those that every trace allows.
QUEUE = QueueBeladyPolicy.name
_COUNTING = (StaticPolicy.name, PartitionedPolicy.name)  # see the trace unless given another

_BLOCK_USES = 2**16


class PolicyMaker:
    """Fresh policies by name, for replays of `accesses`.

    `static` counts its favourites and `adapmoe` the misses it expects on `policy_accesses`, or on
    the accesses themselves without them; `plec` has then lived through `policy_accesses` before.
    """

    def __init__(
        self,
        accesses: Accesses,
        *,
        policies: Sequence[str],
        slots: Sequence[int],
        policy_accesses: Accesses | None,
        queue: Accesses | None,
    ) -> None:
        check_policies(policies, has_queue=queue is not None)
        check_slots(slots)
        if policy_accesses is not None:
            _check_same_shape(accesses, policy_accesses, "policy trace")
        if queue is not None:
            _check_same_shape(accesses, queue, "predicted trace")
        self._accesses = accesses
        self._earlier = policy_accesses
        counted = policy_accesses or accesses
        self._favourites = counted.most_used() if StaticPolicy.name in policies else []
        self._next_uses = accesses.next_uses() if BeladyPolicy.name in policies else None
        self._expected_misses = (
            expected_misses(counted) if PartitionedPolicy.name in policies else []
        )
        self._paths = [] if queue is None else _paths(queue)

    def make(self, name: str, num_slots: int) -> EvictionPolicy:
        makers: dict[str, Callable[[], EvictionPolicy]] = {
            LRUPolicy.name: LRUPolicy,
            LFUPolicy.name: LFUPolicy,
            StaticPolicy.name: lambda: StaticPolicy(self._favourites[:num_slots]),
            PartitionedPolicy.name: lambda: PartitionedPolicy(
                allocate(self._expected_misses, num_slots)
            ),
            PLECPolicy.name: self._plec,
            QueueBeladyPolicy.name: lambda: QueueBeladyPolicy(self._paths, len(self._paths)),
            BeladyPolicy.name: self._belady,
        }
        return makers[name]()

    def sees_future(self, name: str) -> bool:
        """Whether the policy knows the trace that it is replayed on."""
        return name == BeladyPolicy.name or (name in _COUNTING and self._earlier is None)

    def _belady(self) -> BeladyPolicy:
        assert self._next_uses is not None
        return BeladyPolicy(_numbers(self._next_uses))

    def _plec(self) -> PLECPolicy:
        policy = PLECPolicy(self._accesses.num_layers, self._accesses.num_experts)
        if self._earlier is not None:
            for keys in self._earlier.visits():
                policy.visit(keys)
        return policy


def expected_misses(accesses: Accesses) -> list[list[float]]:
    """By layer and slots from 0 to all: what the layer alone misses, least recently used leaving.

    From the stack distance of each use, the number of other experts of the layer used since
    (Mattson et al. 1970), with those of the same visit before it.
    """
    recent: list[list[int]] = [[] for _ in range(accesses.num_layers)]  # last used first
    uses = np.zeros((accesses.num_layers, accesses.num_experts + 1), np.int64)
    for keys in accesses.visits():
        order = recent[keys[0].layer]
        for layer, expert in keys:
            distance = order.index(expert) if expert in order else accesses.num_experts
            uses[layer, distance] += 1
            if distance < accesses.num_experts:
                del order[distance]
            order.insert(0, expert)
    # With k slots, what is k or more deep in the stack misses.
    misses: list[list[float]] = np.cumsum(uses[:, ::-1], axis=1)[:, ::-1].astype(float).tolist()
    return misses


def check_policies(policies: Iterable[str], *, has_queue: bool = False) -> None:
    """Raise ValueError for a name that is no policy's."""
    names = (*POLICIES, QUEUE)
    for name in policies:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no policy is called {name!r}; {guess}there are {', '.join(names)}")
        if name == QUEUE and not has_queue:
            raise ValueError(
                f"{QUEUE} evicts by the predicted paths of a queue; give them with "
                "--predicted-trace, as moe-runtime predictor trace writes them"
            )


def check_slots(slots: Iterable[int]) -> None:
    """Raise ValueError for a size that no cache can have."""
    for size in slots:
        if size < 1:
            raise ValueError(
                f"slots is {size}; a cache needs at least 1 slot, and one for each expert that a "
                "token uses in all layers before it can hit much"
            )


def _check_same_shape(accesses: Accesses, other: Accesses, name: str) -> None:
    asked = accesses.num_layers, accesses.num_experts
    found = other.num_layers, other.num_experts
    if asked != found:
        raise ValueError(
            f"the {name} has {found[0]} layers of {found[1]} experts, the trace {asked[0]} "
            f"of {asked[1]}; both must come from the same model (where only the number of "
            "experts was inferred differently, give num_experts)"
        )


def _paths(queue: Accesses) -> list[list[ExpertKey]]:
    """What each step uses, over all layers."""
    found: list[list[ExpertKey]] = []
    step: int | None = None
    for now, keys in zip(queue.step.tolist(), queue.visits(), strict=True):
        if now != step:
            found.append([])
            step = now
        found[-1].extend(keys)
    return found


def _numbers(values: Array) -> Iterable[int]:
    """The integers of `values`, a block of them as Python objects at a time."""
    blocks = range(0, len(values), _BLOCK_USES)
    return chain.from_iterable(values[i : i + _BLOCK_USES].tolist() for i in blocks)
