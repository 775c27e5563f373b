"""Where the bytes of a plan go: dense weights, cache, workspace, reserve and expert slots."""

import math

from moe_runtime.errors import BudgetError
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


def use_memory(request: PlanRequest, form: ExpertForm, batch: int) -> MemoryUse | None:
    """Where bytes go, with as many slots as fit; None where one token's experts do not."""
    spec = request.spec
    limit = limit_bytes(request)
    room = limit - _needed(request, limit, batch)
    wanted = room
    if request.expert_memory_bytes is not None:
        wanted = min(room, request.expert_memory_bytes)
    if wanted < _floor(request, form):
        return None
    slots = min(int(wanted // form.slot_bytes), spec.num_experts)
    expert_bytes = math.ceil(slots * form.slot_bytes)
    return MemoryUse(
        limit_bytes=limit,
        dense_bytes=_dense_bytes(request),
        expert_bytes=expert_bytes,
        kv_bytes=_kv_bytes(request, batch),
        workspace_bytes=_workspace_bytes(request, limit, batch),
        reserve_bytes=_reserve(limit),
        free_bytes=room - expert_bytes,
        host_expert_bytes=_host_bytes(request, form, slots) if request.hardware.gpus else 0,
    )


def smallest_limit(request: PlanRequest, form: ExpertForm, batch: int) -> int:
    """The fewest bytes with which `use_memory` finds room.

    Raises BudgetError where they would not help, as the experts' own bound is below the floor.
    """
    floor = _floor(request, form)
    if request.expert_memory_bytes is not None and request.expert_memory_bytes < floor:
        raise BudgetError(
            f"{request.expert_memory_bytes} bytes for experts do not hold those of one token in "
            f"one layer of {request.spec.name}; the smallest budget that works is {floor} bytes"
        )

    def is_enough(limit: int) -> bool:
        return limit - _needed(request, limit, batch) >= floor

    low = high = limit_bytes(request)
    while not is_enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _needed(request: PlanRequest, limit: int, batch: int) -> int:
    """All but experts. Grows by less than `limit` does, so more memory never leaves less room."""
    fixed = _dense_bytes(request) + _kv_bytes(request, batch)
    return fixed + _workspace_bytes(request, limit, batch) + _reserve(limit)


def _dense_bytes(request: PlanRequest) -> int:
    """On the CPU embeddings are mapped, where they are not tied."""
    return request.spec.dense_bytes if request.hardware.gpus else request.spec.step_bytes


def _kv_bytes(request: PlanRequest, batch: int) -> int:
    """Of full caches: what grows must not run out of memory at the end."""
    return batch * request.spec.kv_bytes(request.prompt_tokens + request.new_tokens)


def _floor(request: PlanRequest, form: ExpertForm) -> int:
    """Bytes of the experts that one token uses in one layer."""
    return math.ceil(max(layer.top_k for layer in request.spec.layers) * form.slot_bytes)


def _prompt_bytes(request: PlanRequest) -> int:
    """Of hidden states of one prompt."""
    return request.prompt_tokens * _STATES * request.spec.hidden_size * request.spec.value_bytes


def _workspace_bytes(request: PlanRequest, limit: int, batch: int) -> int:
    """Hidden states of prompts that go through the model together, and logits of the batch."""
    prompt = _prompt_bytes(request)
    states = min(batch * prompt, max(prompt, int(_WORKSPACE_SHARE * limit)))
    return states + batch * request.spec.vocab_size * _LOGIT_BYTES


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
    most = _WORKSPACE_SHARE * limit_bytes(request) / _prompt_bytes(request)
    return max(1, min(batch, int(most)))
