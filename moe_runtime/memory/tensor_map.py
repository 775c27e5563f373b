"""Which bytes of which files make one expert's blob."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moe_runtime.expert import ExpertKey
from moe_runtime.kernels.quantise import QuantisedDtype
from moe_runtime.memory.assembly import Assembly, Box, row_major
from moe_runtime.memory.layout import BLOCK_BYTES, STORED_DTYPES, ExpertLayout, ParameterSpec
from moe_runtime.memory.packing import ITEM_BYTES, PackedBlock, PackedTensor
from moe_runtime.memory.scaled_blob import ScaledBlob, ScaledPart

# From which on the room for phases does not count, and a copy does.
LARGE_BYTES = 2**20


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
class BlockMove:
    """A packed block that goes to `blob_offset`: unpacked, or as it is if `keeps_packed`."""

    file_offset: int
    num_bytes: int
    blob_offset: int
    block: PackedBlock
    keeps_packed: bool


@dataclass(frozen=True, slots=True)
class RowsMove:
    """bfloat16 rows of a matrix that become int8 or int4 ones on their way into the blob.

    With `block` they are packed in the file. Offsets are those of the first row's values and scale.
    """

    file_offset: int
    num_bytes: int
    num_rows: int
    num_columns: int
    dtype: QuantisedDtype
    values_offset: int
    scales_offset: int
    block: PackedBlock | None


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of one file, read in one piece, and the moves that it serves.

    Rows that are quantised are read run by run.
    Strided moves out of packed `blocks` count from `offset` in the bytes that these unpack to.
    """

    file: Path
    offset: int
    num_bytes: int
    moves: (
        tuple[ByteMove, ...]
        | tuple[BlockMove, ...]
        | tuple[RowsMove, ...]
        | tuple[StridedMove, ...]
    )
    blocks: tuple[PackedBlock, ...] = ()


@dataclass(frozen=True, slots=True)
class ScaledExperts:
    """What experts that lie quantised in their files compute as, and from which parts.

    `phases` are as in LayerExperts, for the parameters of `computed`; the parts' sources are those
    of expert 0.
    """

    computed: ExpertLayout
    phases: Mapping[str, Sequence[int]]
    parts: tuple[ScaledPart, ...]


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One MoE layer: its layout and each parameter's assembly, the expert dimension first.

    `phases[name][e]` is the address modulo a cache line at which the unmodified model would hold
    parameter `name` of expert `e`; without them every parameter starts on a cache line. All of it
    is of what the files hold; where that is quantised, `scaled` says what it stands for.
    """

    num_experts: int
    layout: ExpertLayout
    parameters: Mapping[str, Assembly]
    phases: Mapping[str, Sequence[int]] = field(default_factory=dict)
    scaled: ScaledExperts | None = None

    @property
    def computed(self) -> ExpertLayout:
        """The parameters with which an expert computes."""
        return self.layout if self.scaled is None else self.scaled.computed

    def has_rows(self, *, is_transposed: bool) -> bool:
        """Whether a slot has rows of outputs, as kernels read them; `is_transposed` is computed."""
        if self.scaled is None:
            return not is_transposed
        blob = ScaledBlob(self.layout, self.scaled.parts)
        return blob.has_rows(self.scaled.computed.parameters, is_transposed=is_transposed)


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

    def on_cache_lines(self) -> "TensorMap":
        """The same experts without phases: an accelerator's bits do not hang on addresses."""
        return TensorMap(
            [
                replace(
                    layer,
                    phases={},
                    scaled=None if layer.scaled is None else replace(layer.scaled, phases={}),
                )
                for layer in self.layers
            ]
        )

    @property
    def is_packed(self) -> bool:
        """Whether any expert lies packed in its file."""
        return any(
            isinstance(box.source, PackedTensor)
            for layer in self.layers
            for assembly in layer.parameters.values()
            for box in assembly.boxes
        )

    @property
    def is_scaled(self) -> bool:
        """Whether any expert lies quantised in its file."""
        return bool(self.formats())

    def formats(self) -> list[str]:
        """The formats in which experts lie quantised in their files, in name order."""
        parts = (part for layer in self.layers if layer.scaled for part in layer.scaled.parts)
        return sorted({part.format for part in parts})

    @property
    def dtype(self) -> torch.dtype:
        """In which experts compute."""
        return self.layers[0].computed.parameters[0].dtype

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

    def all_keys(self) -> Iterator[ExpertKey]:
        """Every expert of every layer."""
        for layer, experts in enumerate(self.layers):
            for expert in range(experts.num_experts):
                yield ExpertKey(layer, expert)

    def beside_blocks(self, *, only_scaled: bool = False) -> "TensorMap":
        """The same experts, each parameter where its first byte stands in a block of its file.

        What is read as it is then needs no copy, in slots that start on blocks. For code whose bits
        do not depend on addresses; `only_scaled` for other code: what it computes of a quantised
        expert stands elsewhere. Small experts stay as they are.
        """
        return TensorMap(
            [
                _beside_blocks(layer) if layer.scaled is not None or not only_scaled else layer
                for layer in self.layers
            ]
        )

    def _layout(self, key: ExpertKey) -> ExpertLayout:
        """Where the parameters of `key` stand in its blob."""
        layer = self.layers[key.layer]
        if not layer.phases:
            return layer.layout
        return layer.layout.at([layer.phases[s.name][key.expert] for s in layer.layout.parameters])

    def _extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        layer = self.layers[key.layer]
        moves = _Moves()
        for spec in self.layout(key).parameters:
            for box in layer.parameters[spec.name].select(0, key.expert).boxes:
                file = box.source.file
                blocks = _packed_blocks(box, spec)
                if blocks is not None:
                    first = spec.offset + _first_element(box, spec) * spec.dtype.itemsize
                    for block in blocks:
                        moves.add(
                            file, BlockMove(block.offset, block.num_bytes, first, block, False)
                        )
                        first += block.num_elements * spec.dtype.itemsize
                elif isinstance(box.source, PackedTensor):
                    moves.extents.append(_unpacked_extent(box.source, box, spec))
                elif _is_plain(box, spec):
                    moves.add(file, _byte_move(box, spec))
                else:
                    moves.add(file, _strided_move(box, spec, box.source.offset))
        return moves.all_extents()


def _beside_blocks(layer: LayerExperts) -> LayerExperts:
    if layer.layout.num_bytes < LARGE_BYTES:
        return layer
    parameters = [(spec.name, spec.shape, spec.dtype) for spec in layer.layout.parameters]
    phases = {
        spec.name: [
            _block_phase(layer.parameters[spec.name].select(0, expert).boxes[0], spec)
            for expert in range(layer.num_experts)
        ]
        for spec in layer.layout.parameters
    }
    layout = ExpertLayout.pack(parameters, phase_bytes=BLOCK_BYTES)
    return replace(layer, layout=layout, phases=phases)


def _block_phase(box: Box, spec: ParameterSpec) -> int:
    """Where in a block of the file the parameter would start, if all of it lay as `box` does."""
    if isinstance(box.source, PackedTensor) or not _is_plain(box, spec):
        return 0
    first = box.source.offset + (box.offset - _first_element(box, spec)) * spec.dtype.itemsize
    phase = first % BLOCK_BYTES
    return 0 if phase % spec.dtype.itemsize else phase


class _Moves:
    """The moves of one expert, gathered into reads."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self._by_kind: dict[tuple[type, Path], list[Any]] = {}

    def add(self, file: Path, move: ByteMove | BlockMove | StridedMove) -> None:
        self._by_kind.setdefault((type(move), file), []).append(move)

    def all_extents(self) -> tuple[Extent, ...]:
        """Moves whose bytes touch or overlap share one extent."""
        kinds = sorted(self._by_kind.items(), key=lambda item: item[0][0] is StridedMove)
        gathered = [extent for (_, file), moves in kinds for extent in _coalesce(file, moves)]
        return (*gathered, *self.extents)


def _coalesce(file: Path, moves: Sequence[Any]) -> list[Extent]:
    groups: list[list[Any]] = []
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
            tuple(group),
        )
        for group in groups
    ]


def _packed_blocks(box: Box, spec: ParameterSpec) -> tuple[PackedBlock, ...] | None:
    """The blocks that unpack to `box` and nothing else, or None if there are none such."""
    if not isinstance(box.source, PackedTensor) or not _is_plain(box, spec):
        return None
    blocks = box.source.blocks_of(box.offset, math.prod(box.size))
    unpacked = sum(block.num_elements for block in blocks)
    if blocks[0].first_element != box.offset or unpacked != math.prod(box.size):
        return None
    return blocks


def _unpacked_extent(source: PackedTensor, box: Box, spec: ParameterSpec) -> Extent:
    """One box of elements that must be unpacked before they can be moved."""
    blocks = source.blocks_of(box.offset, _span(box))
    start = blocks[0].offset
    # Such that the first element of the first block stands at the extent's offset.
    origin = start - blocks[0].first_element * ITEM_BYTES
    num_bytes = blocks[-1].offset + blocks[-1].num_bytes - start
    return Extent(source.file, start, num_bytes, (_strided_move(box, spec, origin),), blocks)


def _is_plain(box: Box, spec: ParameterSpec) -> bool:
    """Whether the box is one run of bytes in the file and in the blob, of the same dtype."""
    if STORED_DTYPES[box.source.dtype] != spec.dtype:
        return False
    leading = next((d for d, length in enumerate(box.size) if length != 1), len(box.size))
    whole_rows = all(box.size[d] == spec.shape[d] for d in range(leading + 1, len(spec.shape)))
    dense = all(
        length == 1 or stride == step
        for length, stride, step in zip(box.size, box.stride, row_major(box.size), strict=True)
    )
    return whole_rows and dense


def _first_element(box: Box, spec: ParameterSpec) -> int:
    """Where in the parameter the first element of `box` stands."""
    return sum(s * step for s, step in zip(box.start, row_major(spec.shape), strict=True))


def _byte_move(box: Box, spec: ParameterSpec) -> ByteMove:
    item_bytes = spec.dtype.itemsize
    return ByteMove(
        box.source.offset + box.offset * item_bytes,
        math.prod(box.size) * item_bytes,
        spec.offset + _first_element(box, spec) * item_bytes,
    )


def _span(box: Box) -> int:
    """Elements of the source from the first of `box` to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(box.size, box.stride, strict=True))


def _strided_move(box: Box, spec: ParameterSpec, origin: int) -> StridedMove:
    """`origin`: where element 0 of the source stands."""
    dtype = STORED_DTYPES[box.source.dtype]
    return StridedMove(
        origin + box.offset * dtype.itemsize,
        _span(box) * dtype.itemsize,
        dtype,
        box.size,
        box.stride,
        box.start,
        spec,
    )
