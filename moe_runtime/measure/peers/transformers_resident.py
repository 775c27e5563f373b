"""Unmodified transformers with all experts in memory: also the reference of every gate."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.decoder import Decoder
from moe_runtime.measure.peers.device_memory import device_facts

NO_EXPERTS = "no_experts"


def load(job: Job) -> tuple[Decoder, dict[str, Any]]:
    """Its variants are experts implementations of transformers, and one that computes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NO_EXPERTS, _no_experts)
    with quiet_transformers(lambda done, total: None):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            job.checkpoint,
            dtype=getattr(torch, job.dtype),
            experts_implementation="eager",
            local_files_only=True,
        )
    device = torch.device(job.device)
    model.to(device)  # type: ignore[arg-type]  # PreTrainedModel.to is mistyped
    return Decoder(model, job, choose=model.set_experts_implementation), device_facts(device)


def _no_experts(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    return torch.zeros_like(hidden_states)
