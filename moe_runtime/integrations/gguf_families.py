"""How llama.cpp runs each architecture of transformers that can be written as GGUF."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from moe_runtime.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How llama.cpp runs one architecture of transformers."""

    architecture: str  # GGUF's name
    fixed: Mapping[str, Any]  # config fields, and the only value that llama.cpp computes with
    expert_ffn: str  # the config field with the width of an expert
    rotates_pairs: bool = False  # q and k must be reordered: neighbours rotate together
    has_latent_attention: bool = False


_EVERYWHERE = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False}

FAMILIES = {
    "mixtral": Family(
        architecture="llama",
        fixed={"sliding_window": None},
        expert_ffn="intermediate_size",
        rotates_pairs=True,
    ),
    "olmoe": Family(
        architecture="olmoe",
        fixed={"norm_topk_prob": False, "clip_qkv": None},
        expert_ffn="intermediate_size",
    ),
    "qwen3_moe": Family(
        architecture="qwen3moe",
        fixed={
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "sliding_window": None,
        },
        expert_ffn="moe_intermediate_size",
    ),
    "deepseek_v2": Family(
        architecture="deepseek2",
        fixed={"topk_method": "greedy", "mlp_bias": False},
        expert_ffn="moe_intermediate_size",
        has_latent_attention=True,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """How llama.cpp runs this model; UnsupportedModelError where it would compute otherwise."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"{config.model_type} cannot be written as GGUF here; these can: {', '.join(FAMILIES)}"
        )
    for field, wanted in (_EVERYWHERE | dict(family.fixed)).items():
        found = getattr(config, field, wanted)
        if found != wanted:
            raise UnsupportedModelError(
                f"llama.cpp runs {config.model_type} with {field} = {wanted} only, and this "
                f"checkpoint's config has {found}; leave llama.cpp out"
            )
    rope = config.rope_parameters
    is_plain = rope["rope_type"] == "default"
    scale = rope.get("mscale_all_dim")
    is_latent_yarn = (
        family.has_latent_attention
        and rope["rope_type"] == "yarn"
        and bool(scale)
        and rope.get("mscale") == scale
    )
    if not is_plain and not is_latent_yarn:
        raise UnsupportedModelError(
            f"the rotary embedding of this {config.model_type} checkpoint cannot be written as "
            f"GGUF here: {dict(rope)} must be of type default, or DeepSeek's yarn with equal "
            "mscale and mscale_all_dim; leave llama.cpp out"
        )
    return family


def describe(gguf: Any, writer: Any, family: Family, config: PreTrainedConfig) -> None:
    """Shapes and constants, under the names that llama.cpp looks for."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(getattr(config, family.expert_ffn))
    if family.has_latent_attention:
        _describe_latent_attention(gguf, writer, config)
        return
    head_width = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)


def _describe_latent_attention(gguf: Any, writer: Any, config: PreTrainedConfig) -> None:
    """DeepSeek-V2 (arXiv 2405.04434): llama.cpp runs its attention as one key head of latents."""
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow", 1.0))
        # llama.cpp divides this key by 0.1 again.
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
