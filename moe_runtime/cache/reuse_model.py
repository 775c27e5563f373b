"""Learns, while a model runs, how soon every expert of every layer is used again.

L MoE layers, E experts a layer, F features, G lags, n experts that a visit uses, V visits of which
is learned.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# How fast each moving average of an expert's use forgets, per visit of its layer.
_RATES = np.array([0.5, 0.25, 0.1, 0.03, 0.01], np.float32)[:, None]
_AVERAGES, _ODDS = slice(0, 5), slice(5, 10)  # rows of the features
_USED, _USED_BEFORE, _AGE, _ONE, _PAIRS = 10, 11, 12, 13, 14
_NUM_FEATURES = 15
# Steps of AdaGrad (Duchi et al. 2011), for weights all keys share and for those of pairs.
_SHARED_STEP = 0.2
_PAIR_STEP = 0.8
_FIRST_AVERAGE = 0.1
_LEAST_AVERAGE = np.float32(0.002)  # bounds the log-odds
_MOST_AVERAGE = np.float32(1.0) - _LEAST_AVERAGE
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

    It learns of all layers together, once a forward, before a layer is visited that has been since:
    one step over many arrays costs what a visit's alone would. A visit costs O(G n E) and the
    weights take `8 G L E^2` bytes.

    Sums are numpy's own and no matrix products: BLAS may add in another order where memory lies
    otherwise, and a last bit decides who leaves. Equal visits must give equal decisions.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = num_layers, num_experts
        asked = {num_layers, num_layers - 1, num_layers - 2, num_layers - 3, num_layers // 2, 1}
        lags = np.array(sorted((lag for lag in asked if lag > 0), reverse=True), np.intp)
        layers = np.arange(num_layers)
        self._targets = (layers[:, None] + lags) % num_layers  # [L, G]
        self._sources = ((layers[:, None] - lags) % num_layers).tolist()
        self._lag_index = np.arange(len(lags))
        # [n]: rows of `_pair` that the last visit of a layer uses; empty before there was one
        self._rows = [np.zeros(0, np.intp)] * num_layers
        self._age = np.full(shape, 1 / _FIRST_AVERAGE, np.float32)
        self._features = np.zeros((num_layers, _NUM_FEATURES, num_experts), np.float32)
        self._features[:, _AVERAGES] = _FIRST_AVERAGE
        self._features_before = np.zeros_like(self._features)  # one visit ago
        self._features_earlier = np.zeros_like(self._features)  # two
        self._older = np.zeros_like(self._features)  # up to _OLDER_VISITS visits ago
        self._older_visits = np.zeros(num_layers, np.intp)
        self._weights = np.zeros((2, _NUM_FEATURES, 1), np.float32)  # of the next visit, and later
        self._weights[:, _ODDS][:, 2:4, 0] = _PRIOR
        self._squares = np.full((2, _NUM_FEATURES), _FIRST_SQUARE, np.float32)
        # [L E, G, E]: layer and expert of a visit, a lag, and the expert of the layer so far after
        self._pair = np.zeros((num_layers * num_experts, len(lags), num_experts), np.float32)
        self._pair_squares = np.ones_like(self._pair)
        self._parts = np.zeros((num_layers, len(lags), num_experts), np.float32)
        self._parts_before = np.zeros_like(self._parts)
        # Of the next visit from its own past, and of those after it.
        self._own = np.full((2, *shape), log_odds(_FIRST_AVERAGE), np.float32)
        # `[L, E]`: log-odds of use at the next visit of the layer.
        self.next_log_odds = np.full(shape, log_odds(_FIRST_AVERAGE), np.float32)
        # By layer visited since the last lesson, the rows that had foretold its visit, by lag.
        self._lessons: dict[int, list[Array]] = {}

    def later_log_odds(self) -> Array:
        """`[L, E]`: of the rate of use in the visits after the next, if that does not use it."""
        found: Array = self.next_log_odds - self._own[0]
        found *= self._weights[1, _PAIRS]
        found += self._own[1]
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
        self.next_log_odds[:] = self._own[0]

    def _learnt(self) -> dict[str, Array]:
        return {
            "age": self._age,
            "features": self._features,
            "features_before": self._features_before,
            "features_earlier": self._features_earlier,
            "older": self._older,
            "pair": self._pair,
            "pair_squares": self._pair_squares,
            "own": self._own,
            "weights": self._weights,
            "squares": self._squares,
        }

    def visit(self, layer: int, experts: Sequence[int]) -> None:
        """`layer` uses `experts`, all of them and no other."""
        if layer in self._lessons:
            self._learn()
        if len(self._rows[layer]):
            self._lessons[layer] = [self._rows[source] for source in self._sources[layer]]
        index = np.array(experts, np.intp)
        self._remember(layer, index)
        self._rows[layer] = rows = index + layer * len(self._age[layer])
        parts = self._pair.take(rows, axis=0).sum(axis=0)  # [G, E]
        parts /= np.float32(len(index))
        targets = self._targets[layer]  # all different
        self._parts[targets, self._lag_index] = parts
        self.next_log_odds[targets] += parts

    def _remember(self, layer: int, index: Array) -> None:
        features, before = self._features[layer], self._features_before[layer]
        self._features_earlier[layer] = before
        before[:] = features
        used = features[_USED]
        features[_USED_BEFORE] = used
        used.fill(0.0)
        used[index] = 1.0
        averages = features[_AVERAGES]
        averages += _RATES * (used - averages)
        odds = features[_ODDS]
        np.maximum(averages, _LEAST_AVERAGE, out=odds)
        np.minimum(odds, _MOST_AVERAGE, out=odds)
        odds /= np.float32(1.0) - odds
        np.log(odds, out=odds)
        age = self._age[layer]
        age += 1.0
        age[index] = 0.0
        np.log1p(age, out=features[_AGE])
        features[_ONE] = 1.0
        own = (self._weights * features).sum(axis=1)  # [2, E]
        self._own[:, layer] = own
        self.next_log_odds[layer] = own[0]
        parts = self._parts[layer]
        self._parts_before[layer] = parts
        parts.fill(0.0)

    def _learn(self) -> None:
        """From all visits since the last lesson, of layers that had been visited before."""
        lessons, self._lessons = self._lessons, {}
        layers = np.array(list(lessons), np.intp)
        used = self._features[layers, _USED]  # [V, E]
        features = self._features_before[layers]  # [V, F, E]
        parts = self._parts_before[layers]  # [V, G, E]
        own = (features * self._weights[0]).sum(axis=1)
        self._step(0, (features * (used - sigmoid(own))[:, None]).sum(axis=2))
        self._learn_later(layers, used)
        self._features_before[layers, _PAIRS] = parts.sum(axis=1)
        # What each lag adds is fitted to the sum up to it, so sums cut short are fitted too.
        errors = used[:, None] - sigmoid(own[:, None] + np.cumsum(parts, axis=1))
        found = [rows for of_layer in lessons.values() for rows in of_layer]
        counts = [len(rows) for rows in found]
        num_lags = len(self._lag_index)
        lags = np.tile(self._lag_index, len(lessons)).repeat(counts)
        rows = np.concatenate(found) * num_lags + lags
        errors = errors.reshape(len(found), -1).repeat(counts, axis=0)
        pair, pair_squares = (x.reshape(-1, x.shape[-1]) for x in (self._pair, self._pair_squares))
        squares = errors * errors
        squares += pair_squares.take(rows, axis=0)
        pair_squares[rows] = squares
        errors *= np.float32(_PAIR_STEP)
        errors /= np.sqrt(squares, out=squares)
        errors += pair.take(rows, axis=0)
        pair[rows] = errors

    def _learn_later(self, layers: Array, used: Array) -> None:
        """From keys not used since the visit that a state, recent or older, foretold."""
        age = self._features_before[layers, _AGE]  # logarithmic, before the visit
        before = self._features_earlier[layers]
        is_old = self._older_visits[layers] % _OLDER_VISITS == 0
        self._older[layers[is_old]] = before[is_old]
        self._older_visits[layers[is_old]] = 0
        visits = self._older_visits[layers]
        self._older_visits[layers] += 1
        older = self._older[layers]
        least = np.log1p(visits + 0.5).astype(np.float32)[:, None]
        states = np.stack([before, older], axis=1).reshape(-1, *before.shape[1:])  # [2 V, F, E]
        # A state as old as the recent one is the recent one.
        is_waiting = np.stack([age > 0.0, (age > least) & (visits > 0)[:, None]], axis=1)
        labels = np.repeat(used, 2, axis=0)
        errors = labels - sigmoid((states * self._weights[1]).sum(axis=1))
        errors *= is_waiting.reshape(errors.shape)
        gradients = (states * errors[:, None]).sum(axis=2).reshape(len(layers), 2, -1)
        self._step(1, gradients.sum(axis=1))

    def _step(self, which: int, gradients: Array) -> None:
        """`[V, F]`: a step along the sum, as long as V steps along each would be."""
        self._squares[which] += (gradients * gradients).sum(axis=0)
        step = gradients.sum(axis=0) / np.sqrt(self._squares[which])
        self._weights[which, :, 0] += np.float32(_SHARED_STEP) * step


def sigmoid(x: Array) -> Array:
    """Of any number, without overflow."""
    found: Array = 0.5 + 0.5 * np.tanh(0.5 * x)
    return found


def log_odds(probability: Any) -> Any:
    """Of probabilities inside (0, 1)."""
    return np.log(probability / (1.0 - probability))
