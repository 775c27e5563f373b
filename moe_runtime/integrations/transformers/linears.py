"""The linear layers of a model, computed by the experts' kernel while there are few tokens."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.linear import CpuLinear

# Rows from which torch's blocked matrix products win over reading each weight once.
MAX_ROWS = 8


class FewTokensLinear(nn.Linear):
    """`nn.Linear` whose forward takes the kernel for up to `MAX_ROWS` rows, and torch for more."""

    _kernel: CpuExperts
    _few: CpuLinear | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- nn.Linear calls it so
        if not self._takes(input):
            return functional.linear(input, self.weight, self.bias)
        few = self._few
        if few is None or not few.is_for(self.weight):
            bias = None if self.bias is None else self.bias.detach()
            few = self._few = CpuLinear(self._kernel, self.weight.detach(), bias)
        output = few(input.reshape(-1, input.shape[-1]))
        return output.view(*input.shape[:-1], -1)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has weights of its own, so what was prepared for these is not for it.
        return {**self.__dict__, "_few": None}

    def _takes(self, x: torch.Tensor) -> bool:
        """Whether the kernel computes this call."""
        weight = self.weight
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        return (
            0 < x.numel() <= MAX_ROWS * weight.shape[1]
            and x.shape[-1] == weight.shape[1]
            and x.dtype is weight.dtype is self._kernel.dtype
            and x.is_cpu
            and weight.is_cpu
            and weight.is_contiguous()
            and not needs_grad
            and not torch.compiler.is_compiling()
        )


def speed_up_linears(model: nn.Module) -> int:
    """Let the kernel compute the plain `nn.Linear` layers of `model`; returns how many.

    Outputs are rounded once from float32 sums, and have other bits than torch's. 0 where there is
    no kernel for the weights' dtype or device. `slow_down_linears` undoes it.
    """
    changed = 0
    for module in model.modules():
        if type(module) is not nn.Linear or not module.weight.is_cpu:
            continue
        kernel = CpuExperts.load(module.weight.dtype)
        if kernel is not None:
            module.__dict__.update(_kernel=kernel, _few=None)
            module.__class__ = FewTokensLinear
            changed += 1
    return changed


def are_sped_up(model: nn.Module) -> bool:
    """Whether the kernel computes a linear layer of `model`."""
    return any(type(module) is FewTokensLinear for module in model.modules())


def slow_down_linears(model: nn.Module) -> None:
    """Undo `speed_up_linears`."""
    for module in model.modules():
        if type(module) is FewTokensLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
            del module.__dict__["_kernel"], module.__dict__["_few"]
