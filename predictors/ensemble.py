"""A calibrated combination of predictors, chosen on sequences that none of them was fitted to.

The combination's logit is a weighted sum of the members' logits and a constant, with weights of
its own for each distance; members enter one by one, as long as the log loss on a further part of
those sequences falls.

N rows, T rows of a forward, L MoE layers, E experts a layer, M members.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moe_runtime.predictors.counts import check_fit, membership
from moe_runtime.predictors.ladder import LADDER
from moe_runtime.predictors.logistic import fit_logistic, logit, sigmoid
from moe_runtime.predictors.predictor import (
    Fingerprint,
    Forecast,
    ModelFacts,
    Predictor,
    Progress,
    Session,
    State,
    StepRows,
    silent,
)
from moe_runtime.predictors.replay import MOMENTS, NEXT_STEP, STEP_AHEAD, replay
from moe_runtime.predictors.split import Split, split_by_sequence
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array

# One of each sort; what is left out adds cost and hardly any knowledge beside these.
MEMBERS = (
    "frequency",
    "previous_token",
    "activation_matrix",
    "markov",
    "token_table",
    "gate_corrected",
    "routing_path",
)
_VALIDATION = Split(held_out=0.2, seed=1)
_MOST_ROWS = 8_000  # of validation; a few numbers are fitted to them
_LEAST_GAIN = 0.002  # of the log loss, for a member to enter
_HORIZON = 3

Weights = Mapping[str, Mapping[str, float]]  # by moment and member; "" is the constant


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ensemble:
    """Fitted members, and how much each one's word counts at each distance."""

    name: ClassVar[str] = "ensemble"
    needs: ClassVar[frozenset[str]] = frozenset()  # a member whose fields are missing stays out

    fingerprint: Fingerprint
    members: Mapping[str, Predictor]
    weights: Weights

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        to_fit, to_choose = split_by_sequence(trace, _VALIDATION)
        kinds = {
            kind.name: kind for kind in LADDER if kind.name in MEMBERS and _can(kind, trace, facts)
        }
        members = {}
        for done, (name, kind) in enumerate(kinds.items()):
            on_progress(done, len(kinds) + 1)
            members[name] = kind.fit(to_fit, facts)
        weights = choose_weights(members, _first_sequences(to_choose))
        on_progress(len(kinds) + 1, len(kinds) + 1)
        used = {name for of_moment in weights.values() for name in of_moment}
        return cls(
            fingerprint=facts.fingerprint,
            members={name: member for name, member in members.items() if name in used},
            weights=weights,
        )

    def start(self) -> "EnsembleSession":
        return EnsembleSession(self)

    def state(self) -> State:
        states = {name: member.state() for name, member in self.members.items()}
        return State(
            settings={
                "members": {name: dict(state.settings) for name, state in states.items()},
                "weights": {moment: dict(found) for moment, found in self.weights.items()},
            },
            tensors={
                f"{name}:{tensor}": array
                for name, state in states.items()
                for tensor, array in state.tensors.items()
            },
        )

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        kinds = {kind.name: kind for kind in LADDER}
        members = {}
        for name, settings in state.settings["members"].items():
            prefix = f"{name}:"
            tensors = {
                tensor.removeprefix(prefix): array
                for tensor, array in state.tensors.items()
                if tensor.startswith(prefix)
            }
            own = State(settings=settings, tensors=tensors)
            members[name] = kinds[name].of_state(fingerprint, own)
        return cls(fingerprint=fingerprint, members=members, weights=state.settings["weights"])


class EnsembleSession:
    """Asks every member, and weighs what they say."""

    def __init__(self, predictor: Ensemble) -> None:
        self._of = predictor
        self._sessions: dict[str, Session] = {
            name: member.start() for name, member in predictor.members.items()
        }

    def begin(self, rows: StepRows) -> Forecast:
        said = {name: one.begin(rows).probability for name, one in self._sessions.items()}
        num_layers = self._of.fingerprint.num_layers
        whole = {name: chance for name, chance in said.items() if chance.shape[1] == num_layers}
        shape = len(rows), num_layers, self._of.fingerprint.num_experts
        return Forecast(first_layer=0, probability=self._weigh(STEP_AHEAD, whole, shape))

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        said = {name: one.observe(layer, topk, hidden) for name, one in self._sessions.items()}
        num_layers, num_experts = self._of.fingerprint.num_layers, self._of.fingerprint.num_experts
        num_said = min(_HORIZON, num_layers - layer - 1)
        chance = np.empty((len(topk), num_said, num_experts), np.float32)
        for ahead in range(num_said):
            heard = {
                name: one.probability[:, ahead]
                for name, one in said.items()
                if one.probability.shape[1] > ahead
            }
            chance[:, ahead] = self._weigh(str(ahead + 1), heard, chance[:, ahead].shape)
        next_step = None
        if layer == num_layers - 1:
            later = {n: one.next_step for n, one in said.items() if one.next_step is not None}
            next_step = self._weigh(NEXT_STEP, later, (len(topk), num_layers, num_experts))
        return Forecast(first_layer=layer + 1, probability=chance, next_step=next_step)

    def forget(self, sequence_id: int) -> None:
        for session in self._sessions.values():
            session.forget(sequence_id)

    def _weigh(self, moment: str, said: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        weights = self._of.weights.get(moment, {})
        # Whoever is silent, as a gate without its input, is taken to say k/E.
        share = self._of.fingerprint.top_k / self._of.fingerprint.num_experts
        silent_logit = float(logit(np.array([share]))[0])
        total = np.full(shape, weights.get("", silent_logit), np.float32)
        for name, weight in weights.items():
            if name:
                heard = said.get(name)
                total += weight * (silent_logit if heard is None else logit(heard))
        return sigmoid(total)


def choose_weights(members: Mapping[str, Predictor], trace: Trace) -> dict[str, dict[str, float]]:
    """Weights at every moment of which a member speaks, from what it says along `trace`."""
    said = {name: replay(member, trace).probability for name, member in members.items()}
    truth = membership(trace.topk, trace.num_experts)
    ids = np.unique(trace.sequence_id)
    to_fit = np.isin(trace.sequence_id, ids[::2])
    weights = {}
    for moment in MOMENTS:
        heard = {
            name: logit(chances[moment].astype(np.float32))
            for name, chances in said.items()
            if not np.isnan(chances[moment]).all()
        }
        if not heard:
            continue
        is_known = np.all([~np.isnan(chance).any(-1) for chance in heard.values()], axis=0)
        is_known &= (trace.topk >= 0).any(-1)
        parts = [is_known & rows[:, None] for rows in (to_fit, ~to_fit)]
        if not all(part.any() for part in parts):
            continue
        inputs = [{name: x[part].ravel() for name, x in heard.items()} for part in parts]
        weights[moment] = _choose(inputs, [truth[part].ravel() for part in parts])
    return weights


def _choose(inputs: Sequence[Mapping[str, Array]], truth: Sequence[Array]) -> dict[str, float]:
    """Who counts for how much: fitted to the first part, chosen by the log loss of the second."""
    chosen: list[str] = []
    best, found = np.inf, {"": 0.0}
    while len(chosen) < len(inputs[0]):
        trials = {}
        for name in inputs[0].keys() - set(chosen):
            names = [*chosen, name]
            features = [
                np.stack([*(part[n] for n in names), np.ones_like(part[name])], axis=1)
                for part in inputs
            ]
            weights = fit_logistic(features[0], truth[0])
            trials[name] = _log_loss(sigmoid(features[1] @ weights), truth[1]), weights
        name = min(sorted(trials), key=lambda one: trials[one][0])
        loss, weights = trials[name]
        if chosen and loss > best * (1 - _LEAST_GAIN):
            break
        chosen.append(name)
        best = loss
        found = dict(zip([*chosen, ""], weights.tolist(), strict=True))
    return found


def _log_loss(chance: Array, truth: Array) -> float:
    return float(-np.log(np.where(truth > 0, chance, 1 - chance)).mean())


def _can(kind: type[Predictor], trace: Trace, facts: ModelFacts) -> bool:
    has_fields = all(getattr(trace, field) is not None for field in kind.needs)
    return has_fields and ("hidden" not in kind.needs or bool(facts.gates))


def _first_sequences(trace: Trace) -> Trace:
    """Whole sequences, until there are rows enough."""
    ids, lengths = np.unique(trace.sequence_id, return_counts=True)
    number = max(2, int(np.searchsorted(lengths.cumsum(), _MOST_ROWS)) + 1)
    return trace.select(np.isin(trace.sequence_id, ids[:number]))
