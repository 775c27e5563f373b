"""One linear layer for a few tokens, by the library of `experts.c`."""

import ctypes

import torch

from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.operation import Gate, Operation, Stage

# T tokens, N outputs and K inputs


class CpuLinear:
    """`x W^T + bias` for one weight `[N, K]`, contiguous on the CPU, which is read once a call.

    Sums are float32 and are rounded once, the bias included. Holds the weight.
    """

    def __init__(
        self, kernel: CpuExperts, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> None:
        is_plain = weight_NK.is_cpu and weight_NK.is_contiguous() and weight_NK.dim() == 2
        if not is_plain or weight_NK.dtype != kernel.dtype:
            raise ValueError(
                f"weight must be a contiguous {kernel.dtype} CPU tensor [N, K], got "
                f"{tuple(weight_NK.shape)} {weight_NK.dtype} on {weight_NK.device}"
            )
        self._kernel = kernel
        self._weight_NK = weight_NK
        self._bias_N = None if bias_N is None else bias_N.float()
        N, K = weight_NK.shape
        self._held = (ctypes.c_void_p(weight_NK.data_ptr()), ctypes.c_int64(0))
        self._template = kernel.operation(
            up=ctypes.addressof(self._held[0]),
            first_row=ctypes.addressof(self._held[1]),
            num_experts=1,
            dim=K,
            ffn=N,
            up_rows=N,
            gate=Gate.NONE,
            stages=Stage.UP if bias_N is not None else Stage.UP | Stage.GATE,
        )

    def is_for(self, weight_NK: torch.Tensor) -> bool:
        """Whether this was made for that very weight, where it lies now."""
        return self._held[0].value == weight_NK.data_ptr()

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        """`[T, N]` of a contiguous `x_TK` in the weight's dtype."""
        T, K = x_TK.shape
        if x_TK.dtype is not self._kernel.dtype or self._template.dim != K or not x_TK.is_cpu:
            raise ValueError(
                f"x must be a {self._kernel.dtype} CPU tensor [T, {self._template.dim}], got "
                f"{tuple(x_TK.shape)} {x_TK.dtype} on {x_TK.device}"
            )
        x_TK = x_TK.contiguous()
        sums_TN = torch.empty(T, self._template.up_rows)
        y_TN = torch.empty(T, self._template.up_rows, dtype=x_TK.dtype)
        num_rows = ctypes.c_int64(T)
        operation = Operation.from_buffer_copy(self._template)
        operation.num_rows = ctypes.addressof(num_rows)
        operation.num_all_rows = operation.num_tokens = T
        operation.x = x_TK.data_ptr()
        operation.up_y = sums_TN.data_ptr()
        operation.h = y_TN.data_ptr()
        self._kernel.call(operation)
        return y_TN if self._bias_N is None else (sums_TN + self._bias_N).to(x_TK.dtype)
