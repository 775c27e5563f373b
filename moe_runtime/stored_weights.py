"""The weights of experts that slots hold quantised, as the grouped products read them there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_runtime.kernels.scaled_blocks import ScaledFormat
from moe_runtime.kernels.slot_weights import SlotWeights
from moe_runtime.layer import ExpertMath
from moe_runtime.memory.scaled_blob import ScaledPart
from moe_runtime.memory.tensor_map import LayerExperts

# S slots, P parts, N outputs (weight rows)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of each slot: names of the values and scales of its parts, in order of rows."""

    format: ScaledFormat
    values: tuple[str, ...]
    scales: tuple[str, ...]

    def of(self, stacked: Mapping[str, torch.Tensor], bias_SN: torch.Tensor | None) -> SlotWeights:
        """Views of it over all slots, of which `stacked` are what is stored there, `[S, ...]`."""
        values = [stacked[name] for name in self.values]
        if self.format == "mxfp4":
            values = [blocks.flatten(2) for blocks in values]
        return SlotWeights(
            values=_side_by_side(values),
            scales=_side_by_side([stacked[name] for name in self.scales]),
            bias=bias_SN,
            format=self.format,
        )


def stored_weights(math: ExpertMath, layer: LayerExperts) -> dict[str, StoredWeight] | str:
    """By name the quantised parameters of `layer`; or why products cannot read one in its slot."""
    found: dict[str, StoredWeight] = {}
    assert layer.scaled is not None
    offsets = {spec.name: spec.offset for spec in layer.layout.parameters}
    for name in dict.fromkeys(part.parameter for part in layer.scaled.parts):
        parts = [part for part in layer.scaled.parts if part.parameter == name]
        values, scales = tuple(p.values for p in parts), tuple(p.scales for p in parts)
        if any(part.is_transposed != math.is_transposed for part in parts):
            return f"{name} lies transposed"
        if not _are_equal_rows(parts):
            return f"{name} lies in unequal parts"
        if not all(_is_evenly_spaced([offsets[n] for n in names]) for names in (values, scales)):
            return f"parts of {name} lie at uneven distances"
        found[name] = StoredWeight(parts[0].format, values, scales)
    return found


def _are_equal_rows(parts: Sequence[ScaledPart]) -> bool:
    """Whether each part is so many whole rows of the weight, behind those of the last."""
    first = parts[0]
    return all(
        (part.format, part.shape) == (first.format, first.shape)
        and (part.start[::-1] if part.is_transposed else part.start) == (i * first.shape[0], 0)
        for i, part in enumerate(parts)
    )


def _is_evenly_spaced(offsets: Sequence[int]) -> bool:
    step = offsets[1] - offsets[0] if len(offsets) > 1 else 0
    return all(offset == offsets[0] + i * step for i, offset in enumerate(offsets))


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Evenly spaced views `[S, ...]` of one slab as `[S, P, ...]`; one alone as it is."""
    first = parts[0]
    if len(parts) == 1:
        return first
    step = parts[1].storage_offset() - first.storage_offset()
    slot, *rest = first.stride()
    return first.as_strided(
        (len(first), len(parts), *first.shape[1:]), (slot, step, *rest), first.storage_offset()
    )
