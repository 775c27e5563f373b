"""What a gate chooses, computed from its numbers.

T rows, K experts a token, E experts a layer, D model dim.
"""

import numpy as np

from moe_runtime.predictors.logistic import sigmoid
from moe_runtime.predictors.predictor import Gate
from moe_runtime.trace_fields import Array


def gate_choice(gate: Gate, hidden: Array) -> tuple[Array, Array]:
    """`[T, E]` twice: the value by which the gate ranks experts, and 1 where their group is used.

    The value is the logit for softmax gates, score + selection bias for sigmoid ones.
    """
    logits: Array = hidden.astype(np.float32) @ gate.weight.T + gate.bias
    if gate.is_sigmoid:
        value: Array = sigmoid(logits) + gate.selection_bias
    else:
        value = logits + gate.selection_bias
    if gate.groups_used == gate.num_groups:
        return value, np.ones_like(value)
    grouped = value.reshape(len(value), gate.num_groups, -1)
    worth = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
    best = np.argsort(-worth, axis=-1, kind="stable")[:, : gate.groups_used]
    is_used = np.zeros((len(value), gate.num_groups), np.float32)
    np.put_along_axis(is_used, best, 1.0, axis=-1)
    return value, np.repeat(is_used, grouped.shape[-1], axis=-1)


def gate_topk(gate: Gate, hidden: Array, top_k: int) -> Array:
    """`[T, K]`: what the gate chooses, best first."""
    value, is_used = gate_choice(gate, hidden)
    ranked = np.argsort(-np.where(is_used > 0, value, -np.inf), axis=-1, kind="stable")
    chosen: Array = ranked[:, :top_k].astype(np.int16)
    return chosen
