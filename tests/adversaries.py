"""Predictors that are as wrong as can be, and a gate that lets them all through."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from moe_runtime.predictors.predictor import Fingerprint, Forecast, StepRows
from moe_runtime.scheduling.benefit import ForwardFacts

Array = np.ndarray[Any, Any]


class OpenGate:
    """Always on; keeps what it was told."""

    is_listening = True
    is_on = True
    read_seconds = 0.0
    idle_seconds = 0.0

    def __init__(self) -> None:
        self.facts: list[ForwardFacts] = []
        self.failure = ""

    def add(self, facts: ForwardFacts) -> None:
        self.facts.append(facts)

    def fail(self, why: str) -> None:
        self.failure = why
        self.is_listening = self.is_on = False

    def report(self) -> dict[str, object]:
        return {"mode": "on", "why": self.failure or "forced"}


class Adversary:
    """Says `say(shape)` of everything, whenever it is asked; hears and keeps it all."""

    name: ClassVar[str] = "adversary"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __init__(self, fingerprint: Fingerprint, say: Callable[[tuple[int, ...]], Array]) -> None:
        self.fingerprint = fingerprint
        self.say = say
        self.heard: list[tuple[Any, ...]] = []

    def start(self) -> "Adversary":
        return self

    def begin(self, rows: StepRows) -> Forecast:
        self.heard.append(("begin", rows.token_id.tolist(), rows.position.tolist()))
        of = self.fingerprint
        return Forecast(
            first_layer=0, probability=self.say((len(rows), of.num_layers, of.num_experts))
        )

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        self.heard.append(
            ("observe", layer, topk.copy(), None if hidden is None else hidden.copy())
        )
        of = self.fingerprint
        return Forecast(
            first_layer=layer + 1,
            probability=self.say((len(topk), of.num_layers - layer - 1, of.num_experts)),
            next_step=self.say((len(topk), of.num_layers, of.num_experts)),
        )

    def forget(self, sequence_id: int) -> None:
        """Nothing is remembered."""


def random_guesses(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(sum(shape)).random(shape)


def all_nan(shape: tuple[int, ...]) -> Array:
    return np.full(shape, np.nan)


def mostly_nonsense(shape: tuple[int, ...]) -> Array:
    values = np.array([np.nan, np.inf, -np.inf, 7.0, -1.0, 0.9])
    return np.random.default_rng(sum(shape)).choice(values, shape)


def certain_of_all(shape: tuple[int, ...]) -> Array:
    return np.ones(shape)


def wrong_shape(shape: tuple[int, ...]) -> Array:
    return np.ones((*shape, 2))


def raising(shape: tuple[int, ...]) -> Array:
    raise RuntimeError("nobody knows the future")


def inverted(truth: Adversary) -> Callable[[tuple[int, ...]], Array]:
    """Sure of whom nobody uses, in a run in which routing goes as `truth` heard it."""
    used = iter([heard for heard in truth.heard if heard[0] == "observe"])

    def say(shape: tuple[int, ...]) -> Array:
        found = np.ones(shape)
        heard = next(used, None)
        if heard is not None and shape[1]:
            found[..., heard[2].ravel()] = 0.0
        return found

    return say
