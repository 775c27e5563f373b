"""A tensor of a checkpoint that lies there as quantised values and a tensor of their scales."""

from dataclasses import dataclass
from typing import Self

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels.scaled_blocks import FP8_BLOCK, MXFP4_GROUP, ScaledFormat
from moe_runtime.memory.safetensors_header import FileTensor

_FP8_SCALES = ("F32", "BF16", "F16")
_MXFP4_BLOCK_BYTES = MXFP4_GROUP // 2


@dataclass(frozen=True, slots=True)
class ScaledTensor(FileTensor):
    """Stands for the weights in `values`, scaled by `scales`; `shape` is that of the weights.

    `offset` and `num_bytes` are those of `values`. With `is_transposed` the last two dimensions of
    `shape` are the other way round than the weights are stored.
    """

    format: ScaledFormat
    values: FileTensor
    scales: FileTensor
    is_transposed: bool

    def __str__(self) -> str:
        return str(self.values)

    @classmethod
    def fp8(cls, values: FileTensor, scales: FileTensor) -> Self:
        """`values` F8_E4M3 `[..., N, K]` with a scale for each square. Raises CheckpointError."""
        if values.dtype != "F8_E4M3":
            raise CheckpointError(
                f"{scales} scales {values}, which should be F8_E4M3; download the checkpoint again"
            )
        if len(values.shape) < 2:
            raise CheckpointError(f"{values} is quantised by squares and has no rows and columns")
        *outer, num_rows, num_columns = values.shape
        expected = (*outer, -(-num_rows // FP8_BLOCK), -(-num_columns // FP8_BLOCK))
        if scales.dtype not in _FP8_SCALES or scales.shape != expected:
            raise CheckpointError(
                f"{scales} must be F32 {list(expected)}, one scale for each {FP8_BLOCK} x "
                f"{FP8_BLOCK} of {values}; download the checkpoint again"
            )
        return cls._of(values.name, "fp8", values.shape, values, scales, is_transposed=False)

    @classmethod
    def mxfp4(cls, name: str, values: FileTensor, scales: FileTensor) -> Self:
        """`values` U8 `[E, N, K / 32, 16]`; stands for `name` `[E, K, N]`, as transformers has it.

        Raises CheckpointError.
        """
        if values.dtype != "U8" or len(values.shape) != 4 or values.shape[3] != _MXFP4_BLOCK_BYTES:
            raise CheckpointError(
                f"{values} must be U8 [experts, rows, groups, {_MXFP4_BLOCK_BYTES}], blocks of "
                f"{MXFP4_GROUP} mxfp4 numbers; download the checkpoint again"
            )
        num_experts, num_rows, num_groups, _ = values.shape
        if scales.dtype != "U8" or scales.shape != values.shape[:3]:
            raise CheckpointError(
                f"{scales} must be U8 {list(values.shape[:3])}, one scale for each block of "
                f"{values}; download the checkpoint again"
            )
        shape = (num_experts, num_groups * MXFP4_GROUP, num_rows)
        return cls._of(name, "mxfp4", shape, values, scales, is_transposed=True)

    @classmethod
    def _of(
        cls,
        name: str,
        form: ScaledFormat,
        shape: tuple[int, ...],
        values: FileTensor,
        scales: FileTensor,
        *,
        is_transposed: bool,
    ) -> Self:
        return cls(
            name, values.file, values.dtype, shape, values.offset, values.num_bytes,
            form, values, scales, is_transposed,
        )  # fmt: skip


def unsound(scales: FileTensor) -> CheckpointError:
    """What is wrong when a scale is NaN or infinite."""
    return CheckpointError(
        f"{scales} holds a scale that is no number; download the file again, or use another "
        "checkpoint"
    )
