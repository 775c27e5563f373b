"""Counts which experts each token id uses, layer by layer.

N tokens, L MoE layers, K experts a token, E experts a layer, V token ids.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.trace import Trace

Array = np.ndarray[Any, Any]

_MAX_BYTES = 4 * 2**30


def token_expert_counts(traces: Sequence[Trace]) -> Array | None:
    """`[L, V, E]` float32, V one above the largest id; None where a trace has no token ids.

    Rows of unknown id (-1) and missing experts count nowhere. Raises TraceError where the counts
    would take more than 4 GiB.
    """
    first = traces[0]
    top, L, E = -1, first.num_layers, first.num_experts
    for trace in traces:
        if trace.token_id is None:
            return None
        top = max(top, int(trace.token_id.max()))
    V = top + 1
    if L * V * E * 4 > _MAX_BYTES:
        raise TraceError(
            f"counts of {E} experts in {L} layers for {V} token ids would take "
            f"{L * V * E * 4 / 2**30:.1f} GiB, more than 4; use a trace of a smaller vocabulary"
        )
    counts = np.zeros((L, V, E), np.float32)
    for trace in traces:
        assert trace.token_id is not None
        id_N = trace.token_id.astype(np.int64)
        for layer in range(L):
            expert_NK = trace.topk[:, layer].astype(np.int64)
            known = (expert_NK >= 0) & (id_N[:, None] >= 0)
            flat = (id_N[:, None] * E + expert_NK)[known]
            counts[layer] += np.bincount(flat, minlength=V * E).reshape(V, E)
    return counts
