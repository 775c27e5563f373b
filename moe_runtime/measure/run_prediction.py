"""What a cost model says a recorded run should have taken, beside what it took."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.recording.run_record import FirstForwards
from moe_runtime.simulate.timeline import Lanes, play


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPrediction:
    """Of the run's first decode steps, as many as were kept. Hits and misses are of all forwards.

    The simulator plays the very experts that were asked for, on an empty cache at first and with
    nothing read ahead; costs are those of one row in each layer and for each expert, and none is
    paid for attention over the context (see StepCost).
    """

    num_steps: int
    predicted_step_seconds: float
    measured_step_seconds: float
    predicted_hits: int
    predicted_misses: int
    predicted_disk_seconds: float  # of all forwards
    is_whole: bool  # the forwards kept are all there were


def predict_run(
    first: FirstForwards, make_policy: Callable[[], EvictionPolicy], num_slots: int, cost: StepCost
) -> RunPrediction | None:
    """Play the forwards kept; None where none of them decodes."""
    decoding = [index for index, forward in enumerate(first.forwards) if forward.is_decode]
    if not decoding:
        return None
    lanes = Lanes()
    timeline = play(
        (visit.keys for visit in first.visits), make_policy(), num_slots, cost, lanes=lanes
    )
    ends = [0.0] * len(first.forwards)
    position = 0
    for visit in first.visits:
        position += 1 + len(visit.keys)  # the dense part, then each expert
        ends[visit.forward] = lanes.compute[position - 1][1]
    predicted = sum(ends[index] - (ends[index - 1] if index else 0.0) for index in decoding)
    measured = sum(first.forwards[index].seconds for index in decoding)
    return RunPrediction(
        num_steps=len(decoding),
        predicted_step_seconds=predicted / len(decoding),
        measured_step_seconds=measured / len(decoding),
        predicted_hits=timeline.hits,
        predicted_misses=timeline.misses,
        predicted_disk_seconds=timeline.disk_seconds,
        is_whole=first.is_whole,
    )
