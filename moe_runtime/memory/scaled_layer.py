"""Compiles the experts of a layer whose weights are quantised into what a slot holds of them."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from moe_runtime.errors import CheckpointError
from moe_runtime.memory.assembly import Assembly, Box, row_major, stack
from moe_runtime.memory.layout import ALIGNMENT_BYTES, STORED_DTYPES, ExpertLayout
from moe_runtime.memory.safetensors_header import FileTensor
from moe_runtime.memory.scaled_blob import ScaledPart
from moe_runtime.memory.scaled_tensor import ScaledTensor
from moe_runtime.memory.tensor_map import LayerExperts, ScaledExperts

# Of one expert: name, shape and the dtype in which it computes.
Parameter = tuple[str, tuple[int, ...], torch.dtype]


def is_scaled(assembly: Assembly) -> bool:
    """Whether any of it lies quantised in its file."""
    return any(isinstance(box.source, ScaledTensor) for box in assembly.boxes)


def scaled_layer(
    num_experts: int,
    parameters: Sequence[Parameter],
    places: Mapping[str, Assembly],
    phases: Mapping[str, Sequence[int]],
) -> LayerExperts:
    """A layer of which at least one parameter is quantised.

    `places[name]` is `[E, ...]` of weights; their values and scales become parameters of their
    own, each whole and as it is in the file. Raises CheckpointError where a parameter is not made
    of whole weights, or of quantised ones and others.
    """
    specs: list[Parameter] = []
    stored: dict[str, Assembly] = {}
    parts: list[ScaledPart] = []
    for name, shape, dtype in parameters:
        assembly = places[name]
        if not is_scaled(assembly):
            specs.append((name, shape, dtype))
            stored[name] = assembly
            continue
        for index, (part, values, scales) in enumerate(_parts(name, assembly, num_experts)):
            values_name, scales_name = f"{name}.{index}.values", f"{name}.{index}.scales"
            for key, place in ((values_name, values), (scales_name, scales)):
                specs.append((key, place.shape[1:], STORED_DTYPES[place.boxes[0].source.dtype]))
                stored[key] = place
            parts.append(
                ScaledPart(
                    name, part.format, part.start, part.shape, part.is_transposed,
                    values_name, scales_name, part.source,
                )
            )  # fmt: skip
    none = [0] * num_experts
    stored_phases = {name: phases.get(name, none) for name in stored}
    has_phases = any(map(any, stored_phases.values()))
    return LayerExperts(
        num_experts,
        ExpertLayout.pack(specs, phase_bytes=ALIGNMENT_BYTES if has_phases else 0),
        stored,
        stored_phases if has_phases else {},
        ScaledExperts(
            ExpertLayout.pack(parameters, phase_bytes=ALIGNMENT_BYTES), phases, tuple(parts)
        ),
    )


def _parts(
    name: str, assembly: Assembly, num_experts: int
) -> Iterator[tuple[ScaledPart, Assembly, Assembly]]:
    """Each part of expert 0, and the values and scales `[E, ...]` of all experts for it."""
    boxes: list[list[Box]] = [[] for _ in range(num_experts)]
    for box in assembly.boxes:
        alone = Assembly(assembly.shape, (box,))
        for e in range(box.start[0], box.start[0] + box.size[0]):
            boxes[e] += alone.select(0, e).boxes
    found = [[_part(name, box) for box in sorted(one, key=lambda b: b.start)] for one in boxes]
    for together in zip(*found, strict=True):
        part = together[0][0]
        for other, values, _ in together:
            shape = (other.format, other.start, other.shape, other.is_transposed)
            if shape != (part.format, part.start, part.shape, part.is_transposed):
                raise CheckpointError(
                    f"experts of {name} are quantised in different ways ({values.boxes[0].source} "
                    f"is unlike that of {part.source}); save the checkpoint again in one format"
                )
        yield part, stack([v for _, v, _ in together], 0), stack([s for _, _, s in together], 0)


def _part(name: str, box: Box) -> tuple[ScaledPart, Assembly, Assembly]:
    """What one box of one expert is made of: one whole weight `[N, K]`."""
    source = box.source
    if not isinstance(source, ScaledTensor):
        raise CheckpointError(
            f"experts of {name} are partly quantised and partly not ({source} is not); save the "
            "checkpoint again in one format"
        )
    matrix = source.shape[-2:]
    index, rest = divmod(box.offset, math.prod(matrix))
    is_whole = rest == 0 and (box.size, box.stride) == (matrix, row_major(matrix))
    is_flipped = rest == 0 and (box.size, box.stride) == (matrix[::-1], row_major(matrix)[::-1])
    if not is_whole and not is_flipped:
        raise CheckpointError(
            f"{name} cannot be read in place: it takes {source} apart, whose scales are of blocks; "
            "use its bfloat16 checkpoint"
        )
    num_rows, num_columns = matrix[::-1] if source.is_transposed else matrix
    first, second = box.start
    part = ScaledPart(
        name, source.format, (first, second), (num_rows, num_columns),
        source.is_transposed != is_flipped, "", "", source.scales,
    )  # fmt: skip
    outer = len(source.shape) - 2
    return part, _slice(source.values, outer, index), _slice(source.scales, outer, index)


def _slice(tensor: FileTensor, num_outer: int, index: int) -> Assembly:
    """Slice `index` of the `num_outer` leading dimensions taken as one."""
    assembly = Assembly.of(tensor)
    for dim in range(num_outer):
        position, index = divmod(index, math.prod(tensor.shape[dim + 1 : num_outer]))
        assembly = assembly.select(0, position)
    return assembly
