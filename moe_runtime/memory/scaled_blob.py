"""An expert that stays quantised as its file has it: what it is made of, and how it computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from moe_runtime.kernels.cpu.dequant import load_dequantizer
from moe_runtime.kernels.cpu.matrix import FORMS, Form, Matrix, Part, Weight
from moe_runtime.kernels.scaled_blocks import Dequantizer, ScaledFormat, ScaledWeights
from moe_runtime.memory.layout import ExpertLayout, ParameterSpec
from moe_runtime.memory.safetensors_header import FileTensor
from moe_runtime.memory.scaled_tensor import unsound


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
    """A `CompactBlob` of values and scales, as they are in the file.

    Parameters of which there is no part stand in `stored` as they compute.
    """

    stored: ExpertLayout
    parts: tuple[ScaledPart, ...]

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes

    def check(self, blob: torch.Tensor) -> None:
        """It names tensor and file where a scale is no number."""
        stored = self.stored.views(blob)
        for part in self.parts:
            if not weights_of(part, stored).is_sound:
                raise unsound(part.source)

    def has_rows(self, parameters: Sequence[ParameterSpec], *, is_transposed: bool) -> bool:
        """Whether `matrices` gives outputs' rows of every matrix; with `is_transposed` a parameter
        holds its inputs' rows.
        """
        return all(self._is_row_wise(spec, is_transposed) for spec in parameters)

    def matrices(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor
    ) -> dict[str, Weight]:
        """Of parts that `has_rows`."""
        stored = self.stored.views(blob)
        found: dict[str, Weight] = {}
        for spec in parameters:
            parts = [_rows(weights_of(part, stored)) for part in self._parts_of(spec)]
            if parts:
                num_columns = self._parts_of(spec)[0].shape[1]
                found[spec.name] = Matrix(parts, num_columns)
            elif len(spec.shape) == 2:
                rows = stored[spec.name]
                part = Part(form=Form.PLAIN, num_rows=len(rows), rows=rows)
                found[spec.name] = Matrix([part], spec.shape[1])
            else:
                found[spec.name] = stored[spec.name]
        return found

    def _parts_of(self, spec: ParameterSpec) -> list[ScaledPart]:
        """What `spec` is made of, in the order of its rows."""
        own = [part for part in self.parts if part.parameter == spec.name]
        return sorted(own, key=lambda part: part.start)

    def _is_row_wise(self, spec: ParameterSpec, is_transposed: bool) -> bool:
        if spec.dtype != torch.bfloat16:
            return False
        parts = self._parts_of(spec)
        if not parts:
            return len(spec.shape) == 1 or not is_transposed
        num_columns = spec.shape[0 if is_transposed else 1]
        dtypes = {stored.name: stored.dtype for stored in self.stored.parameters}
        return all(
            part.is_transposed == is_transposed
            and part.shape[1] == num_columns
            and dtypes[part.scales] == (torch.float32 if part.format == "fp8" else torch.uint8)
            for part in parts
        )

    def expander(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor, plain: torch.Tensor
    ) -> Callable[[], None]:
        return self.dequantising(parameters, blob, plain, _dequantizer())

    def dequantising(
        self,
        parameters: Sequence[ParameterSpec],
        blob: torch.Tensor,
        plain: torch.Tensor,
        dequantizer: Dequantizer,
    ) -> Callable[[], None]:
        """`expander` by `dequantizer`, on the device of `blob` and `plain`."""
        stored = self.stored.views(blob)
        found = ExpertLayout(tuple(parameters), len(plain)).views(plain)
        tasks = [
            (weights_of(part, stored), _region(part, found[part.parameter])) for part in self.parts
        ]
        copies = [(found[name], stored[name]) for name in found if name in stored]

        def expand() -> None:
            for weights, region in tasks:
                dequantizer.run(weights, region)
            for target, source in copies:
                target.copy_(source)

        return expand


def weights_of(part: ScaledPart, stored: Mapping[str, torch.Tensor]) -> ScaledWeights:
    """The weight of `part` as it lies in the slot that `stored` are the views of."""
    values = stored[part.values]
    if part.format == "mxfp4":
        values = values.flatten(1)
    return ScaledWeights(format=part.format, values=values, scales=stored[part.scales])


def _rows(weights: ScaledWeights) -> Part:
    return Part(
        form=FORMS[weights.format],
        num_rows=weights.shape[0],
        rows=weights.values,
        scales=weights.scales,
    )


def _region(part: ScaledPart, parameter: torch.Tensor) -> torch.Tensor:
    """Where the weight of `part` goes, as `[N, K]`."""
    size = part.shape[::-1] if part.is_transposed else part.shape
    region = parameter.narrow(0, part.start[0], size[0]).narrow(1, part.start[1], size[1])
    return region.mT if part.is_transposed else region


@cache
def _dequantizer() -> Dequantizer:
    return load_dequantizer()
