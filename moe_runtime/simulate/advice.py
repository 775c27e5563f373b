"""What a predictor would have told a cache, visit by visit of a trace."""

from collections.abc import Iterator

import numpy as np

from moe_runtime.cache.predictions import Predictions
from moe_runtime.errors import PredictorError
from moe_runtime.predictors.predictor import Foreteller, StepRows
from moe_runtime.scheduling.adviser import Adviser
from moe_runtime.trace import Trace


def advice(predictor: Foreteller, trace: Trace) -> Iterator[Predictions]:
    """One for each visit of `Accesses.of(trace)`, of what follows that visit.

    Raises PredictorError when the trace lacks a field.
    """
    absent = [field for field in predictor.needs if getattr(trace, field) is None]
    if absent:
        raise PredictorError(
            f"predictor {predictor.name} needs {', '.join(sorted(absent))}, and the trace has no "
            "such field; record it again with moe-runtime trace record, or name another predictor"
        )
    adviser = Adviser(predictor)
    starts = np.flatnonzero(np.diff(trace.step, prepend=trace.step[0] - 1))
    for rows in map(slice, starts, np.append(starts[1:], trace.num_tokens)):
        adviser.begin(StepRows.of(trace, rows))
        for layer in range(trace.num_layers):
            topk = trace.topk[rows, layer]
            hidden = None if trace.hidden is None else trace.hidden[rows, layer]
            told = adviser.observe(layer, topk, hidden)
            if (topk >= 0).any():
                yield told
