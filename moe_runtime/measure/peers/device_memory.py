"""Equal GPU memory for every contestant: what torch may allocate in its process."""

from typing import Any

import torch

from moe_runtime.errors import ContestantError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.bench.job import Job

# Over weights and slots: activations, the KV cache, workspaces of matrix products.
SLACK_BYTES = 2**30


def cap_device_memory(job: Job) -> torch.device:
    """The job's device; on a GPU torch's allocator gets the job's memory and `SLACK_BYTES`."""
    device = torch.device(job.device)
    if device.type == "cuda" and job.memory_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        wanted = job.memory_bytes + SLACK_BYTES
        if wanted > total:
            raise ContestantError(
                f"{format_bytes(wanted)} of {format_bytes(total)} on {job.device}", is_memory=True
            )
        torch.cuda.set_per_process_memory_fraction(wanted / total, device)
    return device


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the process holds on a GPU once it has loaded."""
    if device.type != "cuda":
        return {}
    return {"device_bytes": torch.cuda.memory_allocated(device)}
