"""What a predictor expects of sequences that run together, as the paths that schedulers compare.

N sequences, T tokens of them, L MoE layers, E experts a layer, P = L x E.
"""

import threading
from collections.abc import Sequence

import numpy as np

from moe_runtime.errors import PredictorError
from moe_runtime.expert import ExpertKey
from moe_runtime.predictors.counts import membership
from moe_runtime.predictors.metrics import top_experts
from moe_runtime.predictors.predictor import Predictor, StepRows
from moe_runtime.trace import Phase
from moe_runtime.trace_fields import Array


def check_sees_tokens(predictor: Predictor) -> None:
    """Raise PredictorError unless token ids are all that `predictor` needs, and what it uses."""
    if predictor.needs != {"token_id"}:
        needs = ", ".join(sorted(predictor.needs)) or "no token ids"
        raise PredictorError(
            f"predictor {predictor.name} needs {needs}, and batches are formed before a layer "
            "runs; use one that reads token ids alone, such as token_table or routing_path"
        )


class ExpectedPaths:
    """The expected paths of sequences, from their prompts to their last tokens.

    A path has the `top_k` most probable experts of each layer. Two threads may ask: one about the
    prompts of sequences to come, one about the tokens of those that run.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._session = predictor.start()
        self._top_k = predictor.fingerprint.top_k
        self._lengths: dict[int, int] = {}
        self._lock = threading.Lock()

    def of_prompt(self, sequence: int, ids: Sequence[int]) -> Array:
        """`[P]` bool: the experts that the tokens of a new sequence want most often."""
        rows = StepRows.of_prompt(sequence, ids)
        with self._lock:
            self._lengths[sequence] = len(ids)
            probability_TLE = self._session.begin(rows).probability
        path: Array = self._path(np.nan_to_num(probability_TLE).mean(0, keepdims=True))[0]
        return path

    def of_tokens(self, tokens: Sequence[tuple[int, int]]) -> Array:
        """`[N, P]` bool: for each (sequence, its next token), the experts of that token."""
        with self._lock:
            sequence, token = np.array(tokens, np.int32).reshape(-1, 2).T
            rows = StepRows(
                token_id=token,
                sequence_id=sequence,
                position=np.array([self._lengths[s] for s, _ in tokens], np.int32),
                phase=np.full(len(tokens), Phase.DECODE, np.uint8),
            )
            for number, _ in tokens:
                self._lengths[number] += 1
            probability_NLE = self._session.begin(rows).probability
        return self._path(np.nan_to_num(probability_NLE))

    def forget(self, sequence: int) -> None:
        """The sequence has ended."""
        with self._lock:
            self._session.forget(sequence)
            del self._lengths[sequence]

    def _path(self, probability_NLE: Array) -> Array:
        chosen = top_experts(probability_NLE, self._top_k)
        path_NLE = membership(chosen, probability_NLE.shape[-1]) > 0
        return path_NLE.reshape(len(path_NLE), -1)


def experts_of(path_P: Array, num_experts: int) -> frozenset[ExpertKey]:
    """The experts on one path."""
    places = np.flatnonzero(path_P)
    return frozenset(ExpertKey(*divmod(int(place), num_experts)) for place in places)
