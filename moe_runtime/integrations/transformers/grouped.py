"""Finds out whether Triton's grouped products compute what an experts module computes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from moe_runtime.grouped_experts import GroupedExperts
from moe_runtime.integrations.transformers.fast import clamped_gate, gate_trials, is_same
from moe_runtime.kernels.gate import Gate
from moe_runtime.kernels.launch import FLOATS, FP8_CAPABILITY, LEAST_CAPABILITY
from moe_runtime.layer import ExpertMath
from moe_runtime.memory.tensor_map import LayerExperts
from moe_runtime.stored_weights import stored_weights
from moe_runtime.tiered_math import GroupedKernel

TorchGate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def grouped_experts(
    module: nn.Module, math: ExpertMath, dtype: torch.dtype, device: torch.device
) -> GroupedExperts | str:
    """What computes `math` on `device` with Triton, or why torch has to.

    `module` is a fused experts module that still has its (perhaps meta) parameters. On the CPU
    Triton must be interpreted.
    """
    if dtype not in FLOATS:
        return f"experts in {str(dtype).removeprefix('torch.')}"
    gpu_name = None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]}"
        gpu_name = torch.cuda.get_device_name(device)
    down = module.get_parameter("down_proj").shape
    num_experts, (ffn, dim) = down[0], down[1:] if math.is_transposed else down[:0:-1]
    return GroupedExperts(
        math=math,
        gate=find_gate(module, math),
        num_experts=num_experts,
        model_dim=dim,
        ffn_dim=ffn,
        gpu_name=gpu_name,
    )


def reading_stored(
    grouped: GroupedKernel, layer: LayerExperts, device: torch.device
) -> GroupedExperts | str:
    """`grouped` for slots of quantised experts, or why it cannot read them there."""
    assert isinstance(grouped, GroupedExperts)
    assert layer.scaled is not None
    if device.type == "cuda" and any(part.format == "fp8" for part in layer.scaled.parts):
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            return f"fp8 on compute capability {capability[0]}.{capability[1]}"
    found = stored_weights(grouped.math, layer)
    return found if isinstance(found, str) else replace(grouped, stored=found)


def find_gate(module: nn.Module, math: ExpertMath) -> Gate | None:
    """The kernel's gate that equals `math.apply_gate`, found by trying; None if none does."""
    trials, expected = gate_trials(module, math)
    if trials.shape[1] != 2 * expected.shape[1]:
        return None
    clamped = Gate(activation="clamped")
    clamped = replace(
        clamped,
        alpha=float(getattr(module, "alpha", clamped.alpha)),
        limit=float(getattr(module, "limit", clamped.limit)),
    )
    gates: list[tuple[Gate, TorchGate]] = [
        (Gate(activation="silu"), lambda g, u: functional.silu(g) * u),
        (Gate(activation="gelu_tanh"), lambda g, u: functional.gelu(g, approximate="tanh") * u),
        (clamped, partial(clamped_gate, clamped.alpha, clamped.limit)),
    ]
    halves = {False: trials.chunk(2, dim=-1), True: (trials[:, ::2], trials[:, 1::2])}
    for gate, function in gates:
        for is_interleaved, (first, second) in halves.items():
            if is_same(function(first, second), expected):
                return replace(gate, is_interleaved=is_interleaved)
    return None
