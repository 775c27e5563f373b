"""What predictors that read token ids with a `PathNetwork` have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch

from moe_runtime.predictors.counts import check_fit, frequency
from moe_runtime.predictors.path_network import PathNetwork, PathSettings, SequenceState
from moe_runtime.predictors.path_training import train_on_paths
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PathPredictor:
    """Fitted by `train_on_paths`; its kinds differ in `shape`, arguments of `within_budget`."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"token_id"})
    shape: ClassVar[Mapping[str, Any]]

    fingerprint: Fingerprint
    network: PathNetwork

    @classmethod
    def fit(cls, trace: Trace, facts: ModelFacts, on_progress: Progress = silent) -> Self:
        check_fit(cls.name, cls.needs, trace, facts)
        settings = PathSettings.within_budget(trace, facts, **cls.shape)
        network = train_on_paths(settings, trace, facts, frequency(trace), on_progress)
        return cls(fingerprint=facts.fingerprint, network=network)

    def start(self) -> "PathSession":
        return PathSession(self.network)

    def state(self) -> State:
        return _state_of(self.network)

    @classmethod
    def of_state(cls, fingerprint: Fingerprint, state: State) -> Self:
        return cls(fingerprint=fingerprint, network=_network_of(state))


class PathSession:
    """Keeps the network's state of every sequence."""

    def __init__(self, network: PathNetwork) -> None:
        self._network = network
        self._states: dict[int, SequenceState] = {}
        self._said = np.empty((0, 0, 0), np.float32)

    def begin(self, rows: StepRows) -> Forecast:
        settings = self._network.settings
        self._said = np.zeros((len(rows), settings.num_layers, settings.num_experts), np.float32)
        for index, sequence in _by_sequence(rows):
            if rows.position[index[0]] == 0:
                self.forget(sequence)
            with torch.inference_mode():
                logits, state = self._network.step(
                    torch.from_numpy(rows.token_id[index].astype(np.int64)),
                    self._states.get(sequence),
                )
                chance = self._network.chance(logits)
            self._states[sequence] = state
            self._said[index] = chance.numpy()
        return Forecast(first_layer=0, probability=self._said)

    def observe(self, layer: int, topk: Array, hidden: Array | None) -> Forecast:
        return Forecast(first_layer=layer + 1, probability=self._said[:, layer + 1 :])

    def forget(self, sequence_id: int) -> None:
        self._states.pop(sequence_id, None)


def _state_of(network: PathNetwork) -> State:
    """A network as it is stored."""
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return State(settings=network.settings.as_dict(), tensors=tensors)


def _network_of(state: State) -> PathNetwork:
    """The network that was stored; raises ValueError when its tensors do not fit."""
    settings: Mapping[str, Any] = state.settings
    network = PathNetwork(PathSettings(**settings))
    try:
        network.load_state_dict(
            {name: torch.from_numpy(tensor.copy()) for name, tensor in state.tensors.items()}
        )
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return network.eval()


def _by_sequence(rows: StepRows) -> list[tuple[Array, int]]:
    """The rows of each sequence, in order, with the sequence."""
    if len(rows) == 1 and rows.is_token[0]:
        return [(np.zeros(1, np.int64), int(rows.sequence_id[0]))]
    tokens = np.flatnonzero(rows.is_token)
    order = tokens[np.argsort(rows.sequence_id[tokens], kind="stable")]
    starts = np.flatnonzero(np.diff(rows.sequence_id[order], prepend=-1))
    parts = np.split(order, starts[1:]) if len(order) else []
    return [(part, int(rows.sequence_id[part[0]])) for part in parts]
