"""An expert that stays quantised as its file has it: what it is made of, and how it computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from moe_runtime.kernels.cpu.dequant import load_dequantizer
from moe_runtime.kernels.cpu.matrix import Matrix
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

    def matrices(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor
    ) -> dict[str, Matrix]:
        raise NotImplementedError("no kernel computes from fp8 or mxfp4 rows; give slots room")

    def expander(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor, plain: torch.Tensor
    ) -> Callable[[], None]:
        """It raises CheckpointError, naming tensor and file, where a scale is no number."""
        stored = self.stored.views(blob)
        found = ExpertLayout(tuple(parameters), len(plain)).views(plain)
        tasks = [
            (part, weights_of(part, stored), _region(part, found[part.parameter]))
            for part in self.parts
        ]
        copies = [(found[name], stored[name]) for name in found if name in stored]
        dequantizer = _dequantizer()

        def expand() -> None:
            for part, weights, region in tasks:
                if not weights.is_sound:
                    raise unsound(part.source)
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


def _region(part: ScaledPart, parameter: torch.Tensor) -> torch.Tensor:
    """Where the weight of `part` goes, as `[N, K]`."""
    size = part.shape[::-1] if part.is_transposed else part.shape
    region = parameter.narrow(0, part.start[0], size[0]).narrow(1, part.start[1], size[1])
    return region.mT if part.is_transposed else region


@cache
def _dequantizer() -> Dequantizer:
    return load_dequantizer()
