"""Counting over traces, as several predictors do it.

N rows, L MoE layers, K experts a token, E experts a layer.
"""

from collections.abc import Collection

import numpy as np

from moe_runtime.errors import PredictorError
from moe_runtime.predictors.predictor import Fingerprint, ModelFacts
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

# How many observations the prior is worth: enough to keep a rare expert from being certain.
PRIOR_ROWS = 4.0


def check_fit(name: str, needs: Collection[str], trace: Trace, facts: ModelFacts) -> None:
    """Raise PredictorError unless `trace` has what the predictor needs, and is of this model."""
    missing = sorted(field for field in needs if getattr(trace, field) is None)
    if missing:
        remedy = (
            "record it with --hidden" if "hidden" in missing else "record it with `trace record`"
        )
        raise PredictorError(
            f"predictor {name} needs the field {', '.join(missing)}, which the trace of "
            f"{trace.model} does not have; {remedy}"
        )
    found = Fingerprint.of(trace)
    if not facts.fingerprint.fits(found):
        raise PredictorError(
            f"the trace is of another model than the one given with it: trace {found}; model "
            f"{facts.fingerprint}; give the model that was recorded"
        )
    if not (trace.phase != Phase.PADDING).any():
        raise PredictorError(f"predictor {name}: every row of the trace is padding; record tokens")


def membership(topk: Array, num_experts: int) -> Array:
    """`[..., E]` float32: 1 where an expert is among `topk` `[..., K]`; -1 is nobody."""
    found = np.zeros((*topk.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(found, topk.astype(np.int64), 1.0, axis=-1)  # -1 is the column too many
    return found[..., :-1]


def tokens_of(trace: Trace) -> Array:
    """The rows that are no padding, sequence by sequence and in the order of positions."""
    rows = np.flatnonzero(trace.phase != Phase.PADDING)
    order = np.lexsort((trace.position[rows], trace.sequence_id[rows]))
    ordered: Array = rows[order]
    return ordered


def neighbours(trace: Trace) -> tuple[Array, Array]:
    """Rows of tokens, and the rows of the tokens that follow them in their sequences."""
    rows = tokens_of(trace)
    before, after = rows[:-1], rows[1:]
    is_next = (trace.sequence_id[before] == trace.sequence_id[after]) & (
        trace.position[after] == trace.position[before] + 1
    )
    return before[is_next], after[is_next]


def frequency(trace: Trace) -> Array:
    """`[L, E]` float32: how often each expert is among a token's, never quite 0."""
    topk = trace.topk[trace.phase != Phase.PADDING]
    num_experts = trace.num_experts
    counts = np.stack(
        [
            np.bincount(topk[:, layer].ravel() + 1, minlength=num_experts + 1)[1:]
            for layer in range(trace.num_layers)
        ]
    )
    num_rows = (topk >= 0).any(-1).sum(0)[:, None]
    prior = trace.top_k / num_experts
    return shrunk(counts, num_rows, np.full((1, num_experts), prior))


def shrunk(counts: Array, num_rows: Array, prior: Array) -> Array:
    """Counts out of `num_rows` as probabilities, drawn towards `prior` where rows are few."""
    found: Array = ((counts + PRIOR_ROWS * prior) / (num_rows + PRIOR_ROWS)).astype(np.float32)
    return found
