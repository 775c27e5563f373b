"""Reads a transformers config into a ModelSpec, without importing transformers or torch.

Fields are read by the names that families give them; what is rare is a table of families below.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.model_preset import preset_file, preset_names, read_model_preset
from moe_runtime.model_spec import FORMAT_BITS, LayerSpec, ModelSpec

_EXPERT_COUNTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "ffn_config.moe_num_experts",
)
_TOP_K = ("num_experts_per_tok", "ffn_config.moe_top_k")
_EXPERT_WIDTHS = ("moe_intermediate_size", "ffn_config.ffn_hidden_size", "intermediate_size")
# Families with a bias in the experts and the router, and one value a head that scores compete with.
_BIASED_EXPERTS = frozenset({"gpt_oss"})
# Norms with a bias beside the scale.
_BIASED_NORMS = frozenset({"phimoe"})
# Norms of queries and keys: of one head, or of all heads together.
_HEAD_NORMS = frozenset({"qwen3_moe"})
_WIDE_NORMS = frozenset({"olmoe"})
# Without a bias behind attention, where queries, keys and values have one.
_NO_OUTPUT_BIAS = frozenset({"qwen2_moe"})
_PLAIN = frozenset({"mixtral", "deepseek_v2", "deepseek_v3", "dbrx"})
_KNOWN = _BIASED_EXPERTS | _BIASED_NORMS | _HEAD_NORMS | _WIDE_NORMS | _NO_OUTPUT_BIAS | _PLAIN
# Sliding and full attention alternate, the first layer slides, where `layer_types` does not say.
_ALTERNATING = frozenset({"gpt_oss"})
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTISED = {"mxfp4": "mxfp4", "fp8": "fp8"}  # transformers' quant_method: what experts are in
_PACKED = "packing.json"


def read_spec(model: str) -> ModelSpec:
    """Of a preset's name or a folder with a config.json. Raises an error with the remedy."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return spec_of_folder(folder)
    if model not in preset_names() and "/" in model:
        raise CheckpointError(
            f"{model!r} is no folder; give a folder with a config.json, or one of the presets "
            f"{', '.join(preset_names())}"
        )
    preset = read_model_preset(preset_file(model))
    fields = {**preset.fields, "model_type": preset.model_type}
    return spec_of_fields(model, fields, expert_format=preset.expert_format)


def spec_of_folder(folder: Path) -> ModelSpec:
    """Of the config.json in `folder`. Raises CheckpointError and UnsupportedModelError."""
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}; give the folder of a transformers model"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not sound JSON: {error}; download it again") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} must hold an object; download it again")
    inner = fields.get("text_config")
    if isinstance(inner, dict):
        fields = {**fields, **inner}
    is_packed = (folder / _PACKED).is_file()
    return spec_of_fields(folder.resolve().name, fields, is_packed=is_packed)


def spec_of_fields(
    name: str,
    fields: Mapping[str, Any],
    *,
    expert_format: str | None = None,
    is_packed: bool = False,
) -> ModelSpec:
    """Of the fields of a transformers config, `model_type` among them."""
    return _Reader(name, fields).spec(expert_format, is_packed=is_packed)


class _Reader:
    """One config."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name = name
        self.fields = fields
        self.family = str(fields.get("model_type", "unknown"))
        self.hidden = self._count("hidden_size", "d_model")
        self.num_heads = self._count("num_attention_heads", "n_heads")
        self.num_layers = self._count("num_hidden_layers", "n_layers")
        self.num_key_heads = self._count(
            "num_key_value_heads", "attn_config.kv_n_heads", default=self.num_heads
        )
        self.head_dim = self._count("head_dim", default=self.hidden // self.num_heads)

    def spec(self, expert_format: str | None, *, is_packed: bool) -> ModelSpec:
        vocab_size = self._count("vocab_size")
        is_tied = bool(self._value("tie_word_embeddings", default=False))
        head = vocab_size * self.hidden + (vocab_size if self._value("lm_head_bias") else 0)
        dtype = str(self._value("dtype", "torch_dtype", default="bfloat16"))
        if dtype not in _VALUE_BYTES:
            raise UnsupportedModelError(
                f"{self.name} is in dtype {dtype!r}; it must be one of {', '.join(_VALUE_BYTES)}"
            )
        layers = tuple(self._layer(index) for index in range(self.num_layers))
        if not any(layer.num_experts for layer in layers):
            raise UnsupportedModelError(
                f"{self.name} has no layers with experts, so there is nothing to plan; give a "
                "Mixture-of-Experts model"
            )
        assumptions = []
        if self.family not in _KNOWN:
            assumptions.append(
                f"{self.family} is counted as a common decoder: norms and biases of its own are "
                "not counted, which are far below 1 % of a model"
            )
        return ModelSpec(
            name=self.name,
            family=self.family,
            hidden_size=self.hidden,
            vocab_size=vocab_size,
            context_tokens=self._count("max_position_embeddings", "max_seq_len", default=2**20),
            layers=layers,
            embedding_parameters=vocab_size * self.hidden,
            head_parameters=0 if is_tied else head,
            final_parameters=self._norm(),
            value_bytes=_VALUE_BYTES[dtype],
            expert_format=expert_format or self._stored_format() or dtype,
            is_packed=is_packed,
            assumptions=tuple(assumptions),
        )

    def _layer(self, index: int) -> LayerSpec:
        num_experts, top_k, width = 0, 0, 0
        feed_forward = 0
        if self._has_experts(index):
            num_experts = self._count(*_EXPERT_COUNTS)
            top_k = self._count(*_TOP_K)
            if top_k > num_experts:
                raise UnsupportedModelError(
                    f"{self.name} uses {top_k} of {num_experts} experts a token; its config is "
                    "damaged: download it again"
                )
            width = self._count(*_EXPERT_WIDTHS)
            feed_forward += num_experts * self.hidden  # the router
            if self.family in _BIASED_EXPERTS:
                feed_forward += num_experts
            shared = self._shared_width(width)
            feed_forward += 3 * self.hidden * shared
            if self._value("shared_expert_intermediate_size"):
                feed_forward += self.hidden  # the gate of the shared expert
        else:
            feed_forward += 3 * self.hidden * self._count("intermediate_size")
        expert = 3 * self.hidden * width
        if self.family in _BIASED_EXPERTS:
            expert += 2 * width + self.hidden
        attention, cached, scores = self._attention()
        return LayerSpec(
            attention_parameters=attention + 2 * self._norm(),
            feed_forward_parameters=feed_forward,
            num_experts=num_experts,
            top_k=top_k,
            expert_parameters=expert if num_experts else 0,
            cached_values=cached,
            score_values=scores,
            window_tokens=self._window(index),
        )

    def _has_experts(self, index: int) -> bool:
        if self._value(*_EXPERT_COUNTS) is None:
            return False
        if index < int(self._value("first_k_dense_replace", default=0)):
            return False
        if index in (self._value("mlp_only_layers") or ()):
            return False
        step = int(self._value("decoder_sparse_step", "moe_layer_freq", default=1) or 1)
        if self._value("decoder_sparse_step"):
            return (index + 1) % step == 0
        return index % step == 0

    def _shared_width(self, width: int) -> int:
        """Of the experts that every token uses, together."""
        shared = self._value("shared_expert_intermediate_size")
        if shared:
            return int(shared)
        return width * int(self._value("n_shared_experts", "num_shared_experts", default=0) or 0)

    def _attention(self) -> tuple[int, int, int]:
        """Parameters without the layer's norms; values cached and multiplied a token."""
        if self._value("kv_lora_rank"):
            return self._latent_attention()
        width, key_width = self.num_heads * self.head_dim, self.num_key_heads * self.head_dim
        parameters = self.hidden * (width + 2 * key_width) + width * self.hidden
        if self._value("attention_bias", "qkv_bias", default=self.family in _NO_OUTPUT_BIAS):
            parameters += width + 2 * key_width
            parameters += 0 if self.family in _NO_OUTPUT_BIAS else self.hidden
        if self.family in _BIASED_EXPERTS:
            parameters += self.num_heads
        if self.family in _HEAD_NORMS:
            parameters += 2 * self.head_dim
        if self.family in _WIDE_NORMS:
            parameters += width + key_width
        return parameters, 2 * key_width, 2 * width

    def _latent_attention(self) -> tuple[int, int, int]:
        """DeepSeek-V2's (arXiv 2405.04434, section 2.1): latent vectors are what is cached."""
        rank, rope = self._count("kv_lora_rank"), self._count("qk_rope_head_dim")
        key, value = self._count("qk_nope_head_dim") + rope, self._count("v_head_dim")
        query_rank = self._value("q_lora_rank")
        heads = self.num_heads
        if query_rank:
            queries = self.hidden * query_rank + query_rank + query_rank * heads * key
        else:
            queries = self.hidden * heads * key
        parameters = (
            queries
            + self.hidden * (rank + rope)
            + rank  # its norm
            + rank * heads * (key - rope + value)
            + heads * value * self.hidden
        )
        return parameters, rank + rope, heads * (key + value)

    def _window(self, index: int) -> int | None:
        window = self._value("sliding_window")
        if not window or self._value("use_sliding_window") is False:
            return None
        kinds = self._value("layer_types")
        if kinds is not None:
            return int(window) if "sliding" in str(kinds[index]) else None
        if self.family in _ALTERNATING and index % 2:
            return None
        return int(window)

    def _norm(self) -> int:
        """Parameters of one norm over the hidden state. DBRX's has no bias, as most."""
        return self.hidden * (2 if self.family in _BIASED_NORMS else 1)

    def _stored_format(self) -> str | None:
        settings = self.fields.get("quantization_config")
        if not isinstance(settings, Mapping):
            return None
        method = str(settings.get("quant_method"))
        if method not in _QUANTISED:
            raise UnsupportedModelError(
                f"{self.name} is quantised with {method}; use a checkpoint in "
                f"{', '.join(FORMAT_BITS)}"
            )
        return _QUANTISED[method]

    def _value(self, *names: str, default: Any = None) -> Any:
        """Of the first of `names` that is set; a dot leads into a nested config."""
        for name in names:
            outer, _, inner = name.rpartition(".")
            fields = self.fields.get(outer) if outer else self.fields
            if isinstance(fields, Mapping) and fields.get(inner) is not None:
                return fields[inner]
        return default

    def _count(self, *names: str, default: int | None = None) -> int:
        found = self._value(*names, default=default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise UnsupportedModelError(
                f"{self.name}: {names[0]} ({found!r}) must be a whole number from 1 on; "
                "check its config"
            )
        return found
