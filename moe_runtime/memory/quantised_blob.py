"""An expert whose matrices are int8 or int4 rows: where they are, computed from and dequantised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moe_runtime.kernels.cpu.matrix import FORMS, Matrix, Part
from moe_runtime.kernels.quantise import QuantisedDtype, dequantise, int4_groups
from moe_runtime.memory.layout import ALIGNMENT_BYTES, ParameterSpec


@dataclass(frozen=True, slots=True)
class QuantisedPlace:
    """The values of a parameter at `offset` of the blob, and its scales at `scales_offset`.

    Vectors, such as biases, have no scales: they stay as they are.
    """

    offset: int
    scales_offset: int | None


@dataclass(frozen=True, slots=True)
class QuantisedBlob:
    """A `CompactBlob` with `places[i]` for parameter `i`."""

    dtype: QuantisedDtype
    places: tuple[QuantisedPlace, ...]
    num_bytes: int
    stored: ClassVar[None] = None

    @classmethod
    def of(cls, parameters: Sequence[ParameterSpec], dtype: QuantisedDtype) -> "QuantisedBlob":
        """All values and scales one after the other, each on a cache line."""
        places, end = [], 0
        for spec in parameters:
            offset = end
            if len(spec.shape) != 2:
                end += _aligned(spec.num_bytes)
                places.append(QuantisedPlace(offset, None))
                continue
            num_rows, num_columns = spec.shape
            scales_offset = offset + _aligned(num_rows * values_bytes(num_columns, dtype))
            end = scales_offset + _aligned(num_rows * scales_bytes(num_columns, dtype))
            places.append(QuantisedPlace(offset, scales_offset))
        return cls(dtype, tuple(places), end)

    def check(self, blob: torch.Tensor) -> None:
        """Nothing to do: what is no number multiplies as such."""

    def matrices(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor
    ) -> dict[str, Matrix]:
        found = {}
        for spec, place in zip(parameters, self.places, strict=True):
            if place.scales_offset is not None:
                values, scales = self._tensors(spec, place, blob)
                form, num_rows = FORMS[self.dtype], spec.shape[0]
                part = Part(form=form, num_rows=num_rows, rows=values, scales=scales)
                found[spec.name] = Matrix([part], spec.shape[1])
        return found

    def expander(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor, plain: torch.Tensor
    ) -> Callable[[], None]:
        targets = [
            plain[spec.offset : spec.offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
            for spec in parameters
        ]

        def expand() -> None:
            for spec, place, target in zip(parameters, self.places, targets, strict=True):
                if place.scales_offset is None:
                    data = blob[place.offset : place.offset + spec.num_bytes]
                    target.copy_(data.view(spec.dtype).view(spec.shape))
                else:
                    dequantise(*self._tensors(spec, place, blob), self.dtype, target)

        return expand

    def _tensors(
        self, spec: ParameterSpec, place: QuantisedPlace, blob: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert place.scales_offset is not None
        num_rows, num_columns = spec.shape
        return row_tensors(
            blob, place.offset, place.scales_offset, num_rows, num_columns, self.dtype
        )


def row_tensors(
    blob: torch.Tensor,
    values_offset: int,
    scales_offset: int,
    num_rows: int,
    num_columns: int,
    dtype: QuantisedDtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of rows in `blob` (uint8), as `quantise` has them."""
    values = blob[values_offset : values_offset + num_rows * values_bytes(num_columns, dtype)]
    scales = blob[scales_offset : scales_offset + num_rows * scales_bytes(num_columns, dtype)]
    if dtype == "int8":
        return values.view(torch.int8).view(num_rows, -1), scales.view(torch.float32)
    return values.view(num_rows, -1), scales.view(torch.bfloat16).view(num_rows, -1)


def values_bytes(num_columns: int, dtype: QuantisedDtype) -> int:
    """Bytes of the values of a row."""
    return num_columns if dtype == "int8" else num_columns // 2


def scales_bytes(num_columns: int, dtype: QuantisedDtype) -> int:
    """Bytes of the scales of a row."""
    return 4 if dtype == "int8" else int4_groups(num_columns) * 2


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
