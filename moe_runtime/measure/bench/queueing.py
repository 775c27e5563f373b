"""How long requests wait for their batch, for batches formed by arrival or by expected experts.

N requests, P places: the (layer, expert) pairs of the model, in one row.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from moe_runtime.expert import ExpertKey
from moe_runtime.scheduling.expert_queues import ExpertQueues, Request
from moe_runtime.trace_fields import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTime:
    """A batch takes `fixed_seconds`, and `expert_seconds` for each expert that it activates.

    Assumes that reading weights is what takes time, as in decode: one pass of an expert's weights
    serves all tokens of the batch that use it.
    """

    fixed_seconds: float
    expert_seconds: float

    def of(self, path_NP: Array) -> float:
        """Of a batch of requests with these true paths, bool."""
        return self.fixed_seconds + self.expert_seconds * int(path_NP.any(0).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Seconds from a request's arrival to the start of its batch, and what the batches were."""

    mean_seconds: float
    p95_seconds: float
    max_passes: int  # the most often that a request was passed over
    batches: int
    batch_size: float
    experts_per_batch: float
    busy_share: float


def poisson_arrivals(number: int, per_second: float, seed: int = 0) -> Array:
    """`[number]` seconds, ascending: a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(1 / per_second, number)
    arrivals: Array = np.cumsum(gaps)
    return arrivals


def replay_queue(
    arrivals_N: Array,
    true_NP: Array,
    expected: Sequence[AbstractSet[ExpertKey]],
    service: ServiceTime,
    *,
    batch_size: int,
    max_passes: int,
) -> Waiting:
    """One server takes the next batch of at most `batch_size` requests whenever it is free.

    Batches are formed from what is `expected`, and take the time of what is true. `max_passes` 0
    is first come, first served (`ExpertQueues`).
    """
    queues = ExpertQueues(max_tokens=batch_size, max_passes=max_passes)
    waits = np.zeros(len(arrivals_N))
    first_batch = np.zeros(len(arrivals_N), np.int64)
    passes: list[int] = [0]
    sizes: list[int] = []
    experts: list[int] = []
    now = busy_seconds = 0.0
    pushed = 0
    while pushed < len(arrivals_N) or len(queues):
        if not len(queues):
            now = max(now, float(arrivals_N[pushed]))
        while pushed < len(arrivals_N) and arrivals_N[pushed] <= now:
            queues.push(Request(number=pushed, num_tokens=1, experts=expected[pushed]))
            first_batch[pushed] = len(sizes)
            pushed += 1
        batch = [request.number for request in queues.next_batch()]
        waits[batch] = now - arrivals_N[batch]
        passes.append(int((len(sizes) - first_batch[batch]).max()))
        sizes.append(len(batch))
        experts.append(int(true_NP[batch].any(0).sum()))
        seconds = service.of(true_NP[batch])
        busy_seconds += seconds
        now += seconds
    return Waiting(
        mean_seconds=float(waits.mean()),
        p95_seconds=float(np.quantile(waits, 0.95)),
        max_passes=max(passes),
        batches=len(sizes),
        batch_size=float(np.mean(sizes)),
        experts_per_batch=float(np.mean(experts)),
        busy_share=busy_seconds / now,
    )
