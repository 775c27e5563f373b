"""What a model is to a cost model: bytes, cached values and operations of each of its parts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

# Bits of one weight, with the scales that stand beside the weights: fp8 has a float32 for each
# block of 128 x 128, mxfp4 an exponent of 8 bits for each 32 values.
FORMAT_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0}
FORMAT_BITS |= {"fp8": 8 + 32 / 128**2, "mxfp4": 4 + 8 / 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer. Parameters count biases and norms; `num_experts` is 0 without experts.

    `cached_values` are kept for each token of the context, of the last `window_tokens` where that
    is set; latent vectors where attention is latent. `score_values` are multiplied for one new
    token with each cached one: all query heads times the widths of a key and of a value.
    """

    attention_parameters: int
    feed_forward_parameters: int  # dense ones, shared experts and the router
    num_experts: int
    top_k: int
    expert_parameters: int
    cached_values: int
    score_values: int
    window_tokens: int | None

    def kept_tokens(self, context_tokens: int) -> int:
        """Of so many, those whose keys and values are still cached."""
        if self.window_tokens is None:
            return context_tokens
        return min(context_tokens, self.window_tokens)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model. Dense weights and cached values take `value_bytes` each; experts `expert_format`.

    `is_packed`: experts lie on disk as `moe-runtime pack` writes them.
    """

    name: str
    family: str
    hidden_size: int
    vocab_size: int
    context_tokens: int
    layers: tuple[LayerSpec, ...]
    embedding_parameters: int
    head_parameters: int  # 0 where the embedding serves as head too
    final_parameters: int  # the norm before the head
    value_bytes: int
    expert_format: str
    is_packed: bool = False
    assumptions: tuple[str, ...] = ()

    @cached_property
    def moe_layers(self) -> tuple[LayerSpec, ...]:
        """The layers with experts."""
        return tuple(layer for layer in self.layers if layer.num_experts)

    @property
    def num_experts(self) -> int:
        """Of all layers."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def experts_per_token(self) -> int:
        """That one token uses, over all layers."""
        return sum(layer.top_k for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Of all experts."""
        return sum(layer.num_experts * layer.expert_parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Of everything else."""
        inside = _total(
            layer.attention_parameters + layer.feed_forward_parameters for layer in self.layers
        )
        return inside + self.embedding_parameters + self.head_parameters + self.final_parameters

    @property
    def num_parameters(self) -> int:
        """As transformers counts them."""
        return self.dense_parameters + self.expert_parameters

    @property
    def expert_bytes(self) -> int:
        """Of the largest expert, as the checkpoint has it."""
        largest = max(layer.expert_parameters for layer in self.layers)
        return math.ceil(largest * FORMAT_BITS[self.expert_format] / 8)

    @property
    def expert_total_bytes(self) -> int:
        """Of all experts, as the checkpoint has them."""
        return math.ceil(self.expert_parameters * FORMAT_BITS[self.expert_format] / 8)

    @property
    def dense_bytes(self) -> int:
        """Of all that is not experts, in memory."""
        return self.dense_parameters * self.value_bytes

    @property
    def lookup_bytes(self) -> int:
        """Of these, an embedding of which a token uses one row, which need not be in memory."""
        return self.embedding_parameters * self.value_bytes if self.head_parameters else 0

    @property
    def step_bytes(self) -> int:
        """Of dense weights that a decode step reads."""
        return self.dense_bytes - self.lookup_bytes

    def kv_bytes(self, context_tokens: int) -> int:
        """Of the attention cache of one sequence of so many tokens, windows respected."""
        return self.value_bytes * _total(
            layer.kept_tokens(context_tokens) * layer.cached_values for layer in self.layers
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """By which the cache grows while no window is full."""
        return self.kv_bytes(1)

    def attention_flops(self, context_tokens: int) -> float:
        """Operations of one token on what is cached: a multiplication and an addition each."""
        return 2.0 * _total(
            layer.score_values * layer.kept_tokens(context_tokens) for layer in self.layers
        )

    @property
    def dense_flops(self) -> float:
        """Operations of one token on dense weights: two a parameter, of the embedding none."""
        return 2.0 * (self.dense_parameters - (self.lookup_bytes // self.value_bytes))

    @property
    def expert_flops(self) -> float:
        """Operations of one token on its experts: two a parameter."""
        return 2.0 * _total(layer.top_k * layer.expert_parameters for layer in self.layers)

    def flops_per_token(self, context_tokens: int) -> dict[str, float]:
        """Operations of one token by part, behind a context of so many tokens."""
        head = self.head_parameters or self.embedding_parameters
        attention = _total(layer.attention_parameters for layer in self.layers)
        feed_forward = _total(layer.feed_forward_parameters for layer in self.layers)
        return {
            "attention_projections": 2.0 * attention,
            "attention_scores": self.attention_flops(context_tokens),
            "feed_forward": 2.0 * feed_forward,
            "experts": self.expert_flops,
            "head": 2.0 * (head + self.final_parameters),
        }

    def active_experts(self, num_tokens: int) -> float:
        """Expected distinct experts that `num_tokens` use together, over all layers.

        Assumes that tokens choose independently and every expert alike, E (1 - (1 - k/E)^T) a
        layer: skewed routing uses fewer.
        """
        return sum(
            layer.num_experts * (1 - (1 - layer.top_k / layer.num_experts) ** num_tokens)
            for layer in self.moe_layers
        )


def _total(numbers: Iterable[int]) -> int:
    return sum(numbers)
