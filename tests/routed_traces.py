"""Random traces whose tokens tend to stay within a family of experts from layer to layer."""

import numpy as np

from moe_runtime.trace import Trace


def routed_trace(
    seed: int = 0,
    *,
    num_sequences: int = 20,
    tokens_each: int = 60,
    num_layers: int = 4,
    num_experts: int = 8,
    top_k: int = 2,
    num_families: int = 4,
    stay: float = 0.8,
    domains: tuple[str, ...] = ("code", "law"),
    model: str = "planted",
    with_token_ids: bool = False,
) -> Trace:
    """Families are other experts in every layer; a token leaves its family with 1 - `stay`."""
    rng = np.random.default_rng(seed)
    family_of = np.random.default_rng(1).permuted(
        np.tile(np.arange(num_experts) % num_families, (num_layers, 1)), axis=1
    )
    num_tokens = num_sequences * tokens_each
    family = rng.integers(0, num_families, num_tokens)
    start = family.copy()
    topk = np.empty((num_tokens, num_layers, top_k), np.int64)
    for layer in range(num_layers):
        leaves = rng.random(num_tokens) > stay
        family = np.where(leaves, rng.integers(0, num_families, num_tokens), family)
        score = rng.random((num_tokens, num_experts)) + (family_of[layer] == family[:, None])
        topk[:, layer] = np.argsort(-score, axis=1)[:, :top_k]
    sequence = np.repeat(np.arange(num_sequences), tokens_each)
    fields = {
        "topk": topk,
        "sequence_id": sequence,
        "domain": np.array(domains)[sequence % len(domains)],
        "model": np.array(model),
    }
    if with_token_ids:
        fields["token_id"] = start * 3 + rng.integers(0, 3, num_tokens)
    return Trace.of(fields, num_experts=num_experts)
