"""Where the bytes of a plan go: dense weights, cache, workspace, reserve and expert slots."""

import math

from moe_runtime.perf.latency import ExpertForm
from moe_runtime.perf.plan import MemoryUse, PlanRequest

# Kept free, as load() does under expert_memory="auto".
_RESERVE_BYTES, _RESERVE_SHARE = 512 * 2**20, 0.1
# Copies of one token's hidden state that a forward holds at once; prefill's share of memory.
_STATES, _WORKSPACE_SHARE = 8, 0.05
_LOGIT_BYTES = 4


def limit_bytes(request: PlanRequest) -> int:
    """Bytes that may be used where experts are computed."""
    if request.memory_bytes is not None:
        return request.memory_bytes
    gpus = request.hardware.gpus
    return gpus[0].memory_bytes if gpus else request.hardware.memory.available_bytes


def _reserve(limit_bytes: int) -> int:
    return max(_RESERVE_BYTES, int(_RESERVE_SHARE * limit_bytes))


def use_memory(request: PlanRequest, form: ExpertForm, batch: int) -> MemoryUse | int:
    """Where bytes go with as many slots as fit; or the least that would have to be there."""
    spec = request.spec
    has_gpu = bool(request.hardware.gpus)
    limit = limit_bytes(request)
    dense = spec.dense_bytes if has_gpu else spec.step_bytes
    kv_bytes = batch * spec.kv_bytes(request.prompt_tokens + request.new_tokens)
    state = _STATES * spec.hidden_size * spec.value_bytes
    micro = micro_batch(request, batch)
    workspace = micro * request.prompt_tokens * state + batch * spec.vocab_size * _LOGIT_BYTES
    reserve = _reserve(limit)
    floor = math.ceil(max(layer.top_k for layer in spec.layers) * form.slot_bytes)
    needed = dense + kv_bytes + workspace
    room = limit - reserve - needed
    wanted = room
    if request.expert_memory_bytes is not None:
        wanted = min(room, request.expert_memory_bytes)
    if wanted < floor:
        least = needed + floor
        return max(least + _RESERVE_BYTES, math.ceil(least / (1 - _RESERVE_SHARE)))
    slots = min(int(wanted // form.slot_bytes), spec.num_experts)
    expert_bytes = math.ceil(slots * form.slot_bytes)
    return MemoryUse(
        limit_bytes=limit,
        dense_bytes=dense,
        expert_bytes=expert_bytes,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace,
        reserve_bytes=reserve,
        free_bytes=room - expert_bytes,
        host_expert_bytes=_host_bytes(request, form, slots) if has_gpu else 0,
    )


def _host_bytes(request: PlanRequest, form: ExpertForm, num_slots: int) -> int:
    """For experts that the GPU has no slot for."""
    memory = request.hardware.memory
    limit = request.host_memory_bytes
    limit = memory.available_bytes if limit is None else min(limit, memory.available_bytes)
    room = max(0, limit - _reserve(limit))
    absent = request.spec.num_experts - num_slots
    return math.ceil(min(room // form.slot_bytes, absent) * form.slot_bytes)


def micro_batch(request: PlanRequest, batch: int) -> int:
    """Prompts that may go through the model together without taking more than their share."""
    state = _STATES * request.spec.hidden_size * request.spec.value_bytes
    most = _WORKSPACE_SHARE * limit_bytes(request) / (state * request.prompt_tokens)
    return max(1, min(batch, int(most)))
