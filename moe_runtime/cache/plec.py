"""Predictive eviction: who is expected back last leaves first."""

from collections.abc import Mapping, Sequence, Set

import numpy as np

from moe_runtime.cache.predictions import LEAST_PREFETCHED, Predictions
from moe_runtime.cache.reuse_model import Array, ReuseModel, log_odds, sigmoid
from moe_runtime.expert import ExpertKey

_LEAST_PROBABILITY = 1e-5  # and 1 less this the greatest: what is certain is never doubted again
_TRUST_STEP = 0.05


class PLECPolicy:
    """Evict the expert whose next use is expected furthest ahead, as learned while running.

    After ExpertFlow's predictive locality-aware expert caching (arXiv 2410.17954): slots have no
    layer of their own, so one that an early layer has used is free for a later layer of the same
    forward, and layers share them by expected demand. Visits until the next use of a key are

        visits until its layer + L ((1 - p) / r)

    with p the probability of use at that visit and r the rate of use in those after it, both of a
    `ReuseModel`. Predictions that `advise` brings stand beside p, as far as they have proven
    better: log-odds are mixed with a weight that is learned from what was then used.
    """

    name = "plec"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = num_layers, num_experts
        self._model = ReuseModel(num_layers, num_experts)
        layers = np.arange(num_layers)
        # [L, L, 1]: visits from that of one layer to the next of another
        self._distance = ((layers - layers[:, None] - 1) % num_layers + 1)[..., None]
        self._num_experts = num_experts
        self._layer = 0  # that is visited
        self._is_resident = np.zeros(num_layers * num_experts, np.bool_)
        self._expected: Array | None = None  # [L E] visits until the next use; None: out of date
        self._predictions: Predictions | None = None  # that wait for the visit
        self._advice = np.full(shape, np.nan)  # log-odds
        self._later_advice = np.full(shape, np.nan)
        self._is_advised = False  # ever
        self._trust, self._trust_squares = 0.5, 1.0

    def visit(self, keys: Sequence[ExpertKey]) -> None:
        layer = keys[0].layer
        experts = [key.expert for key in keys]
        if self._is_advised:
            self._learn_trust(layer, experts)
        self._model.visit(layer, experts)
        self._advice[layer] = self._later_advice[layer] = np.nan
        self._take_advice()
        self._layer = layer
        self._expected = None

    def touch(self, key: ExpertKey) -> None:
        self._is_resident[self._number(key)] = True

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        score = np.where(self._is_resident, self._expectation(), -1.0)
        for key in pinned:
            score[self._number(key)] = -1.0
        number = int(score.argmax())
        return ExpertKey(*divmod(number, self._num_experts)) if score[number] >= 0 else None

    def forget(self, key: ExpertKey) -> None:
        self._is_resident[self._number(key)] = False

    def advise(self, predictions: Mapping[ExpertKey, float]) -> None:
        """Probabilities of use at the next visit of a key's layer, after the visit about to begin.

        What is not a probability is left out.
        """
        if not isinstance(predictions, Predictions):
            predictions = Predictions.of(predictions, self._advice.shape)
        self._predictions = predictions

    def state(self) -> dict[str, Array]:
        """What was learnt, as arrays that `restore` takes; not who is resident."""
        return self._model.state()

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on with what another run learnt, or raise KeyError or ValueError."""
        self._model.restore(state)
        self._expected = None

    def wanted(self) -> list[ExpertKey]:
        """Absent keys worth a fetch ahead: most probability over visits until the use first."""
        probability = sigmoid(_mixed(self._model.next_log_odds, self._advice, self._trust))
        value = (probability / self._distance[self._layer]).ravel()
        value[self._is_resident | (probability.ravel() < LEAST_PREFETCHED)] = 0.0
        order = np.argsort(-value, kind="stable")[: np.count_nonzero(value)]
        return [ExpertKey(*divmod(number, self._num_experts)) for number in order.tolist()]

    def is_sooner(self, key: ExpertKey, other: ExpertKey) -> bool:
        """Whether `key` is expected to be used before `other`."""
        expected = self._expectation()
        return bool(expected[self._number(key)] < expected[self._number(other)])

    def _number(self, key: ExpertKey) -> int:
        return key.layer * self._num_experts + key.expert

    def _take_advice(self) -> None:
        predictions, self._predictions = self._predictions, None
        if predictions is not None:
            self._is_advised = True
            _put_log_odds(predictions.next_LE, self._advice)
            if predictions.later_LE is not None:
                _put_log_odds(predictions.later_LE, self._later_advice)

    def _expectation(self) -> Array:
        if self._expected is None:
            self._expected = self._expect()
        return self._expected

    def _expect(self) -> Array:
        model = self._model
        own, later = model.next_log_odds, model.later_log_odds()
        if self._is_advised:
            own = _mixed(own, self._advice, self._trust)
            later = _mixed(later, self._later_advice, self._trust)
        skipped = sigmoid(-own) / sigmoid(later)
        expected: Array = self._distance[self._layer] + len(own) * skipped
        return expected.ravel()

    def _learn_trust(self, layer: int, experts: Sequence[int]) -> None:
        """A step of AdaGrad on the logistic loss of what was last said of this visit."""
        advice = self._advice[layer]
        is_advised = ~np.isnan(advice)
        if not is_advised.any():
            return
        own = self._model.next_log_odds[layer]
        used = np.zeros(self._num_experts)
        used[experts] = 1.0
        difference = (advice - own)[is_advised]
        errors = (used - sigmoid(own + self._trust * (advice - own)))[is_advised]
        slope = float((errors * difference).sum())
        self._trust_squares += slope * slope
        step = _TRUST_STEP * slope / self._trust_squares**0.5
        self._trust = min(1.0, max(0.0, self._trust + step))


def _mixed(own: Array, advice: Array, trust: float) -> Array:
    return np.where(np.isnan(advice), own, own + trust * (advice - own))


def _put_log_odds(probability: Array, advice: Array) -> None:
    """Overwrite where there is a probability; NaN and what is outside [0, 1] are passed over."""
    is_said = (probability >= 0.0) & (probability <= 1.0)  # False for NaN
    clipped = np.clip(probability, _LEAST_PROBABILITY, 1.0 - _LEAST_PROBABILITY)
    np.copyto(advice, log_odds(clipped), where=is_said)
