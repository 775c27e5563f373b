"""How one expert's parameters stand in one contiguous blob."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Every parameter starts on a cache line: CPU matrix kernels may sum in another order on weights
# that do not, and outputs would then differ in the last bit from the unmodified model's.
ALIGNMENT_BYTES = 64

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of one expert: `shape` without the expert dimension, `offset` in the blob."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The parameters of one expert in blob order (gate|up, down, biases ...)."""

    parameters: tuple[ParameterSpec, ...]
    num_bytes: int  # of the blob, with alignment

    @classmethod
    def pack(cls, parameters: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> "ExpertLayout":
        """Place (name, shape, dtype) one after the other, each on a cache line."""
        specs, end = [], 0
        for name, shape, dtype in parameters:
            spec = ParameterSpec(name, shape, dtype, end)
            specs.append(spec)
            end += -(-spec.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(tuple(specs), end)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, without alignment."""
        return sum(spec.num_bytes for spec in self.parameters)

    def views(self, blob: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views into `blob` (uint8, at least `num_bytes` long), by parameter name."""
        return {
            spec.name: blob[spec.offset : spec.offset + spec.num_bytes]
            .view(spec.dtype)
            .view(spec.shape)
            for spec in self.parameters
        }
