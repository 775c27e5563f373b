"""transformers with moe-policylang: slots for experts on the GPU, all experts in host memory."""

from typing import Any

import moe_policylang
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.sites import find_sites
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.accelerate_disk import experts_on
from moe_runtime.measure.peers.decoder import Decoder
from moe_runtime.measure.peers.device_memory import cap_device_memory, device_facts


def load(job: Job) -> tuple[Decoder, dict[str, Any]]:
    """An LRU cache of as many experts a layer as the memory leaves beside dense weights."""
    device, dtype = cap_device_memory(job), getattr(torch, job.dtype)
    with quiet_transformers(lambda done, total: None):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            job.checkpoint, dtype=dtype, local_files_only=True
        )
    capacity = experts_a_layer(model, job.memory_bytes)
    for name, place in experts_on(model, "cpu", rest=str(device)).items():
        owner, _, last = name.rpartition(".")
        held = getattr(model.get_submodule(owner), last)
        if place != "cpu":
            moved = held.to(place)
            if isinstance(held, torch.nn.Parameter):
                held.data = moved.data
            elif isinstance(held, torch.Tensor):
                setattr(model.get_submodule(owner), last, moved)
    policy = f"policy bench {{ cache {{ capacity = {capacity} eviction = lru }} }}"
    moe_policylang.attach(model, policy)
    return Decoder(model, job), {"experts": policy, **device_facts(device)}


def experts_a_layer(model: torch.nn.Module, memory_bytes: int | None) -> int:
    """Slots of each layer: what memory leaves beside dense weights, shared evenly; None: all."""
    sites = find_sites(model)
    expert_bytes = sum(p.nbytes for site in sites for p in site.module.parameters())
    num_experts = max(site.num_experts for site in sites)
    if memory_bytes is None:
        return num_experts
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    dense_bytes = sum(tensor.nbytes for tensor in tensors.values()) - expert_bytes
    share = (memory_bytes - dense_bytes) / expert_bytes
    return max(1, min(num_experts, int(share * num_experts)))
