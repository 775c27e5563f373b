"""What other designs reach with the same model and machine: streaming passes, split weights."""

from dataclasses import asdict

from moe_runtime.errors import BudgetError
from moe_runtime.model_spec import ModelSpec
from moe_runtime.perf.latency import Lane
from moe_runtime.perf.lens import LensMachine, LensModel, LensTask, stage_one, stage_two
from moe_runtime.perf.plan import Candidate, PlanRequest
from moe_runtime.perf.plan_memory import limit_bytes
from moe_runtime.perf.rates import Rates
from moe_runtime.perf.roofline import (
    RooflineMachine,
    RooflineModel,
    attainable_flops,
    find_policy,
    turning_points,
)

_BLOCK_TOKENS = 16  # of a page of the attention cache, in MoE-Lens' second stage


def bounds(request: PlanRequest, best: Candidate) -> dict[str, object]:
    """Both stages of MoE-Lens: what streaming all weights in every pass could reach here.

    The link is the GPU's, else the disk, else memory itself; the cache gets what experts would.
    """
    spec = request.spec
    rates = Rates.of(request.hardware, value_bytes=spec.value_bytes, read_bytes=spec.expert_bytes)
    link = rates.link_bytes_per_second or rates.disk_bytes_per_second
    names = (Lane.LINK, Lane.DISK, Lane.COMPUTE)
    known = (rates.link_bytes_per_second, rates.disk_bytes_per_second, 1.0)
    name = next(lane for lane, rate in zip(names, known, strict=True) if rate)
    memory = best.memory
    layer_bytes = spec.expert_total_bytes / len(spec.moe_layers)
    free = memory.expert_bytes + memory.kv_bytes + memory.free_bytes
    machine = LensMachine(
        flops=rates.linear.flops(spec.value_bytes),
        link_bytes_per_second=link or rates.memory_bytes_per_second,
        # Weights pass through a window of two layers.
        kv_budget_bytes=max(free - 2 * layer_bytes, memory.kv_bytes),
        kv_bytes_per_second=rates.memory_bytes_per_second,
    )
    context = request.prompt_tokens + request.new_tokens
    model = LensModel(
        parameters=spec.num_parameters,
        active_parameters=(spec.dense_flops + spec.expert_flops) / 2,
        weight_bytes=spec.expert_total_bytes + spec.step_bytes,
        kv_bytes_per_token=spec.kv_bytes(context) / context,
    )
    task = LensTask(
        prompt_tokens=request.prompt_tokens,
        new_tokens=request.new_tokens,
        num_sequences=request.num_sequences,
    )
    one = stage_one(model, machine, task)
    found: dict[str, object] = {
        "link": name.value,
        "machine": asdict(machine),
        "stage_one": asdict(one),
        "stage_two": None,
        "policy": _policy(request),
    }
    try:
        two = stage_two(
            model,
            machine,
            task,
            block_tokens=_BLOCK_TOKENS,
            # n_real where none was fitted: what arithmetic does while the link reads once.
            most_tokens_per_pass=max(one.saturating_tokens, 1.0),
        )
    except BudgetError:  # not one sequence beside a window of two layers
        return found
    return found | {"stage_two": asdict(two)}


def _policy(request: PlanRequest) -> dict[str, object] | None:
    """MoE-Lightning's policy and roofs for throughput on a GPU; None elsewhere, or if none fits."""
    if not request.hardware.gpus or request.goal != "throughput":
        return None
    spec = request.spec
    rates = Rates.of(request.hardware, value_bytes=spec.value_bytes)
    assert rates.link_bytes_per_second is not None
    machine = RooflineMachine(
        gpu_memory_bytes=limit_bytes(request),
        cpu_memory_bytes=request.hardware.memory.available_bytes,
        link_bytes_per_second=rates.link_bytes_per_second,
        gpu_bytes_per_second=rates.memory_bytes_per_second,
        cpu_bytes_per_second=rates.host_bytes_per_second,
        gpu_flops=rates.linear.flops(spec.value_bytes),
        cpu_flops=rates.host_products.flops(spec.value_bytes),
    )
    try:
        policy = find_policy(
            _roofline_model(spec),
            machine,
            prompt_tokens=request.prompt_tokens,
            new_tokens=request.new_tokens,
        )
    except BudgetError:
        return None
    # Of the experts' product: two operations a weight and row, two bytes a weight.
    tokens = policy.batch * spec.experts_per_token / spec.num_experts
    micro = policy.micro_batch * spec.experts_per_token / spec.num_experts
    low, high = turning_points(machine, cpu_intensity=tokens, gpu_intensity=micro)
    return asdict(policy) | {
        "turning_points": [low, high],
        "attainable_flops": attainable_flops(machine, link_intensity=tokens, gpu_intensity=micro),
    }


def _roofline_model(spec: ModelSpec) -> RooflineModel:
    """The shapes that the roofline knows: all layers alike, three matrices an expert, plain KV.

    Only the ratio of heads counts, so each is taken to be 128 values wide.
    """
    layer = spec.moe_layers[0]
    heads = max(1, layer.score_values // (2 * 128))
    return RooflineModel(
        num_layers=len(spec.moe_layers),
        hidden_size=spec.hidden_size,
        expert_size=layer.expert_parameters // (3 * spec.hidden_size),
        num_heads=heads,
        num_key_heads=max(1, heads * layer.cached_values // (2 * spec.hidden_size)),
        num_experts=layer.num_experts,
        top_k=layer.top_k,
    )
