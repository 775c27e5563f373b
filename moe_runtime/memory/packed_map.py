"""Which bytes of which files make the blob of an expert that stays packed."""

from dataclasses import replace
from functools import lru_cache

from moe_runtime.expert import ExpertKey
from moe_runtime.memory.layout import ALIGNMENT_BYTES, BLOCK_BYTES, ExpertLayout
from moe_runtime.memory.packed_blob import BlockPlace, BytePlace, PackedBlob
from moe_runtime.memory.tensor_map import (
    LARGE_BYTES,
    BlockMove,
    ByteMove,
    Extent,
    StridedMove,
    TensorMap,
)


class PackedMap:
    """Extents and layouts of the experts of a TensorMap, for slots that hold them packed."""

    def __init__(self, tensor_map: TensorMap) -> None:
        self._tensor_map = tensor_map
        # What stands in its slot as it stands in its block of the disk is read without a copy.
        self._phase_bytes = BLOCK_BYTES if tensor_map.slot_bytes >= LARGE_BYTES else 1
        self._plan = lru_cache(maxsize=None)(self._make_plan)
        self.slot_bytes = max(self._blob(key).num_bytes for key in tensor_map.all_keys())

    @classmethod
    def of(cls, tensor_map: TensorMap) -> "PackedMap | None":
        """None where experts cannot stay packed, or would not be smaller for it.

        They cannot when an element is cast, transposed or gathered on its way into the slot, or
        when a row lies in pieces.
        """
        if not tensor_map.is_packed:
            return None
        extents = [extent for key in tensor_map.all_keys() for extent in tensor_map.extents(key)]
        if any(isinstance(extent.moves[0], StridedMove) for extent in extents):
            return None
        found = cls(tensor_map)
        if not all(
            found._blob(key).has_whole_rows(found.layout(key).parameters)
            for key in tensor_map.all_keys()
        ):
            return None
        return found if found.slot_bytes < tensor_map.slot_bytes else None

    def extents(self, key: ExpertKey) -> tuple[Extent, ...]:
        """What to read, and where in the packed blob it goes."""
        return self._plan(key)[0]

    def layout(self, key: ExpertKey) -> ExpertLayout:
        """The packed blob, and the parameters that it unpacks to; the same object every time."""
        return self._plan(key)[1]

    def _blob(self, key: ExpertKey) -> PackedBlob:
        blob = self.layout(key).compact
        assert isinstance(blob, PackedBlob)
        return blob

    def _make_plan(self, key: ExpertKey) -> tuple[tuple[Extent, ...], ExpertLayout]:
        extents = []
        blocks: list[BlockPlace] = []
        plain: list[BytePlace] = []
        end = 0
        for extent in self._tensor_map.extents(key):
            moves: list[BlockMove | ByteMove] = []
            start = end + (extent.offset - end) % self._phase_bytes
            for move in extent.moves:
                if isinstance(move, BlockMove):
                    # Blocks that are neighbours in the file are neighbours here.
                    place = start + move.file_offset - extent.offset
                    blocks.append(BlockPlace(place, move.blob_offset, move.block))
                    moves.append(replace(move, blob_offset=place, keeps_packed=True))
                else:
                    assert isinstance(move, ByteMove)
                    place = end
                    plain.append(BytePlace(place, move.blob_offset, move.num_bytes))
                    moves.append(replace(move, blob_offset=place))
                end = max(end, _aligned(place + move.num_bytes, ALIGNMENT_BYTES))
            extents.append(replace(extent, moves=tuple(moves)))  # type: ignore[arg-type]  # one kind
        num_bytes = _aligned(end, max(self._phase_bytes, ALIGNMENT_BYTES))
        packed = PackedBlob(tuple(blocks), tuple(plain), num_bytes)
        return tuple(extents), replace(self._tensor_map.layout(key), compact=packed)


def _aligned(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
