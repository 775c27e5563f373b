"""transformers under DeepSpeed ZeRO-3 with its parameters offloaded to CPU memory."""

import os
import socket
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.decoder import Decoder
from moe_runtime.measure.peers.device_memory import cap_device_memory, device_facts


def load(job: Job) -> tuple[Decoder, dict[str, Any]]:
    """One rank; every module's parameters are gathered before it runs and let go after."""
    device = cap_device_memory(job)
    _join_a_world_of_one(device)
    config = _config(device)
    dtype = getattr(torch, job.dtype)
    keep = HfDeepSpeedConfig(config)  # transformers looks for it while it loads
    with quiet_transformers(lambda done, total: None):
        model = AutoModelForCausalLM.from_pretrained(
            job.checkpoint, dtype=dtype, experts_implementation="eager", local_files_only=True
        )
    del keep
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.module.eval()
    _repair_rotary_frequencies(engine.module)
    facts = {
        "repaired": "rotary inv_freq, which ZeRO-3 casts to bfloat16",
        **device_facts(device),
    }
    return Decoder(engine.module, job), facts


def _config(device: torch.device) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": device.type == "cuda"},
        },
    }


def _join_a_world_of_one(device: torch.device) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )


def _repair_rotary_frequencies(model: PreTrainedModel) -> None:
    """Compute `inv_freq` anew in float32: in bfloat16 positions drift apart after a few tokens."""
    for module in model.modules():
        if "inv_freq" in module._buffers:
            fresh = type(module)(module.config)
            for name, value in fresh._buffers.items():
                setattr(module, name, value)
