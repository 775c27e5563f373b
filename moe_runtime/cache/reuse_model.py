"""Learns, while a model runs, how soon every expert of every layer is used again.

L MoE layers, E experts a layer, F features, G lags, n experts that a visit uses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# How fast each moving average of an expert's use forgets, per visit of its layer.
_RATES = np.array([0.5, 0.25, 0.1, 0.03, 0.01], np.float32)
_AVERAGES, _ODDS = slice(0, 5), slice(5, 10)  # columns of the features
_USED, _USED_BEFORE, _AGE, _ONE, _PAIRS = 10, 11, 12, 13, 14
_NUM_FEATURES = 15
# Steps of AdaGrad (Duchi et al. 2011), for weights all keys share and for those of pairs.
_SHARED_STEP = 0.2
_PAIR_STEP = 0.8
_FIRST_AVERAGE = 0.1
_LEAST_AVERAGE = 0.002  # bounds the log-odds
_OLDER_VISITS = 16  # rates of use are also learned from what was known so many visits before
_LEAST_LATER = -7.6  # log-odds of use, in the visits after the next: one in 2,000
_PRIOR = (0.8, 0.2)  # weights, before anything is learned, of the log-odds of two averages
_FIRST_SQUARE = 0.001


class ReuseModel:
    """Two rates of use for every expert, learned by following the visits of all layers.

    That expert `e` of layer `l` is used when `l` is visited next has the probability

        p = sigmoid(w x[l, e] + sum over lags g of mean over a used g visits before of M[g, a, e])

    with x the expert's own past: moving averages at five rates, their log-odds, the last two
    visits, the logarithm of its age. The lags go from a whole forward (the layer's own last visit)
    down to one visit. Each is fitted to what those before it in time leave unexplained, so the sum
    is a probability at every distance from the visit. `r`, a like function of `x` and of the sum
    over lags, is the rate in the visits after that one. Nothing is fitted beforehand, and labels
    are uses that have happened.

    A visit costs O(G n E) and the weights take `8 G L E^2` bytes.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = num_layers, num_experts
        asked = {num_layers, num_layers - 1, num_layers - 2, num_layers - 3, num_layers // 2, 1}
        lags = np.array(sorted((lag for lag in asked if lag > 0), reverse=True), np.intp)
        layers = np.arange(num_layers)
        self._targets = (layers[:, None] + lags) % num_layers  # [L, G]
        self._sources = ((layers[:, None] - lags) % num_layers).tolist()
        self._lag_index = np.arange(len(lags))
        # [n, G]: rows of `_pair` that the last visit of a layer uses; empty before there was one
        self._rows = [np.zeros((0, len(lags)), np.intp)] * num_layers
        self._averages = np.full((*shape, len(_RATES)), _FIRST_AVERAGE, np.float32)
        self._age = np.full(shape, 1 / _FIRST_AVERAGE, np.float32)
        self._features = np.zeros((*shape, _NUM_FEATURES), np.float32)
        self._features_before = np.zeros_like(self._features)  # one visit ago
        self._older = np.zeros_like(self._features)  # up to _OLDER_VISITS visits ago
        self._older_visits = [0] * num_layers
        self._next_weights = _SharedWeights()
        self._later_weights = _SharedWeights()
        # [L E G, E]: layer and expert of a visit, a lag, and the expert of the layer so much later
        self._pair = np.zeros((num_layers * num_experts * len(lags), num_experts), np.float32)
        self._pair_squares = np.ones_like(self._pair)
        self._own = np.full(shape, log_odds(_FIRST_AVERAGE), np.float32)
        self._parts = np.zeros((num_layers, len(lags), num_experts), np.float32)
        self._later = np.full(shape, log_odds(_FIRST_AVERAGE), np.float32)
        # `[L, E]`: log-odds of use at the next visit of the layer.
        self.next_log_odds = np.full(shape, log_odds(_FIRST_AVERAGE), np.float32)

    def later_log_odds(self) -> Array:
        """`[L, E]`: of the rate of use in the visits after the next, if that does not use it."""
        pairs = self.next_log_odds - self._own
        found: Array = self._later + self._later_weights.values[_PAIRS] * pairs
        return np.maximum(found, _LEAST_LATER, out=found)

    def state(self) -> dict[str, Array]:
        """All that was learnt, as arrays; which visits came last is not among it."""
        return {name: array.copy() for name, array in self._learnt().items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take what `state` gave. Raises KeyError or ValueError, and changes nothing then."""
        learnt = self._learnt()
        for name, array in learnt.items():
            found = state[name]
            if found.shape != array.shape or not np.isfinite(found).all():
                raise ValueError(f"{name} of a reuse model is not {list(array.shape)} numbers")
        for name, array in learnt.items():
            array[:] = state[name]
        self.next_log_odds[:] = self._own

    def _learnt(self) -> dict[str, Array]:
        return {
            "averages": self._averages,
            "age": self._age,
            "features": self._features,
            "features_before": self._features_before,
            "older": self._older,
            "pair": self._pair,
            "pair_squares": self._pair_squares,
            "own": self._own,
            "later": self._later,
            "next_weights": self._next_weights.values,
            "next_squares": self._next_weights.squares,
            "later_weights": self._later_weights.values,
            "later_squares": self._later_weights.squares,
        }

    def visit(self, layer: int, experts: Sequence[int]) -> None:
        """`layer` uses `experts`, all of them and no other."""
        index = np.array(experts, np.intp)
        used = np.zeros(self._age.shape[1], np.float32)
        used[index] = 1.0
        if len(self._rows[layer]):
            self._learn(layer, used)
        self._remember(layer, used)
        num_lags = len(self._lag_index)
        rows = (layer * len(used) + index)[:, None] * num_lags + self._lag_index
        self._rows[layer] = rows
        parts = self._pair[rows].mean(axis=0)  # [G, E]
        targets = self._targets[layer]  # all different
        self._parts[targets, self._lag_index] = parts
        self.next_log_odds[targets] += parts

    def _learn(self, layer: int, used: Array) -> None:
        features = self._features[layer]
        own = self._own[layer]
        self._next_weights.learn(features, used - sigmoid(own))
        self._learn_later(layer, used)
        # What each lag adds is fitted to the sum up to it, so sums cut short are fitted too.
        errors = used - sigmoid(own + np.cumsum(self._parts[layer], axis=0))  # [G, E]
        found = [self._rows[source][:, lag] for lag, source in enumerate(self._sources[layer])]
        rows = np.concatenate(found)
        errors = np.repeat(errors, [len(some) for some in found], axis=0)
        squares = self._pair_squares[rows] + errors * errors
        self._pair_squares[rows] = squares
        self._pair[rows] += _PAIR_STEP * errors / np.sqrt(squares)

    def _learn_later(self, layer: int, used: Array) -> None:
        """From keys not used since the visit that a state, recent or older, foretold."""
        age, before, older = self._age[layer], self._features_before[layer], self._older[layer]
        if self._older_visits[layer] % _OLDER_VISITS == 0:
            older[:] = before
            self._older_visits[layer] = 0
        visits = self._older_visits[layer]
        self._older_visits[layer] += 1
        is_waiting = age > 0.0
        states, labels = before[is_waiting], used[is_waiting]
        if visits:
            is_waiting = age > visits
            states = np.concatenate([states, older[is_waiting]])
            labels = np.concatenate([labels, used[is_waiting]])
        weights = self._later_weights
        weights.learn(states, labels - sigmoid(weights.log_odds(states)))

    def _remember(self, layer: int, used: Array) -> None:
        averages, age, features = self._averages[layer], self._age[layer], self._features[layer]
        before = self._features_before[layer]
        before[:] = features
        before[:, _PAIRS] = self.next_log_odds[layer] - self._own[layer]
        averages += _RATES * (used[:, None] - averages)
        age += 1.0
        age[used > 0.0] = 0.0
        features[:, _USED_BEFORE] = features[:, _USED]
        features[:, _USED] = used
        features[:, _AVERAGES] = averages
        features[:, _ODDS] = log_odds(np.clip(averages, _LEAST_AVERAGE, 1 - _LEAST_AVERAGE))
        features[:, _AGE] = np.log1p(age)
        features[:, _ONE] = 1.0
        self._own[layer] = self.next_log_odds[layer] = self._next_weights.log_odds(features)
        self._parts[layer] = 0.0
        self._later[layer] = self._later_weights.log_odds(features)


class _SharedWeights:
    """Logistic regression on features that all experts share, fitted one visit at a time.

    Sums are numpy's own and no matrix products: BLAS may add in another order where memory lies
    otherwise, and a last bit decides who leaves. Equal visits must give equal decisions.
    """

    def __init__(self) -> None:
        self.values = np.zeros(_NUM_FEATURES, np.float32)
        self.values[_ODDS][2:4] = _PRIOR
        self.squares = np.full(_NUM_FEATURES, _FIRST_SQUARE, np.float32)

    def log_odds(self, features: Array) -> Array:
        found: Array = (features * self.values).sum(axis=1)
        return found

    def learn(self, features: Array, errors: Array) -> None:
        gradient = (errors[:, None] * features).sum(axis=0)
        self.squares += gradient * gradient
        self.values += _SHARED_STEP * gradient / np.sqrt(self.squares)


def sigmoid(x: Array) -> Array:
    """Of any number, without overflow."""
    found: Array = 0.5 + 0.5 * np.tanh(0.5 * x)
    return found


def log_odds(probability: Any) -> Any:
    """Of probabilities inside (0, 1)."""
    return np.log(probability / (1.0 - probability))
