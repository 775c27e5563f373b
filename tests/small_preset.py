"""The presets shrunk to a few hundred kilobytes, each with its family's every part."""

from dataclasses import replace

from moe_runtime.measure.bench.presets import Preset, load_preset

NAMES = ("deepseek-v2-lite", "mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b")

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_OWN_SIZES = {
    "deepseek-v2-lite": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
    },
    "mixtral-8x7b": {"num_key_value_heads": 2},
    "olmoe-1b-7b": {"num_key_value_heads": 4},
    "qwen3-30b-a3b": {"num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 32},
}


def small_preset(name: str) -> Preset:
    """Three layers of eight experts, three a token."""
    preset = load_preset(name)
    small = replace(preset, fields={**preset.fields, **_SIZES, **_OWN_SIZES[name]})
    return small.changed(num_layers=3, num_experts=8, top_k=3)
