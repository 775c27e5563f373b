"""The baseline that guesses: what no predictor may fall below."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.predictors.counts import check_fit
from moe_runtime.predictors.predictor import (
    Fingerprint,
    Forecast,
    ModelFacts,
    Progress,
    State,
    StepRows,
    silent,
)
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

_SEED = 0
_SPREAD = 1e-3  # so small that the numbers stay k/E, and large enough to rank experts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RandomGuess:
    """Gives every expert k/E, give or take a thousandth of it that ranks them anew each time."""

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[str]] = frozenset()

    fingerprint: Fingerprint

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        return cls(fingerprint=facts.fingerprint)

    def start(self) -> "RandomSession":
        return RandomSession(self.fingerprint)

    def state(self) -> State:
        return State(settings={}, tensors={})

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        return cls(fingerprint=fingerprint)


class RandomSession:
    """Guesses, from the same seed in every session."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        self._of = fingerprint
        self._random = np.random.default_rng(_SEED)
        self._num_rows = 0

    def begin(self, rows: StepRows) -> Forecast:
        self._num_rows = len(rows)
        return Forecast(first_layer=0, probability=self._guess(self._of.num_layers))

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        num_left = self._of.num_layers - layer - 1
        return Forecast(
            first_layer=layer + 1,
            probability=self._guess(num_left),
            next_step=None if num_left else self._guess(self._of.num_layers),
        )

    def forget(self, sequence_id: int) -> None:
        """Nothing is remembered."""

    def _guess(self, num_layers: int) -> Array:
        shape = self._num_rows, num_layers, self._of.num_experts
        noise = self._random.random(shape, np.float32) - np.float32(0.5)
        share = np.float32(self._of.top_k / self._of.num_experts)
        said: Array = np.clip(share * (1 + np.float32(_SPREAD) * noise), 0, 1)
        return said
