"""Finds out whether a kernel computes what an experts module computes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from moe_runtime.fast_layer import FastMath, most_kernel_rows
from moe_runtime.integrations.transformers.proof import expert_math, small_copy
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.operation import ClampedGate, Gate, KernelGate, TorchGate
from moe_runtime.layer import ExpertMath

# Far enough apart for any clamp of a gate to show.
_TRIAL_SIZES = (1.0, 10.0, 100.0)
_NUM_TRIALS = 16
_SAME = 1e-5  # relative: two ways to compute e^x in float32 are closer, two functions are not
_GateOfTwo = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_ACTIVATIONS: dict[Gate, TorchGate] = {
    Gate.SILU: functional.silu,
    Gate.GELU_TANH: partial(functional.gelu, approximate="tanh"),
    Gate.RELU: functional.relu,
    Gate.RELU_SQUARED: lambda x: functional.relu(x).square(),
}


def fast_math(
    module: nn.Module,
    math: ExpertMath,
    dtype: torch.dtype,
    device: torch.device,
    *,
    has_rows: bool = False,
) -> FastMath | ExpertMath:
    """A kernel for what `math` computes, or `math` with the reason why torch has to.

    `module` is a fused experts module that still has its (perhaps meta) parameters. `has_rows`:
    slots hold rows of outputs, also of weights that compute transposed, and biases beside them.
    """
    kernel = CpuExperts.load(dtype) if device.type == "cpu" else None
    if kernel is None:
        status = CpuExperts.status(dtype) if device.type == "cpu" else f"torch on {device.type}"
        return replace(math, reason=status.removeprefix("torch").strip(" ()"))
    reasons = {
        "transposed weights": math.is_transposed and not has_rows,
        "biases": math.has_bias and not has_rows,
        "a norm behind each expert": math.post_norm is not None,
    }
    if any(reasons.values()):
        return replace(math, reason=" and ".join(name for name, holds in reasons.items() if holds))
    up, down = (module.get_parameter(name).shape[1:] for name in (math.up_name, "down_proj"))
    if math.is_transposed:
        up, down = up[::-1], down[::-1]
    gate, is_interleaved = find_gate(module, math)
    layer = kernel.layer(
        dim=up[1],
        ffn=down[1],
        num_up=up[0],
        gate=gate,
        is_interleaved=is_interleaved,
    )
    path = kernel.level if isinstance(gate, KernelGate) else f"{kernel.level}, gate in torch"
    return FastMath(layer.begin, math, path, most_kernel_rows(up[0] * up[1] + down[0] * down[1]))


def find_gate(module: nn.Module, math: ExpertMath) -> tuple[KernelGate | TorchGate, bool]:
    """The kernel's gate that equals `math.apply_gate`, and whether gate and up take turns.

    Found by trying, in float32; the module's own function where none does.
    """
    trials, expected = gate_trials(module, math)
    if trials.shape == expected.shape:
        for plain, activation in _ACTIVATIONS.items():
            if is_same(activation(trials), expected):
                return plain, False
        return math.apply_gate, False
    gates: list[tuple[KernelGate, _GateOfTwo]] = [
        (gate, partial(_product, activation)) for gate, activation in _ACTIVATIONS.items()
    ]
    if hasattr(module, "alpha") and hasattr(module, "limit"):
        alpha, limit = float(module.alpha), float(module.limit)  # type: ignore[arg-type]
        gates.append((ClampedGate(alpha=alpha, limit=limit), partial(clamped_gate, alpha, limit)))
    halves = {False: trials.chunk(2, dim=-1), True: (trials[:, ::2], trials[:, 1::2])}
    for gate, function in gates:
        for is_interleaved, (first, second) in halves.items():
            if is_same(function(first, second), expected):
                return gate, is_interleaved
    return math.apply_gate, False


def _product(activation: TorchGate, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return activation(g) * u


def clamped_gate(alpha: float, limit: float, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """gpt-oss's gate of two halves."""
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return g * torch.sigmoid(alpha * g) * (u + 1)


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
