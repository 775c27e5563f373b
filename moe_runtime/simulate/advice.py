"""What a predictor would have told a cache, visit by visit of a trace.

T rows of a step, L MoE layers, E experts a layer.
"""

from collections.abc import Iterator

import numpy as np

from moe_runtime.cache.predictions import Predictions
from moe_runtime.errors import PredictorError
from moe_runtime.predictors.predictor import Forecast, Predictor, StepRows
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array


def advice(predictor: Predictor, trace: Trace) -> Iterator[Predictions]:
    """One for each visit of `Accesses.of(trace)`, of what follows that visit.

    The layers still to come in the step are foretold for its rows, the others for the token after
    the last row of each sequence. Rows are taken as independent: an expert is used with
    probability 1 - prod(1 - p). Raises PredictorError when the trace lacks a field.
    """
    absent = [field for field in predictor.needs if getattr(trace, field) is None]
    if absent:
        raise PredictorError(
            f"predictor {predictor.name} needs {', '.join(sorted(absent))}, and the trace has no "
            "such field; record it again with moe-runtime trace record, or name another predictor"
        )
    session = predictor.start()
    shape = trace.num_layers, trace.num_experts
    starts = np.flatnonzero(np.diff(trace.step, prepend=trace.step[0] - 1))
    for rows in map(slice, starts, np.append(starts[1:], trace.num_tokens)):
        about = StepRows.of(trace, rows)
        is_last = _last_rows(about)
        # What was said of the next step was said of this one, and `begin` says it anew.
        this_step, next_step = np.full(shape, np.nan), np.full(shape, np.nan)
        later: Array | None = None
        _take(session.begin(about), this_step, about.is_token)
        for layer in range(trace.num_layers):
            topk = trace.topk[rows, layer]
            hidden = None if trace.hidden is None else trace.hidden[rows, layer]
            forecast = session.observe(layer, topk, hidden)
            _take(forecast, this_step, about.is_token)
            if forecast.next_step is not None:
                next_step = _any_row(forecast.next_step[is_last])
            if forecast.later is not None:
                later = _any_row(forecast.later[is_last])
            if (topk >= 0).any():
                found = next_step.copy()
                found[layer + 1 :] = this_step[layer + 1 :]
                yield Predictions(found, later)


def _take(forecast: Forecast, this_step: Array, is_token: Array) -> None:
    count = forecast.probability.shape[1]
    if count:
        first = forecast.first_layer
        this_step[first : first + count] = _any_row(forecast.probability[is_token])


def _any_row(probability: Array) -> Array:
    single = len(probability) == 1  # most steps, kept short
    found: Array = probability[0] if single else 1.0 - np.prod(1.0 - probability, axis=0)
    return found


def _last_rows(about: StepRows) -> Array:
    """`[T]`: which rows the next token of a sequence follows."""
    found = np.zeros(len(about), np.bool_)
    row_of = {
        sequence: row
        for row, sequence in enumerate(about.sequence_id.tolist())
        if about.is_token[row]
    }
    found[list(row_of.values())] = True
    return found
