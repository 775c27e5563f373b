"""Random routing traces, and the slow and obvious way to read them."""

from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from moe_runtime.expert import ExpertKey
from moe_runtime.trace import Trace

Visit = tuple[int, list[ExpertKey]]  # step, keys of one layer, ascending


def make_trace(
    seed: int,
    *,
    num_tokens: int,
    num_layers: int = 3,
    num_experts: int = 8,
    top_k: int = 2,
    rows_per_step: int = 1,
    missing: float = 0.0,
) -> Trace:
    """Experts drawn unevenly; steps of 1 to `rows_per_step` rows, numbered with gaps."""
    rng = np.random.default_rng(seed)
    scores = rng.random((num_tokens, num_layers, num_experts)) * np.linspace(1, 2, num_experts)
    topk = np.argsort(-scores, axis=-1)[..., :top_k].astype(np.int16)
    topk[rng.random(topk.shape) < missing] = -1
    topk[0, 0, 0] = topk[0, 0].max() if topk[0, 0].max() >= 0 else 0
    topk[0, 0, 1:] = -1  # so that not all are missing, and none is there twice
    sizes = rng.integers(1, rows_per_step + 1, num_tokens)
    step = np.repeat(np.cumsum(rng.integers(1, 4, num_tokens)), sizes)[:num_tokens]
    return Trace.of({"topk": topk, "step": step}, num_experts=num_experts)


traces = st.builds(
    make_trace,
    st.integers(0, 2**32 - 1),
    num_tokens=st.integers(1, 25),
    num_layers=st.integers(1, 4),
    num_experts=st.integers(4, 9),
    top_k=st.integers(1, 4),
    rows_per_step=st.sampled_from([1, 1, 6]),
    missing=st.sampled_from([0.0, 0.3, 0.9]),
)


def visits_of(trace: Trace) -> Iterator[Visit]:
    """Step by step, layer by layer, the distinct experts of the step's rows."""
    for step in sorted(set(trace.step.tolist())):
        rows = trace.topk[trace.step == step]
        for layer in range(trace.num_layers):
            experts = sorted(set(rows[:, layer].ravel().tolist()) - {-1})
            if experts:
                yield step, [ExpertKey(layer, expert) for expert in experts]
