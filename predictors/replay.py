"""Lets a predictor live through a trace, and keeps what it said at which distance.

N rows, T rows of a step, L MoE layers, E experts a layer.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from moe_runtime.predictors.predictor import Forecast, Predictor, StepRows
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

# When a layer was foretold: right after the layer so many before it had routed; before the first
# layer of its forward ran; or when the token before had ended, and its own id was not known.
STEP_AHEAD = "step"
NEXT_STEP = "next"
MOMENTS = ("1", "2", "3", STEP_AHEAD, NEXT_STEP)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Said:
    """What was said of every row, `[N, L, E]` float16 by moment; NaN where nothing was.

    `call_seconds` are those of the predictor's own calls, `[N]`: a step's shared by its rows.
    """

    probability: dict[str, Array]
    call_seconds: Array


def steps_of(trace: Trace) -> Iterator[slice]:
    """The rows of each step, in order."""
    starts = np.flatnonzero(np.diff(trace.step, prepend=trace.step[0] - 1))
    ends = np.append(starts[1:], trace.num_tokens)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield slice(start, end)


def replay(
    predictor: Predictor,
    trace: Trace,
    moments: tuple[str, ...] = MOMENTS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Said:
    """Run one session over all steps of `trace`; it hears of each layer once that layer has run."""
    shape = trace.num_tokens, trace.num_layers, trace.num_experts
    said = {moment: np.full(shape, np.nan, np.float16) for moment in moments}
    call_seconds = np.zeros(trace.num_tokens)
    session = predictor.start()
    ahead: dict[int, Array] = {}  # of sequences, [L, E] for their next token
    for rows in steps_of(trace):
        about = StepRows.of(trace, rows)
        started = time.perf_counter()
        forecast = session.begin(about)
        seconds = time.perf_counter() - started
        if STEP_AHEAD in said:
            _put(said[STEP_AHEAD], forecast, rows)
        if NEXT_STEP in said:
            for row, sequence in _end_rows(about, -1):
                if sequence in ahead and about.position[row]:
                    said[NEXT_STEP][rows.start + row] = ahead[sequence]
        for layer in range(trace.num_layers):
            topk = trace.topk[rows, layer]
            hidden = None if trace.hidden is None else trace.hidden[rows, layer]
            started = time.perf_counter()
            forecast = session.observe(layer, topk, hidden)
            seconds += time.perf_counter() - started
            _keep(said, forecast, rows, heard_of=layer)
        call_seconds[rows] = seconds / max(1, rows.stop - rows.start)
        if NEXT_STEP in said and forecast.next_step is not None:
            for row, sequence in _end_rows(about, 1):
                ahead[sequence] = forecast.next_step[row]
        on_progress(rows.stop, trace.num_tokens)
    return Said(probability=said, call_seconds=call_seconds)


def _keep(said: dict[str, Array], forecast: Forecast, rows: slice, *, heard_of: int) -> None:
    """Each layer of the forecast is as far ahead as it lies behind the last layer heard of."""
    for offset in range(forecast.probability.shape[1]):
        layer = forecast.first_layer + offset
        moment = str(layer - heard_of)
        if moment in said:
            said[moment][rows, layer] = forecast.probability[:, offset]


def _put(said: Array, forecast: Forecast, rows: slice) -> None:
    end = forecast.first_layer + forecast.probability.shape[1]
    said[rows, forecast.first_layer : end] = forecast.probability


def _end_rows(about: StepRows, direction: int) -> list[tuple[int, int]]:
    """A row of every sequence, with the sequence: the first for direction -1, the last for 1."""
    rows = np.flatnonzero(about.is_token)[::direction].tolist()
    sequences = about.sequence_id.tolist()
    return [(row, sequence) for sequence, row in {sequences[row]: row for row in rows}.items()]
