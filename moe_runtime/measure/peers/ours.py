"""moe_runtime itself, as a contestant."""

import warnings
from typing import Any

import torch

from moe_runtime.engine import ExpertEngine
from moe_runtime.integrations.transformers.handle import handle
from moe_runtime.integrations.transformers.load import load as load_offloaded
from moe_runtime.integrations.transformers.progress import quiet_transformers
from moe_runtime.measure.bench.job import Job
from moe_runtime.measure.peers.decoder import Decoder
from moe_runtime.measure.peers.device_memory import cap_device_memory, device_facts
from moe_runtime.tiered_engine import TieredEngine

# What a process takes beyond dense weights and slots: buffers of torch and of the loader,
# activations, the KV cache. On OLMoE shapes 32 MiB survive the cap and 24 do not.
BUFFER_BYTES = 64 * 2**20
_TIER_COUNTERS = ("misses_copied", "misses_computed", "bytes_copied", "syncs", "layers")


def load(job: Job) -> tuple[Decoder, dict[str, Any]]:
    """Slots fill what the memory leaves beside dense weights and `BUFFER_BYTES`."""
    device = cap_device_memory(job)
    limits: dict[int | str, int | str] | None = None
    if job.memory_bytes is not None and device.type == "cpu":
        limits = {"cpu": max(0, job.memory_bytes - BUFFER_BYTES)}
    elif job.memory_bytes is not None:
        limits = {device.index or 0: job.memory_bytes}
    with quiet_transformers(lambda done, total: None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few slots are the point
        model = load_offloaded(
            job.checkpoint,
            expert_memory=1.0,
            max_memory=limits,
            policy=job.policy,
            exact=job.exact,
            predictor=job.predictor,
            warm_start=False,
            device_map=device,
            dtype=getattr(torch, job.dtype),
        )
    owner = handle(model)
    if owner.budget.holds_all or isinstance(owner.engine, TieredEngine):
        _read_all_experts(owner.engine)  # with tiers into host memory, as far as it goes

    def count() -> dict[str, int]:
        found = owner.report()
        counted = {name: found["cache"][name] for name in ("hits", "misses", "bytes_read")}
        return counted | {name: found["tiers"][name] for name in _TIER_COUNTERS if found["tiers"]}

    report = owner.report()
    facts = {
        "slots": report["cache"]["slots"],
        "slot_bytes": report["cache"]["slot_bytes"],
        "policy": report["cache"]["policy"],
        "experts": report["settings"]["experts"],
        "direct_reads": report["settings"]["direct_reads"],
        **device_facts(device),
    }
    if report["tiers"]:
        facts |= {name: report["tiers"][name] for name in ("miss", "host_slots", "host_pinned")}
    return Decoder(model, job, count=count), facts


def _read_all_experts(engine: ExpertEngine | TieredEngine) -> None:
    """A resident model has read everything before its first token."""
    for layer, experts in enumerate(engine.tensor_map.layers):
        with engine.open_layer(layer, range(experts.num_experts)) as access:
            for expert in range(experts.num_experts):
                access.weights(expert)
                access.release(expert)
