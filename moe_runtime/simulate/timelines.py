"""Plays several policies and sizes on the lanes of one machine, beside what bounds them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_runtime.cache.belady import BeladyPolicy
from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.predictors.predictor import Foreteller
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.advice import advice
from moe_runtime.simulate.policy_maker import PolicyMaker
from moe_runtime.simulate.timeline import Timeline, bound_seconds, play
from moe_runtime.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineResult:
    """One policy at one size. Whatever predicts takes `perfect_prediction_seconds` or more."""

    policy: str
    slots: int
    predictor: str | None  # whose predictions the policy was told
    is_prefetching: bool
    timeline: Timeline
    perfect_prediction_seconds: float

    @property
    def infinite_bandwidth_seconds(self) -> float:
        """Compute alone."""
        return self.timeline.compute_seconds


def play_all(
    accesses: Accesses,
    trace: Trace,
    *,
    slots: Sequence[int],
    policies: Sequence[str],
    cost: StepCost,
    policy_accesses: Accesses | None = None,
    queue: Accesses | None = None,
    predictor: Foreteller | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TimelineResult]:
    """Every policy at every size; `plec` evicting only, and once more fetching ahead.

    Predictions of `predictor`, which lives through `trace`, are told to `plec`; with them `lru` and
    `lfu` are played fetching ahead, too.
    """
    maker = PolicyMaker(
        accesses,
        policies=[*policies, BeladyPolicy.name],
        slots=slots,
        policy_accesses=policy_accesses,
        queue=queue,
    )
    plan = [(name, size, False) for name in policies for size in slots]
    ahead = [PLECPolicy.name]
    if predictor is not None:  # what the runtime offers beside
        ahead += [LRUPolicy.name, LFUPolicy.name]
    plan += [(name, size, True) for name in policies if name in ahead for size in slots]
    fewest = {
        size: play(accesses.visits(), maker.make(BeladyPolicy.name, size), size, cost).misses
        for size in slots
    }
    results = []
    for done, (name, size, is_prefetching) in enumerate(plan):
        on_progress(done, len(plan))
        told = predictor if is_prefetching or name == PLECPolicy.name else None
        timeline = play(
            accesses.visits(),
            maker.make(name, size),
            size,
            cost,
            advice=None if told is None else advice(told, trace),
            is_prefetching=is_prefetching,
        )
        results.append(
            TimelineResult(
                policy=name,
                slots=size,
                predictor=None if told is None else told.name,
                is_prefetching=is_prefetching,
                timeline=timeline,
                perfect_prediction_seconds=bound_seconds(
                    timeline.compute_seconds, fewest[size], cost
                ),
            )
        )
    on_progress(len(plan), len(plan))
    return results
