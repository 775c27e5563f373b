"""Parts a trace into what predictors learn from and what they are judged on, by sequence."""

from dataclasses import dataclass

import numpy as np

from moe_runtime.errors import PredictorError
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

HELD_OUT = 0.2  # of the sequences
_LEAST_SEQUENCES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which share of the sequences is kept for judging, and the seed that draws them."""

    held_out: float = HELD_OUT
    seed: int = 0


def split_by_sequence(trace: Trace, split: Split) -> tuple[Trace, Trace]:
    """What to fit, and what to judge: whole sequences, at least one each.

    Neighbouring tokens of one sequence resemble each other, so a split by token would leak.
    """
    is_held_out = np.isin(trace.sequence_id, held_out_sequences(trace, split))
    return trace.select(~is_held_out), trace.select(is_held_out)


def held_out_sequences(trace: Trace, split: Split) -> Array:
    """The ids of the sequences to judge on. Raises PredictorError where there are too few."""
    if not 0 < split.held_out < 1:
        raise PredictorError(
            f"held-out share {split.held_out} must be above 0 and below 1; write 0.2"
        )
    ids = np.unique(trace.sequence_id)
    if len(ids) < _LEAST_SEQUENCES:
        raise PredictorError(
            f"the trace of {trace.model} has {len(ids)} sequence(s), and a split by sequence needs "
            f"{_LEAST_SEQUENCES}; record more prompts"
        )
    number = min(max(1, round(split.held_out * len(ids))), len(ids) - 1)
    chosen: Array = np.sort(np.random.default_rng(split.seed).permutation(ids)[:number])
    return chosen
