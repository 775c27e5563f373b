"""Which rows of which files make the blob of an expert that is quantised when it arrives."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.expert import ExpertKey
from moe_runtime.kernels.quantise import QuantisedDtype
from moe_runtime.memory.layout import ExpertLayout, ParameterSpec
from moe_runtime.memory.quantised_blob import (
    QuantisedBlob,
    QuantisedPlace,
    scales_bytes,
    values_bytes,
)
from moe_runtime.memory.tensor_map import (
    BlockMove,
    ByteMove,
    Extent,
    RowsMove,
    StridedMove,
    TensorMap,
)

# Rows that one thread reads and quantises at a time, as it does with plain bytes.
_RUN_BYTES = 640 * 2**10


class QuantisedMap:
    """Extents and layouts of the experts of a TensorMap, for slots that hold them in `dtype`.

    Raises UnsupportedModelError where rows are not stored as they compute: whole, in bfloat16.
    """

    def __init__(self, tensor_map: TensorMap, dtype: QuantisedDtype) -> None:
        self._tensor_map = tensor_map
        self._dtype = dtype
        self._plan = lru_cache(maxsize=None)(self._make_plan)
        self.slot_bytes = 0
        for layer, experts in enumerate(tensor_map.layers):
            _require_rows(experts.layout, dtype)
            blob = self.layout(ExpertKey(layer, 0)).compact
            assert blob is not None
            self.slot_bytes = max(self.slot_bytes, blob.num_bytes)

    def extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        """What to read, and where in the blob its rows go."""
        return self._plan(key)[0]

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """The blob, and the parameters that it stands for; the same object every time."""
        return self._plan(key)[1]

    def _make_plan(self, key: ExpertKey) -> tuple[tuple[Extent, ...], ExpertLayout]:
        layout = self._tensor_map.layout(key)
        blob = QuantisedBlob.of(layout.parameters, self._dtype)
        extents: list[Extent] = []
        for extent in self._tensor_map.extents(key):
            rows: list[RowsMove] = []
            for move in extent.moves:
                if isinstance(move, StridedMove):
                    raise UnsupportedModelError(
                        f"expert_dtype={self._dtype!r} needs experts in bfloat16 that are stored "
                        f"as they compute, and {move.parameter.name} of {key} is cast, transposed "
                        "or gathered when it is read; leave expert_dtype out"
                    )
                assert not isinstance(move, RowsMove)
                spec, place = _place_of(move.blob_offset, layout, blob)
                if place.scales_offset is not None:
                    rows += self._runs(move, spec, place)
                else:
                    assert isinstance(move, ByteMove)
                    offset = place.offset + move.blob_offset - spec.offset
                    moved = replace(move, blob_offset=offset)
                    extents.append(Extent(extent.file, move.file_offset, move.num_bytes, (moved,)))
            if rows:
                extents.append(replace(extent, moves=tuple(rows), blocks=()))
        return tuple(extents), replace(layout, compact=blob)

    def _runs(
        self, move: ByteMove | BlockMove, spec: ParameterSpec, place: QuantisedPlace
    ) -> Iterator[RowsMove]:
        """`move` as rows; a packed block is one run, plain bytes are cut into several."""
        num_columns = spec.shape[1]
        row_bytes = num_columns * spec.dtype.itemsize
        first, rest = divmod(move.blob_offset - spec.offset, row_bytes)
        block = move.block if isinstance(move, BlockMove) else None
        num_rows = move.num_bytes // row_bytes if block is None else block.num_rows
        is_whole = block is not None or move.num_bytes % row_bytes == 0
        if rest or not is_whole or (block is not None and block.num_columns != num_columns):
            raise UnsupportedModelError(
                f"expert_dtype={self._dtype!r} needs whole rows, and those of {spec.name} lie in "
                "pieces; leave expert_dtype out"
            )
        step = num_rows if block is not None else max(1, _RUN_BYTES // row_bytes)
        for begin in range(0, num_rows, step):
            count = min(step, num_rows - begin)
            row = first + begin
            assert place.scales_offset is not None
            yield RowsMove(
                move.file_offset + begin * row_bytes,
                move.num_bytes if block is not None else count * row_bytes,
                count,
                num_columns,
                self._dtype,
                place.offset + row * values_bytes(num_columns, self._dtype),
                place.scales_offset + row * scales_bytes(num_columns, self._dtype),
                block,
            )


def _require_rows(layout: ExpertLayout, dtype: QuantisedDtype) -> None:
    for spec in layout.parameters:
        if spec.dtype != torch.bfloat16:
            raise UnsupportedModelError(
                f"expert_dtype={dtype!r} takes experts in bfloat16, and {spec.name} computes in "
                f"{str(spec.dtype).removeprefix('torch.')}; leave expert_dtype or dtype out"
            )
        if dtype == "int4" and len(spec.shape) == 2 and spec.shape[1] % 2:
            raise UnsupportedModelError(
                f"expert_dtype='int4' holds weights in pairs, and rows of {spec.name} have "
                f"{spec.shape[1]}; use expert_dtype='int8'"
            )


def _place_of(
    offset: int, layout: ExpertLayout, blob: QuantisedBlob
) -> tuple[ParameterSpec, QuantisedPlace]:
    return next(
        (spec, place)
        for spec, place in zip(layout.parameters, blob.places, strict=True)
        if spec.offset <= offset < spec.offset + spec.num_bytes
    )
