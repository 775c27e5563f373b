"""Predictive eviction: whose expected use is worth least, the further ahead the less, leaves."""

from collections.abc import Mapping, Sequence, Set

import numpy as np

from moe_runtime.cache.predictions import LEAST_PREFETCHED, Predictions
from moe_runtime.cache.reuse_model import Array, ReuseModel, log_odds, sigmoid
from moe_runtime.expert import ExpertKey

_LEAST_PROBABILITY = 1e-5  # and 1 less this the greatest: what is certain is never doubted again
_NEVER_LEAVES = 2.0  # more than anything is worth
_TRUST_STEP = 0.05
# Two voices that know different things are together surer than their mean.
_SHARPENING = 1.15


class PLECPolicy:
    """Evict the expert whose next use is worth least, as learned while running.

    After ExpertFlow's predictive locality-aware expert caching (arXiv 2410.17954): slots have no
    layer of their own, so one that an early layer has used is free for a later layer of the same
    forward, and layers share them by expected demand. A use is worth half for each forward that it
    lies ahead, so an expert is worth

        2^(-visits until its layer / L) (p + (1 - p) r / (1 + r))

    with p the probability of use at that visit and r the rate of use in those after it, both of a
    `ReuseModel`: the sum is the mean of 2^(-forwards until the use) where that waits 1 / r visits
    of the layer in the mean. The mean of the wait itself would say less: an expert that comes back
    at once or not for long may have the mean wait of one that surely comes too late. Predictions
    that `advise` brings stand beside p, as far as they have proven better: log-odds are mixed with
    a weight that is learned from what was then used, and those of p a little sharpened.
    """

    name = "plec"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = num_layers, num_experts
        self._model = ReuseModel(num_layers, num_experts)
        layers = np.arange(num_layers)
        # [L, L, 1]: visits from that of one layer to the next of another
        self._distance = ((layers - layers[:, None] - 1) % num_layers + 1)[..., None]
        self._discount = np.exp2(-self._distance / num_layers).astype(np.float32)
        self._num_experts = num_experts
        self._layer = 0  # that is visited
        # [L E]: 0 where resident, and elsewhere so much that nobody leaves who is not there
        self._absence = np.full(num_layers * num_experts, _NEVER_LEAVES, np.float32)
        self._worth: Array | None = None  # [L E] of what may be used; None: out of date
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
        self._worth = None

    def touch(self, key: ExpertKey) -> None:
        self._absence[key[0] * self._num_experts + key[1]] = 0.0

    def victim(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        worth = self._worths() + self._absence
        for layer, expert in pinned:
            worth[layer * self._num_experts + expert] = _NEVER_LEAVES
        number = int(worth.argmin())
        if worth[number] >= _NEVER_LEAVES:
            return None
        return ExpertKey(*divmod(number, self._num_experts))

    def forget(self, key: ExpertKey) -> None:
        self._absence[key[0] * self._num_experts + key[1]] = _NEVER_LEAVES

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
        self._worth = None

    def wanted(self) -> list[ExpertKey]:
        """Absent keys worth a fetch ahead: most probability over visits until the use first."""
        probability = sigmoid(_mixed(self._model.next_log_odds, self._advice, self._trust))
        value = (probability / self._distance[self._layer]).ravel()
        is_resident = self._absence == 0.0
        value[is_resident | (probability.ravel() < LEAST_PREFETCHED)] = 0.0
        order = np.argsort(-value, kind="stable")[: np.count_nonzero(value)]
        return [ExpertKey(*divmod(number, self._num_experts)) for number in order.tolist()]

    def is_sooner(self, key: ExpertKey, other: ExpertKey) -> bool:
        """Whether the use of `key` is worth more than that of `other`."""
        worth = self._worths()
        return bool(worth[self._number(key)] > worth[self._number(other)])

    def _number(self, key: ExpertKey) -> int:
        return key.layer * self._num_experts + key.expert

    def _take_advice(self) -> None:
        predictions, self._predictions = self._predictions, None
        if predictions is not None:
            self._is_advised = True
            _put_log_odds(predictions.next_LE, self._advice)
            if predictions.later_LE is not None:
                _put_log_odds(predictions.later_LE, self._later_advice)

    def _worths(self) -> Array:
        if self._worth is None:
            self._worth = self._weigh()
        return self._worth

    def _weigh(self) -> Array:
        model = self._model
        own, later = model.next_log_odds, model.later_log_odds()
        if self._is_advised:
            own = np.where(
                np.isnan(self._advice), own, _SHARPENING * _mixed(own, self._advice, self._trust)
            )
            later = _mixed(later, self._later_advice, self._trust)
        # With odds 1 / a of p and 1 / b of r: p + (1 - p) r / (1 + r) = 1 - a (1 + b) / ...
        against = np.exp(-own)
        against_later = np.exp(-later)
        against_later += 1.0
        lost = against * against_later
        against += 1.0
        against_later += 1.0
        against *= against_later
        lost /= against
        np.subtract(1.0, lost, out=lost)
        lost *= self._discount[self._layer]
        worth: Array = lost.ravel()
        return worth

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
