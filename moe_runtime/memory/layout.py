"""How one expert's parameters stand in one contiguous blob."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from moe_runtime.kernels.cpu.matrix import Weight

# A cache line. CPU matrix kernels may sum in another order on weights that stand elsewhere in one,
# so a weight's phase, its address modulo this, is part of what the unmodified model computes.
ALIGNMENT_BYTES = 64

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
# Of disks: what stands in memory as it stands in its block needs no copy on its way there.
BLOCK_BYTES = 512
# What a slot can hold besides: the values and the scales of quantised weights.
STORED_DTYPES = TORCH_DTYPES | {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


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


class CompactBlob(Protocol):
    """How an expert stands in a blob that holds it packed or quantised."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def stored(self) -> "ExpertLayout | None":
        """What is read into the blob as views of it; None where reads say by themselves."""

    def check(self, blob: torch.Tensor) -> None:
        """Raise CheckpointError where what was read into `blob` (uint8) cannot be computed with."""

    def matrices(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor
    ) -> Mapping[str, Weight]:
        """The weights in `blob`, by name, as a kernel reads them there; biases as they are."""

    def expander(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor, plain: torch.Tensor
    ) -> Callable[[], None]:
        """What writes all parameters to `plain` as they compute elsewhere; may be called again."""


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The parameters of one expert in blob order (gate|up, down, biases ...).

    With `compact`, a slot holds that blob, and `parameters` tell of what it stands for.
    """

    parameters: tuple[ParameterSpec, ...]
    num_bytes: int  # of the plain blob, with alignment
    compact: CompactBlob | None = None

    @classmethod
    def pack(
        cls,
        parameters: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        *,
        phase_bytes: int = 0,
    ) -> "ExpertLayout":
        """Place (name, shape, dtype) one after the other, each on a cache line.

        `phase_bytes`, a multiple of a cache line, is room for `at()` with smaller phases than that,
        counted from multiples of it.
        """
        alignment = max(phase_bytes, ALIGNMENT_BYTES)
        specs, end = [], 0
        for name, shape, dtype in parameters:
            spec = ParameterSpec(name, shape, dtype, end)
            specs.append(spec)
            end += -(-spec.num_bytes // alignment) * alignment + phase_bytes
        return cls(tuple(specs), end)

    def at(self, phases: Sequence[int]) -> "ExpertLayout":
        """The same blob with each parameter `phases[i]` bytes after its start."""
        assert all(0 <= phase < BLOCK_BYTES for phase in phases), phases
        specs = tuple(
            replace(spec, offset=spec.offset + phase)
            for spec, phase in zip(self.parameters, phases, strict=True)
        )
        return ExpertLayout(specs, self.num_bytes)

    @property
    def as_read(self) -> "ExpertLayout":
        """The parameters as they are read into a slot, which are views of it."""
        stored = None if self.compact is None else self.compact.stored
        return self if stored is None else stored

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, without alignment."""
        return sum(spec.num_bytes for spec in self.parameters)

    @property
    def stored_bytes(self) -> int:
        """Of the blob that a slot holds."""
        return self.num_bytes if self.compact is None else self.compact.num_bytes

    def views(self, blob: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views into `blob` (uint8, at least `num_bytes` long), by parameter name."""
        return {
            spec.name: blob[spec.offset : spec.offset + spec.num_bytes]
            .view(spec.dtype)
            .view(spec.shape)
            for spec in self.parameters
        }


def empty_at(num_bytes: int, phase: int) -> torch.Tensor:
    """Fresh bytes whose address is `phase` modulo a cache line."""
    memory = torch.empty(num_bytes + 2 * ALIGNMENT_BYTES, dtype=torch.uint8)
    start = (phase - memory.data_ptr()) % ALIGNMENT_BYTES
    return memory[start : start + num_bytes]
