"""Parts a trace into what predictors learn from and what they are judged on, by sequence."""

import numpy as np

from moe_runtime.errors import PredictorError
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

HELD_OUT = 0.2  # of the sequences
_LEAST_SEQUENCES = 5


def split_by_sequence(
    trace: Trace, held_out: float = HELD_OUT, *, seed: int = 0
) -> tuple[Trace, Trace]:
    """What to fit, and what to judge: whole sequences, drawn with `seed`, at least one each.

    Neighbouring tokens of one sequence resemble each other, so a split by token would leak.
    """
    is_held_out = np.isin(trace.sequence_id, held_out_sequences(trace, held_out, seed=seed))
    return trace.select(~is_held_out), trace.select(is_held_out)


def held_out_sequences(trace: Trace, held_out: float, *, seed: int = 0) -> Array:
    """The ids of the sequences to judge on. Raises PredictorError where there are too few."""
    if not 0 < held_out < 1:
        raise ValueError(f"held-out share {held_out} must be between 0 and 1; write 0.2")
    ids = np.unique(trace.sequence_id)
    if len(ids) < _LEAST_SEQUENCES:
        raise PredictorError(
            f"the trace of {trace.model} has {len(ids)} sequence(s), and a split by sequence needs "
            f"{_LEAST_SEQUENCES}; record more prompts"
        )
    number = min(max(1, round(held_out * len(ids))), len(ids) - 1)
    chosen: Array = np.sort(np.random.default_rng(seed).permutation(ids)[:number])
    return chosen
