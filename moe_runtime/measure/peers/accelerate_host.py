"""transformers with accelerate's CPU offload: experts in host memory, copied for every layer."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.sites import find_sites
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.accelerate_disk import experts_on
from moe_runtime.measure.peers.decoder import Decoder
from moe_runtime.measure.peers.device_memory import cap_device_memory, device_facts

_EXPERTS_IMPLEMENTATION = "grouped_mm"


def load(job: Job) -> tuple[Decoder, dict[str, Any]]:
    """Experts of the first layers stay on the device while there is memory, the others on the CPU.

    accelerate copies a layer's experts whole, so room for those of one layer is kept.
    """
    device, dtype = cap_device_memory(job), getattr(torch, job.dtype)
    config = AutoConfig.from_pretrained(job.checkpoint, local_files_only=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    resident = resident_experts(skeleton, job.memory_bytes)
    where = {name: str(device) for name in resident}
    with quiet_transformers(lambda done, total: None):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            job.checkpoint,
            dtype=dtype,
            experts_implementation=_EXPERTS_IMPLEMENTATION,
            local_files_only=True,
            device_map=experts_on(skeleton, "cpu", rest=str(device)) | where,
        )
    facts = {
        "experts": _EXPERTS_IMPLEMENTATION,
        "resident_layers": len(resident),
        **device_facts(device),
    }
    return Decoder(model, job), facts


def resident_experts(skeleton: nn.Module, memory_bytes: int | None) -> list[str]:
    """Experts modules that fit beside dense weights and one layer on its way; None: all of them."""
    sites = find_sites(skeleton)
    sizes = {site.name: sum(p.nbytes for p in site.module.parameters()) for site in sites}
    if memory_bytes is None:
        return list(sizes)
    tensors = {id(tensor): tensor for tensor in (*skeleton.parameters(), *skeleton.buffers())}
    dense_bytes = sum(tensor.nbytes for tensor in tensors.values()) - sum(sizes.values())
    left, found = memory_bytes - dense_bytes - max(sizes.values()), []
    for name, num_bytes in sizes.items():
        left -= num_bytes
        if left < 0:
            break
        found.append(name)
    return found
