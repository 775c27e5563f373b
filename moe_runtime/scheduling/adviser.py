"""Turns what a predictor says of rows into what a cache is told of experts.

T rows of a step, L MoE layers, E experts a layer.
"""

import numpy as np

from moe_runtime.cache.predictions import Predictions
from moe_runtime.predictors.predictor import Forecast, Foreteller, StepRows
from moe_runtime.trace_fields import Array


class Adviser:
    """One session of a predictor, along the layers of one step after the other.

    Rows are taken as independent: an expert is used with probability 1 - prod(1 - p). The layers
    still to come in the step are foretold for its rows, the others for the token after the last row
    of each sequence. NaN is what nothing is said of.
    """

    def __init__(self, predictor: Foreteller) -> None:
        self._session = predictor.start()
        self._shape = predictor.fingerprint.num_layers, predictor.fingerprint.num_experts
        self._this_step, self._next_step = self._nothing(), self._nothing()
        self._later: Array | None = None
        self._is_token = np.ones(0, np.bool_)  # [T]
        self._is_last = np.ones(0, np.bool_)  # [T]: rows that the next token of a sequence follows

    def begin(self, rows: StepRows) -> Predictions:
        """Before the first layer of a step runs."""
        self._is_token, self._is_last = rows.is_token, _last_rows(rows)
        # What was said of the next step was said of this one, and is said anew.
        self._this_step, self._next_step = self._nothing(), self._nothing()
        self._later = None
        self._take(self._session.begin(rows))
        return Predictions(self._this_step.copy())

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Predictions:
        """Layer `layer` has routed the rows; what is told is of the visits after it."""
        forecast = self._session.observe(layer, topk, hidden)
        self._take(forecast)
        if forecast.next_step is not None:
            self._next_step = _any_row(forecast.next_step[self._is_last])
        if forecast.later is not None:
            self._later = _any_row(forecast.later[self._is_last])
        found = self._next_step.copy()
        found[layer + 1 :] = self._this_step[layer + 1 :]
        return Predictions(found, self._later)

    def _take(self, forecast: Forecast) -> None:
        count = forecast.probability.shape[1]
        if count:
            first = forecast.first_layer
            said = _any_row(forecast.probability[self._is_token])
            self._this_step[first : first + count] = said

    def _nothing(self) -> Array:
        return np.full(self._shape, np.nan)


def _any_row(probability: Array) -> Array:
    single = len(probability) == 1  # most steps, kept short
    found: Array = probability[0] if single else 1.0 - np.prod(1.0 - probability, axis=0)
    return found


def _last_rows(about: StepRows) -> Array:
    if len(about) == 1:  # most steps, kept short
        return about.is_token
    found = np.zeros(len(about), np.bool_)
    row_of = {
        sequence: row
        for row, sequence in enumerate(about.sequence_id.tolist())
        if about.is_token[row]
    }
    found[list(row_of.values())] = True
    return found
