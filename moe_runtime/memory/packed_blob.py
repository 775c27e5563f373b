"""An expert that stays packed: where its blocks and plain bytes are, computed from and unpacked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from moe_runtime.kernels.cpu.matrix import Form, Matrix, Part
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.packed_blocks import INTACT, BlockCodec
from moe_runtime.memory.layout import ParameterSpec
from moe_runtime.memory.packing import ITEM_BYTES, PackedBlock


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """A block at `offset` of a packed blob, which unpacks to `target_offset` of the plain one."""

    offset: int
    target_offset: int
    block: PackedBlock

    def is_followed_by(self, other: "BlockPlace", num_rows: int) -> bool:
        """Whether `other` goes on where this block of `num_rows` rows ends."""
        block = self.block
        return (
            block.num_rows == num_rows >= other.block.num_rows
            and (block.num_bytes, block.num_columns)
            == (other.block.num_bytes, other.block.num_columns)
            and other.offset == self.offset + block.num_bytes
            and other.target_offset == self.target_offset + block.num_elements * ITEM_BYTES
        )


@dataclass(frozen=True, slots=True)
class BytePlace:
    """`num_bytes` at `offset` of a packed blob that are the bytes at `target_offset`."""

    offset: int
    target_offset: int
    num_bytes: int


# Blocks `[P, bytes]`, the bf16 weights `[N, K]` that they hold, and how many rows each holds: some
# kernel unpacks the ones to the others.
Unpack = Callable[[torch.Tensor, torch.Tensor, int], None]


@dataclass(frozen=True, slots=True)
class PackedBlob:
    """A `CompactBlob` of packed blocks, and of bytes that packing would not have made smaller.

    Blocks were checked when they were read, so that their checksums are not looked at again.
    """

    blocks: tuple[BlockPlace, ...]
    plain: tuple[BytePlace, ...]
    num_bytes: int
    stored: ClassVar[None] = None

    def has_whole_rows(self, parameters: Sequence[ParameterSpec]) -> bool:
        """Whether all that stands in it is whole rows of matrices, or vectors."""
        matrices = [spec for spec in parameters if len(spec.shape) == 2]
        return all(
            (place.target_offset - spec.offset) % _row_bytes(spec) == 0
            and (
                place.num_bytes % _row_bytes(spec) == 0
                if isinstance(place, BytePlace)
                else place.block.num_columns == spec.shape[1]
            )
            for spec in matrices
            for place in self._places_of(spec)
        )

    def check(self, blob: torch.Tensor) -> None:
        """Nothing to do: blocks were checked when they were read."""

    def matrices(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor
    ) -> dict[str, Matrix]:
        return {
            spec.name: Matrix([_part(p, spec, blob) for p in self._places_of(spec)], spec.shape[1])
            for spec in parameters
            if len(spec.shape) == 2
        }

    def expander(
        self, parameters: Sequence[ParameterSpec], blob: torch.Tensor, plain: torch.Tensor
    ) -> Callable[[], None]:
        codec = _codec()
        tasks = [
            place.block.task(
                blob[place.offset : place.offset + place.block.num_bytes],
                plain[place.target_offset :][: place.block.num_elements * ITEM_BYTES],
            )
            for place in self.blocks
        ]

        def expand() -> None:
            status = codec.run(tasks, num_threads=torch.get_num_threads(), is_known=True)
            assert all(found == INTACT for found in status), status
            for place in self.plain:
                plain[place.target_offset : place.target_offset + place.num_bytes] = blob[
                    place.offset : place.offset + place.num_bytes
                ]

        return expand

    def unpack(self, blob: torch.Tensor, plain: torch.Tensor, unpack: Unpack) -> None:
        """Write the plain blob to `plain` with `unpack`, blocks of one run together."""
        for run in self._runs():
            first = run[0]
            num_bytes, num_columns = first.block.num_bytes, first.block.num_columns
            num_rows = sum(place.block.num_rows for place in run)
            blocks = blob[first.offset : first.offset + len(run) * num_bytes].view(len(run), -1)
            weights = plain[first.target_offset :][: num_rows * num_columns * ITEM_BYTES]
            weights_NK = weights.view(torch.bfloat16).view(num_rows, num_columns)
            unpack(blocks, weights_NK, first.block.num_rows)
        for place in self.plain:
            target = plain[place.target_offset :][: place.num_bytes]
            target.copy_(blob[place.offset : place.offset + place.num_bytes])

    def _runs(self) -> list[list[BlockPlace]]:
        """Blocks that follow each other here and unpacked, all of as many rows but the last."""
        runs: list[list[BlockPlace]] = []
        for place in self.blocks:
            last = runs[-1][-1] if runs else None
            if last is not None and last.is_followed_by(place, runs[-1][0].block.num_rows):
                runs[-1].append(place)
            else:
                runs.append([place])
        return runs

    def _places_of(self, spec: ParameterSpec) -> list[BlockPlace | BytePlace]:
        """What `spec` is made of, in the order of its rows."""
        end = spec.offset + spec.num_bytes
        places: list[BlockPlace | BytePlace] = [*self.blocks, *self.plain]
        own = [place for place in places if spec.offset <= place.target_offset < end]
        return sorted(own, key=lambda place: place.target_offset)


def _row_bytes(spec: ParameterSpec) -> int:
    return spec.shape[1] * spec.dtype.itemsize


def _part(place: BlockPlace | BytePlace, spec: ParameterSpec, blob: torch.Tensor) -> Part:
    if isinstance(place, BlockPlace):
        data = blob[place.offset : place.offset + place.block.num_bytes]
        return Part(form=Form.PACKED, num_rows=place.block.num_rows, rows=data)
    rows = blob[place.offset : place.offset + place.num_bytes].view(spec.dtype)
    rows = rows.view(-1, spec.shape[1])
    return Part(form=Form.PLAIN, num_rows=len(rows), rows=rows)


@cache
def _codec() -> BlockCodec:
    return load_codec()
