"""What a checkpoint is and what it needs, from its config and its headers alone."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_runtime.integrations.transformers.budget import SlotKind, slot_kinds, smallest_bytes
from moe_runtime.integrations.transformers.choice import choose_maths, computes_compact
from moe_runtime.integrations.transformers.kv_cache import KVCache, measure_kv_cache
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.integrations.transformers.survey import Survey, survey_checkpoint
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.packing import PackedTensor
from moe_runtime.memory.tensor_map import LayerExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """One checkpoint. Where MoE layers differ, `experts_per_layer` and `top_k` are the largest.

    `expert_bytes` counts weights and `slot_bytes` what one takes in memory, alignment included.
    `floor_bytes` is the smallest budget that runs, `hitting_bytes` the smallest with which experts
    of one token can still be there for the next. `kv_cache` is None where it could not be found.
    """

    model: str
    family: str
    architecture: str
    dtype: str  # in which experts compute
    quantisation: str | None  # the format in which they are stored and kept, where it is another
    num_layers: int | None
    num_moe_layers: int
    experts_per_layer: int
    top_k: int
    num_experts: int
    expert_bytes: int
    slot_bytes: int
    expert_total_bytes: int
    dense_bytes: int
    lookup_bytes: int  # of these, embeddings of which a token uses one row
    floor_bytes: int
    hitting_bytes: int
    kv_cache: KVCache | None
    context_tokens: int | None
    num_files: int
    checkpoint_bytes: int
    packed_expert_bytes: int | None  # on disk, where experts are packed
    expert_layout: str  # "per expert", "fused" or "mixed": how the files hold experts

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        found = asdict(self)
        cache = found.pop("kv_cache") or {}
        found["kv_bytes_per_token"] = cache.get("bytes_per_token")
        found["kv_window_bytes_per_token"] = cache.get("window_bytes_per_token")
        found["kv_windows"] = cache.get("windows")
        found["kv_state_bytes"] = cache.get("state_bytes")
        return found


def inspect_model(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Inspection:
    """Look at a folder or hub id. Reads config and headers; builds the model without memory."""
    resolved = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    checkpoint = resolved.open_checkpoint()
    found = survey_checkpoint(
        resolved, checkpoint, dtype=dtype, trust_remote_code=trust_remote_code
    )
    text_config = resolved.config.get_text_config()
    tensor_map = found.tensor_map
    kinds = _slot_kinds(found)
    # Room for one dequantised expert, where none computes from them; packed ones count unpacked.
    room_bytes = kinds[0].room_bytes if tensor_map.is_scaled else 0
    # Not those of `checkpoint`, where scales are part of the weights.
    files = Checkpoint.open(resolved.folder).files()
    return Inspection(
        model=str(model),
        family=str(resolved.config.model_type),
        architecture=type(found.model).__name__,
        dtype=str(tensor_map.dtype).removeprefix("torch."),
        quantisation=", ".join(tensor_map.formats()) or None,
        num_layers=getattr(text_config, "num_hidden_layers", None),
        num_moe_layers=len(found.sites),
        experts_per_layer=max(site.num_experts for site in found.sites),
        top_k=max(site.top_k for site in found.sites),
        num_experts=tensor_map.num_experts,
        expert_bytes=max(layer.layout.weight_bytes for layer in tensor_map.layers),
        slot_bytes=tensor_map.slot_bytes,
        expert_total_bytes=tensor_map.num_experts * tensor_map.slot_bytes + room_bytes,
        dense_bytes=found.dense_bytes,
        lookup_bytes=found.lookup_bytes,
        floor_bytes=smallest_bytes(kinds, found.sites),
        hitting_bytes=sum(s.top_k for s in found.sites) * tensor_map.slot_bytes + room_bytes,
        kv_cache=measure_kv_cache(found),
        context_tokens=getattr(text_config, "max_position_embeddings", None),
        num_files=len(files),
        checkpoint_bytes=sum(file.stat().st_size for file in files),
        packed_expert_bytes=_packed_bytes(checkpoint),
        expert_layout=_expert_layout(tensor_map.layers),
    )


def _slot_kinds(found: Survey) -> list[SlotKind]:
    """What slots may hold under 'auto'."""
    tensor_map = found.tensor_map
    if not (tensor_map.is_packed or tensor_map.is_scaled):
        return slot_kinds(tensor_map, computes_compact=False)
    maths = choose_maths(
        found.sites, found.dtypes, torch.device("cpu"), exact=False, layers=tensor_map.layers
    )
    return slot_kinds(tensor_map, computes_compact=computes_compact(maths, tensor_map.layers))


def _packed_bytes(checkpoint: Checkpoint) -> int | None:
    packed = [tensor for tensor in checkpoint.values() if isinstance(tensor, PackedTensor)]
    return sum(run.num_bytes for tensor in packed for run in tensor.runs) if packed else None


def _expert_layout(layers: Sequence[LayerExperts]) -> str:
    """Whether the files hold a tensor for each expert, or one for many."""
    kinds = set()
    for layer in layers:
        for spec in layer.layout.parameters:
            for source in {box.source for box in layer.parameters[spec.name].boxes}:
                # A file tensor with more elements than the whole parameter of one expert.
                holds_one = math.prod(source.shape) <= math.prod(spec.shape)
                kinds.add("per expert" if holds_one else "fused")
    return kinds.pop() if len(kinds) == 1 else "mixed"
