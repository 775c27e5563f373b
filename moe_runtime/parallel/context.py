"""Keys and values of every sequence in flight, kept by every rank, so that a row may be anywhere.

P positions of all sequences together, N rows of a forward of all ranks together, R rows that are
on this rank, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_runtime.parallel.ledger import CONTEXT, Ledger
from moe_runtime.parallel.packed_rows import columns
from moe_runtime.parallel.traffic import NUMBER_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What one decoder layer caches of a token: heads and sizes of keys and of values."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one token."""
        numbers = self.key[0] * self.key[1] + self.value[0] * self.value[1]
        return numbers * self.dtype.itemsize


class SharedContext:
    """What attention of any rank may look at. Rows of a forward get places in order of number.

    Layers come in order, each once a forward. Where every sequence of a forward has one new token,
    which sees no other of the same forward, rows are exchanged once, at its end (ExFlow, section
    4.1); else in every layer, as tokens of a prompt see each other.
    """

    def __init__(self, shapes: Sequence[KVShape], ledger: Ledger) -> None:
        self._shapes = list(shapes)
        self._ledger = ledger
        device = ledger.device
        self.sequence_P = torch.empty(0, dtype=torch.int64, device=device)
        self.position_P = torch.empty(0, dtype=torch.int64, device=device)
        self._pools = [
            tuple(
                torch.zeros((heads, 0, size), dtype=shape.dtype, device=device)
                for heads, size in (shape.key, shape.value)
            )
            for shape in shapes
        ]
        self._first = 0  # place of row 0 of this forward
        self._is_late = False
        self._late: list[torch.Tensor] = []  # packed rows of layers whose exchange waits
        self._late_counts: list[list[int]] = []
        self._number_R = torch.empty(0, dtype=torch.int32)
        self._counts: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return sum(pool.nbytes for pools in self._pools for pool in pools)

    def begin(self, sequence_N: torch.Tensor, position_N: torch.Tensor) -> None:
        """Make room for the rows of a forward."""
        self._first = len(self.sequence_P)
        # sync: the host plans the exchange
        self._is_late = len(set(sequence_N.tolist())) == len(sequence_N)
        self.sequence_P = torch.cat([self.sequence_P, sequence_N])
        self.position_P = torch.cat([self.position_P, position_N])
        for layer, pools in enumerate(self._pools):
            self._pools[layer] = tuple(
                torch.cat([pool, pool.new_zeros((len(pool), len(sequence_N), pool.shape[2]))], 1)
                for pool in pools
            )

    def forget(self, sequences: torch.Tensor) -> None:
        """Drop what is kept of `sequences`."""
        kept = (~torch.isin(self.sequence_P, sequences)).nonzero().squeeze(1)
        self.sequence_P, self.position_P = self.sequence_P[kept], self.position_P[kept]
        for layer, pools in enumerate(self._pools):
            self._pools[layer] = tuple(pool[:, kept] for pool in pools)

    def visible(self, sequence_R: torch.Tensor, position_R: torch.Tensor) -> torch.Tensor:
        """`[R, P]` bool: what a row may attend to, itself and its sequence before it."""
        same = sequence_R.unsqueeze(1) == self.sequence_P
        return same & (self.position_P <= position_R.unsqueeze(1))

    def enter(self, number_R: torch.Tensor, rows_by_rank: list[int]) -> None:
        """These rows are here in the next layer, and so many on every rank."""
        self._number_R, self._counts = number_R, rows_by_rank

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `[1, H, R, d]` of the rows here; returns `[1, H, P, d]` of everything; collective."""
        rows = [part[0].transpose(0, 1).flatten(1) for part in (keys, values)]
        number = self._number_R.unsqueeze(1)
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in (*rows, number)], dim=1)
        if self._is_late:
            self._late.append(packed)
            self._late_counts.append(self._counts)
            self._put(layer, packed)
        else:
            self._expect(packed)
            for part in self._ledger.gather_rows(CONTEXT, packed, self._counts):
                self._put(layer, part)
        pool_keys, pool_values = self._pools[layer]
        return pool_keys.unsqueeze(0), pool_values.unsqueeze(0)

    def update_nothing(self, layer: int) -> None:
        """Take part where no row is here."""
        shape = self._shapes[layer]
        empty = [
            torch.empty((1, heads, 0, size), dtype=shape.dtype, device=self._ledger.device)
            for heads, size in (shape.key, shape.value)
        ]
        self.update(layer, *empty)

    def finish(self) -> None:
        """The exchange that waited; collective."""
        if not self._is_late:
            return
        widths = [packed.shape[1] for packed in self._late]
        flat = torch.cat([packed.flatten() for packed in self._late])
        self._expect(flat)
        counts = torch.tensor(self._late_counts) * torch.tensor(widths).unsqueeze(1)
        for part, sizes in zip(
            self._ledger.gather_rows(CONTEXT, flat, counts.sum(0).tolist()),
            counts.t().tolist(),
            strict=True,
        ):
            for layer, rows in enumerate(torch.split(part, sizes)):
                self._put(layer, rows.view(-1, widths[layer]))
        self._late, self._late_counts = [], []

    def _expect(self, rows: torch.Tensor) -> None:
        self._ledger.expect(CONTEXT, [rows.nbytes] * self._ledger.num_ranks)

    def _put(self, layer: int, packed: torch.Tensor) -> None:
        """Each row to the place of its number."""
        shape = self._shapes[layer]
        begin = 0
        number = columns(packed, shape.num_bytes, shape.num_bytes + NUMBER_BYTES, torch.int32)
        places = number.squeeze(1).long() + self._first
        for pool, (heads, size) in zip(self._pools[layer], (shape.key, shape.value), strict=True):
            end = begin + heads * size * shape.dtype.itemsize
            rows = columns(packed, begin, end, shape.dtype).view(-1, heads, size)
            pool[:, places] = rows.transpose(0, 1)
            begin = end
