"""Which bytes of which files make one expert's blob."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from moe_runtime.expert import ExpertKey
from moe_runtime.memory.assembly import Assembly, Box, row_major
from moe_runtime.memory.layout import TORCH_DTYPES, ExpertLayout, ParameterSpec


@dataclass(frozen=True, slots=True)
class ByteMove:
    """`num_bytes` at `file_offset` go to `blob_offset` as they are."""

    file_offset: int
    num_bytes: int
    blob_offset: int


@dataclass(frozen=True, slots=True)
class StridedMove:
    """A box of elements that must be transposed, gathered or cast on its way into the blob.

    It needs the bytes `file_offset` to `file_offset + num_bytes`; `stride` counts elements of
    `dtype` from the first of them.
    """

    file_offset: int
    num_bytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: tuple[int, ...]  # in the parameter
    parameter: ParameterSpec


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of one file, read in one piece, and the moves that it serves."""

    file: Path
    offset: int
    num_bytes: int
    moves: tuple[ByteMove, ...] | tuple[StridedMove, ...]


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One MoE layer: its layout and each parameter's assembly, the expert dimension first.

    `phases[name][e]` is the address modulo a cache line at which the unmodified model would hold
    parameter `name` of expert `e`; without them every parameter starts on a cache line.
    """

    num_experts: int
    layout: ExpertLayout
    parameters: Mapping[str, Assembly]
    phases: Mapping[str, Sequence[int]] = field(default_factory=dict)


class TensorMap:
    """ExpertKey -> extents to read; layer `l` of the model is `layers[l]`."""

    def __init__(self, layers: Sequence[LayerExperts]) -> None:
        self.layers = tuple(layers)
        # Per expert: a plan is asked for at every miss, and costs tens of microseconds to make.
        self.extents = lru_cache(maxsize=None)(self._extents)
        self.layout = lru_cache(maxsize=None)(self._layout)

    def files(self) -> list[Path]:
        """Every file that holds a part of an expert, in name order."""
        return sorted(
            {
                box.source.file
                for layer in self.layers
                for assembly in layer.parameters.values()
                for box in assembly.boxes
            }
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that can hold any expert."""
        return max(layer.layout.num_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Bytes of the blobs of all experts of all layers."""
        return sum(layer.num_experts * layer.layout.num_bytes for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)

    def _layout(self, key: ExpertKey) -> ExpertLayout:
        """Where the parameters of `key` stand in its blob."""
        layer = self.layers[key.layer]
        if not layer.phases:
            return layer.layout
        return layer.layout.at([layer.phases[s.name][key.expert] for s in layer.layout.parameters])

    def _extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        layer = self.layers[key.layer]
        byte_moves: dict[Path, list[ByteMove]] = {}
        strided_moves: dict[Path, list[StridedMove]] = {}
        for spec in self.layout(key).parameters:
            for box in layer.parameters[spec.name].select(0, key.expert).boxes:
                if _is_plain(box, spec):
                    byte_moves.setdefault(box.source.file, []).append(_byte_move(box, spec))
                else:
                    strided_moves.setdefault(box.source.file, []).append(_strided_move(box, spec))
        return tuple(
            extent
            for by_file in (byte_moves, strided_moves)
            for file, moves in by_file.items()
            for extent in _coalesce(file, moves)
        )


def _coalesce(file: Path, moves: Sequence[ByteMove | StridedMove]) -> list[Extent]:
    """Moves whose bytes touch or overlap share one extent."""
    groups: list[list[ByteMove | StridedMove]] = []
    end = -1
    for move in sorted(moves, key=lambda m: m.file_offset):
        if move.file_offset > end:
            groups.append([])
        groups[-1].append(move)
        end = max(end, move.file_offset + move.num_bytes)
    return [
        Extent(
            file,
            group[0].file_offset,
            max(m.file_offset + m.num_bytes for m in group) - group[0].file_offset,
            tuple(group),  # type: ignore[arg-type]  # one kind per call
        )
        for group in groups
    ]


def _is_plain(box: Box, spec: ParameterSpec) -> bool:
    """Whether the box is one run of bytes in the file and in the blob, of the same dtype."""
    if TORCH_DTYPES[box.source.dtype] != spec.dtype:
        return False
    leading = next((d for d, length in enumerate(box.size) if length != 1), len(box.size))
    whole_rows = all(box.size[d] == spec.shape[d] for d in range(leading + 1, len(spec.shape)))
    dense = all(
        length == 1 or stride == step
        for length, stride, step in zip(box.size, box.stride, row_major(box.size), strict=True)
    )
    return whole_rows and dense


def _byte_move(box: Box, spec: ParameterSpec) -> ByteMove:
    first = sum(s * step for s, step in zip(box.start, row_major(spec.shape), strict=True))
    count = 1
    for length in box.size:
        count *= length
    item_bytes = spec.dtype.itemsize
    return ByteMove(
        box.source.offset + box.offset * item_bytes,
        count * item_bytes,
        spec.offset + first * item_bytes,
    )


def _strided_move(box: Box, spec: ParameterSpec) -> StridedMove:
    dtype = TORCH_DTYPES[box.source.dtype]
    span = 1 + sum((n - 1) * step for n, step in zip(box.size, box.stride, strict=True))
    return StridedMove(
        box.source.offset + box.offset * dtype.itemsize,
        span * dtype.itemsize,
        dtype,
        box.size,
        box.stride,
        box.start,
        spec,
    )
