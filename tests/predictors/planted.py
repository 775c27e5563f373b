"""Traces with a pattern that is known, for predictors to find."""

from collections.abc import Callable

import numpy as np

from moe_runtime.predictors.predictor import Fingerprint, Gate, ModelFacts
from moe_runtime.trace import Phase, Trace
from moe_runtime.trace_fields import Array

NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_IDS, WIDTH = 4, 8, 2, 12, 6

# token ids of a sequence `[S]`, the sequence's number, randomness -> `[S, L, K]`
Pattern = Callable[[Array, int, np.random.Generator], Array]


def planted(
    pattern: Pattern,
    *,
    num_sequences: int = 30,
    num_prompt: int = 8,
    num_emitted: int = 12,
    seed: int = 0,
    hidden: bool = False,
    num_ids: int = NUM_IDS,
) -> Trace:
    """Prompts that run as one step each, and tokens decoded one a step."""
    random = np.random.default_rng(seed)
    length = num_prompt + num_emitted
    topk, token_id = [], []
    for sequence in range(num_sequences):
        ids = random.integers(0, num_ids, length)
        token_id.append(ids)
        topk.append(pattern(ids, sequence, random))
    in_prompt = np.arange(length) < num_prompt
    step = np.where(in_prompt, 0, np.arange(length) - num_prompt + 1)
    fields = {
        "topk": np.concatenate(topk),
        "token_id": np.concatenate(token_id),
        "sequence_id": np.repeat(np.arange(num_sequences), length),
        "position": np.tile(np.arange(length), num_sequences),
        "phase": np.tile(np.where(in_prompt, Phase.PREFILL, Phase.DECODE), num_sequences),
        "step": np.concatenate([step + s * (num_emitted + 1) for s in range(num_sequences)]),
        "num_experts": NUM_EXPERTS,
        "model": "planted",
    }
    shape = num_sequences * length, NUM_LAYERS, TOP_K
    fields["weights"] = np.broadcast_to(np.array([0.75, 0.25], np.float16), shape)
    if hidden:
        fields["hidden"] = random.normal(size=(*shape[:2], WIDTH)).astype(np.float16)
    return Trace.of(fields)


def pairs(first: Array, offset: int | Array = 3) -> Array:
    """`[.., K]`: an expert, and another one that goes with it."""
    return np.stack([first % NUM_EXPERTS, (first + offset) % NUM_EXPERTS], axis=-1)


def by_id(ids: Array, sequence: int, random: np.random.Generator) -> Array:
    """What `token_table` can know."""
    return pairs(ids[:, None] * 5 + np.arange(NUM_LAYERS) * 3)


def by_two_ids(ids: Array, sequence: int, random: np.random.Generator) -> Array:
    """What only a reader of the token before can know."""
    before = np.concatenate([ids[:1], ids[:-1]])
    return pairs((ids + 3 * before)[:, None] + np.arange(NUM_LAYERS))


def by_layer(ids: Array, sequence: int, random: np.random.Generator) -> Array:
    """A chain over layers: what `markov` can know once a layer has routed."""
    start = random.integers(0, NUM_EXPERTS, len(ids))
    return pairs(start[:, None] + np.arange(NUM_LAYERS))


def by_two_layers(ids: Array, sequence: int, random: np.random.Generator) -> Array:
    """Each layer is the sum of the two before it: what only order 2 can know."""
    first = random.integers(0, NUM_EXPERTS, (len(ids), NUM_LAYERS))
    for layer in range(2, NUM_LAYERS):
        first[:, layer] = first[:, layer - 1] + first[:, layer - 2]
    return pairs(first, 4)


def by_sequence(ids: Array, sequence: int, random: np.random.Generator) -> Array:
    """Two sorts of sequences, each with experts of its own in every layer."""
    sort = np.full((len(ids), NUM_LAYERS), 4 * (sequence % 2))
    return pairs(sort + random.integers(0, 3, sort.shape), 1)


def at_random(ids: Array, sequence: int, random: np.random.Generator) -> Array:
    return pairs(random.integers(0, NUM_EXPERTS, (len(ids), NUM_LAYERS)))


def gates(seed: int = 0) -> tuple[Gate, ...]:
    """One a layer, with a random matrix."""
    random = np.random.default_rng(seed)
    zeros = np.zeros(NUM_EXPERTS, np.float32)
    return tuple(
        Gate(
            weight=random.normal(size=(NUM_EXPERTS, WIDTH)).astype(np.float32),
            bias=zeros,
            selection_bias=zeros,
            is_sigmoid=False,
        )
        for _ in range(NUM_LAYERS)
    )


def facts_for(trace: Trace) -> ModelFacts:
    """A model for a planted trace: random gates, and embeddings that are all different."""
    return ModelFacts(
        fingerprint=Fingerprint.of(trace),
        embedding=np.random.default_rng(1).normal(size=(NUM_IDS, WIDTH)).astype(np.float32),
        gates=gates(),
    )
