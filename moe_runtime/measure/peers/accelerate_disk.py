"""transformers with accelerate's disk offload: experts on disk, the rest in memory."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.integrations.transformers.sites import find_sites
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.decoder import Decoder

# Of eager, grouped_mm and batched_mm the best when memory is capped, with grouped_mm level.
_EXPERTS_IMPLEMENTATION = "eager"


def load(job: Job) -> tuple[Decoder, dict[str, Any]]:
    """accelerate maps files with all experts of a layer; those computed with are paged in."""
    dtype = getattr(torch, job.dtype)
    config = AutoConfig.from_pretrained(job.checkpoint, local_files_only=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    device_map = experts_on(skeleton, "disk", rest="cpu")
    with quiet_transformers(lambda done, total: None):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            job.checkpoint,
            dtype=dtype,
            experts_implementation=_EXPERTS_IMPLEMENTATION,
            local_files_only=True,
            device_map=device_map,
            offload_folder=str(job.scratch),
        )
    return Decoder(model, job), {"experts": _EXPERTS_IMPLEMENTATION}


def experts_on(model: nn.Module, place: str, *, rest: str) -> dict[str, str]:
    """A device map with every experts module on `place` and all else on `rest`."""
    experts = {site.name for site in find_sites(model)}

    def places(name: str, module: nn.Module) -> dict[str, str]:
        if name in experts:
            return {name: place}
        prefix = f"{name}." if name else ""
        if not any(inner.startswith(prefix) for inner in experts):
            return {name: rest}
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found = {prefix + parameter: rest for parameter, _ in own}
        for child, inside in module.named_children():
            found |= places(prefix + child, inside)
        return found

    return places("", model)
