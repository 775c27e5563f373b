"""Finds out whether a kernel computes what an experts module computes."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from moe_runtime.fast_layer import FastMath
from moe_runtime.integrations.transformers.proof import expert_math, small_copy
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.operation import Gate, TorchGate
from moe_runtime.layer import ExpertMath

# Far enough apart for any clamp of a gate to show.
_TRIAL_SIZES = (1.0, 10.0, 100.0)
_NUM_TRIALS = 16
_SAME = 1e-5  # relative: two ways to compute e^x in float32 are closer, two functions are not
_ACTIVATIONS: dict[Gate, TorchGate] = {
    Gate.SILU: functional.silu,
    Gate.GELU_TANH: partial(functional.gelu, approximate="tanh"),
    Gate.RELU: functional.relu,
    Gate.RELU_SQUARED: lambda x: functional.relu(x).square(),
}


def fast_math(
    module: nn.Module, math: ExpertMath, dtype: torch.dtype, device: torch.device
) -> FastMath | ExpertMath:
    """A kernel for what `math` computes, or `math` with the reason why torch has to.

    `module` is a fused experts module that still has its (perhaps meta) parameters.
    """
    kernel = CpuExperts.load(dtype) if device.type == "cpu" else None
    if kernel is None:
        status = CpuExperts.status(dtype) if device.type == "cpu" else f"torch on {device.type}"
        return replace(math, reason=status.removeprefix("torch").strip(" ()"))
    reasons = {
        "transposed weights": math.is_transposed,
        "biases": math.has_bias,
        "a norm behind each expert": math.post_norm is not None,
    }
    if any(reasons.values()):
        return replace(math, reason=" and ".join(name for name, holds in reasons.items() if holds))
    num_up, dim = module.get_parameter(math.up_name).shape[1:]
    gate, is_interleaved = find_gate(module, math)
    layer = kernel.layer(
        dim=dim,
        ffn=module.get_parameter("down_proj").shape[2],
        num_up=num_up,
        gate=gate,
        is_interleaved=is_interleaved,
    )
    path = kernel.level if isinstance(gate, Gate) else f"{kernel.level}, gate in torch"
    return FastMath(layer.begin, math, path)


def find_gate(module: nn.Module, math: ExpertMath) -> tuple[Gate | TorchGate, bool]:
    """The kernel's gate that equals `math.apply_gate`, and whether gate and up take turns.

    Found by trying, in float32; the module's own function where none does.
    """
    trials, expected = gate_trials(module, math)
    for gate, activation in _ACTIVATIONS.items():
        if trials.shape == expected.shape:
            if is_same(activation(trials), expected):
                return gate, False
            continue
        first, second = trials.chunk(2, dim=-1)
        if is_same(activation(first) * second, expected):
            return gate, False
        if is_same(activation(trials[:, ::2]) * trials[:, 1::2], expected):
            return gate, True
    return math.apply_gate, False


def gate_trials(module: nn.Module, math: ExpertMath) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in float32, small and large, and what the module's own gate makes of them."""
    generator = torch.Generator().manual_seed(0)
    small, weights = small_copy(module, torch.float32, generator, torch.device("cpu"))
    small_math = expert_math(small, math.accumulator)
    assert small_math is not None
    num_up = weights[0][math.up_name].shape[1 if math.is_transposed else 0]
    rows = torch.randn(_NUM_TRIALS, num_up, generator=generator)
    trials = torch.cat([rows * size for size in _TRIAL_SIZES])
    with torch.no_grad():
        return trials, small_math.apply_gate(trials)


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether both are the same function of the trials, however it was computed."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=_SAME, atol=_SAME)
