"""Judges predictors on sequences that they were not fitted to.

N rows, L MoE layers, E experts a layer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_runtime.predictors.metrics import Score, score
from moe_runtime.predictors.predictor import Predictor, silent
from moe_runtime.predictors.replay import replay
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

PHASES = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}
_COSINE_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How right one predictor was. `scores` are by part of the rows and by moment.

    `layer_recall` is by moment, a number a layer, None where nothing was said; `state_bytes` are of
    what was fitted, and `microseconds` of the predictor's calls, a token, by phase.
    """

    predictor: str
    scores: Mapping[str, Mapping[str, Score]]
    layer_recall: Mapping[str, list[float | None]]
    microseconds: Mapping[str, float]
    state_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "predictor": self.predictor,
            "state_bytes": self.state_bytes,
            "microseconds_per_token": dict(self.microseconds),
            "layer_recall": dict(self.layer_recall),
            "scores": {
                part: {moment: asdict(found) for moment, found in by_moment.items()}
                for part, by_moment in self.scores.items()
            },
        }


def slots_of_budget(share: float, num_experts: int) -> int:
    """How many of a layer's experts a budget of all experts holds, at least one."""
    return max(1, math.floor(share * num_experts + 1e-9))


def evaluate(
    predictor: Predictor,
    trace: Trace,
    *,
    num_slots: int,
    seen_ids: Array | None = None,
    on_progress: Callable[[int, int], None] = silent,
) -> Evaluation:
    """Replay `trace` and compare. `seen_ids` are the token ids of what was fitted to."""
    said = replay(predictor, trace, on_progress=on_progress)
    parts = _parts(trace, seen_ids)
    scores: dict[str, dict[str, Score]] = {}
    for part, rows in parts.items():
        found = {
            moment: score(chance[rows], trace.topk[rows], num_slots=num_slots)
            for moment, chance in said.probability.items()
        }
        kept = {moment: one for moment, one in found.items() if one is not None}
        if kept:
            scores[part] = kept
    tokens = parts["all"]
    return Evaluation(
        predictor=predictor.name,
        scores=scores,
        layer_recall={
            moment: _by_layer(chance[tokens], trace.topk[tokens], num_slots)
            for moment, chance in said.probability.items()
            if moment in scores.get("all", {})
        },
        microseconds={
            name: float(said.call_seconds[rows].mean() * 1e6)
            for name, rows in parts.items()
            if name in PHASES and len(rows)
        },
        state_bytes=sum(array.nbytes for array in predictor.state().tensors.values()),
    )


def router_input_cosines(trace: Trace) -> dict[str, list[float]]:
    """By distance, for each layer that far ahead, how alike the two routers' inputs are.

    The mean cosine over tokens; where it is low, a gate cannot be asked ahead of time.
    """
    if trace.hidden is None:
        return {}
    rows = np.flatnonzero(trace.phase != Phase.PADDING)[:_COSINE_ROWS]
    seen = trace.hidden[rows].astype(np.float32)
    seen /= np.maximum(np.linalg.norm(seen, axis=-1, keepdims=True), 1e-9)
    return {
        str(distance): (seen[:, distance:] * seen[:, :-distance]).sum(-1).mean(0).tolist()
        for distance in range(1, min(4, trace.num_layers))
    }


def first_sequences(trace: Trace, num_tokens: int) -> Trace:
    """Whole sequences of `trace`, as many as it takes to have `num_tokens`, or all."""
    ids, lengths = np.unique(trace.sequence_id, return_counts=True)
    number = int(np.searchsorted(lengths.cumsum(), num_tokens)) + 1
    return trace.select(np.isin(trace.sequence_id, ids[:number]))


def _parts(trace: Trace, seen_ids: Array | None) -> dict[str, Array]:
    """The rows of each part, without padding."""
    is_token = trace.phase != Phase.PADDING
    masks = {"all": is_token} | {name: trace.phase == phase for name, phase in PHASES.items()}
    if trace.token_id is not None and seen_ids is not None:
        is_seen = np.isin(trace.token_id, seen_ids)
        masks |= {"seen ids": is_token & is_seen, "unseen ids": is_token & ~is_seen}
    return {name: np.flatnonzero(mask) for name, mask in masks.items()}


def _by_layer(chance: Array, topk: Array, num_slots: int) -> list[float | None]:
    found = [
        score(chance[:, layer : layer + 1], topk[:, layer : layer + 1], num_slots=num_slots)
        for layer in range(topk.shape[1])
    ]
    return [None if one is None else one.recall for one in found]
