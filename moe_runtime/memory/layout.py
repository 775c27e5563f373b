"""How one expert's parameters stand in one contiguous blob."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moe_runtime.kernels.scaled_blocks import ScaledFormat
from moe_runtime.memory.packing import PackedBlock
from moe_runtime.memory.safetensors_header import FileTensor

# A cache line. CPU matrix kernels may sum in another order on weights that stand elsewhere in one,
# so a weight's phase, its address modulo this, is part of what the unmodified model computes.
ALIGNMENT_BYTES = 64

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
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


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """A block at `offset` of a packed blob, which unpacks to `target_offset` of the plain one."""

    offset: int
    target_offset: int
    block: PackedBlock


@dataclass(frozen=True, slots=True)
class BytePlace:
    """`num_bytes` at `offset` of a packed blob that are the bytes at `target_offset`."""

    offset: int
    target_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PackedBlob:
    """How an expert stands in a blob that holds it packed."""

    blocks: tuple[BlockPlace, ...]
    plain: tuple[BytePlace, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ScaledPart:
    """A weight `[N, K]` of a parameter, which a blob holds as values and their scales.

    It stands at `start` of the parameter, as `[K, N]` if `is_transposed`. `values` and `scales`
    name parameters of the stored layout; `source` is where the scales come from.
    """

    parameter: str
    format: ScaledFormat
    start: tuple[int, int]
    shape: tuple[int, int]
    is_transposed: bool
    values: str
    scales: str
    source: FileTensor


@dataclass(frozen=True, slots=True)
class ScaledBlob:
    """How an expert stands in a blob that holds it quantised.

    Parameters of which there is no part stand in `stored` as they compute.
    """

    stored: "ExpertLayout"
    parts: tuple[ScaledPart, ...]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The parameters of one expert in blob order (gate|up, down, biases ...).

    With `packed` or `scaled`, a slot holds that blob, and `parameters` tell of what it unpacks or
    dequantises to.
    """

    parameters: tuple[ParameterSpec, ...]
    num_bytes: int  # of the plain blob, with alignment
    packed: PackedBlob | None = None
    scaled: ScaledBlob | None = None

    @classmethod
    def pack(
        cls,
        parameters: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        *,
        with_phases: bool = False,
    ) -> "ExpertLayout":
        """Place (name, shape, dtype) one after the other, each on a cache line.

        `with_phases` leaves room for `at()`.
        """
        specs, end = [], 0
        for name, shape, dtype in parameters:
            spec = ParameterSpec(name, shape, dtype, end)
            specs.append(spec)
            end += -(-spec.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            end += ALIGNMENT_BYTES if with_phases else 0
        return cls(tuple(specs), end)

    def at(self, phases: Sequence[int]) -> "ExpertLayout":
        """The same blob with each parameter `phases[i]` bytes after its cache line's start."""
        assert all(0 <= phase < ALIGNMENT_BYTES for phase in phases), phases
        specs = tuple(
            replace(spec, offset=spec.offset + phase)
            for spec, phase in zip(self.parameters, phases, strict=True)
        )
        return ExpertLayout(specs, self.num_bytes)

    @property
    def as_read(self) -> "ExpertLayout":
        """The parameters as they are read into a slot, which are views of it."""
        return self if self.scaled is None else self.scaled.stored

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


def empty_at(num_bytes: int, phase: int) -> torch.Tensor:
    """Fresh bytes whose address is `phase` modulo a cache line."""
    memory = torch.empty(num_bytes + 2 * ALIGNMENT_BYTES, dtype=torch.uint8)
    start = (phase - memory.data_ptr()) % ALIGNMENT_BYTES
    return memory[start : start + num_bytes]
