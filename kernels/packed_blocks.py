"""Lossless blocks of packed bf16 weights, by torch: the format, and what runs without a compiler.

A block holds N rows of K weights. The low byte of a weight (the last exponent bit and the mantissa)
is stored as it is; the high byte (sign and seven exponent bits) as a 4-bit code for one of the 15
that are most frequent in the block, or as code 15 and a byte in the escape list: 12 bits a weight
and 8 for each escape. `docs/formats.md` has the layout. That exponents of trained weights carry
few bits: ZipNN (Hershcovitch et al., 2024, arXiv:2411.05239) and DFloat11 (Zhang et al., 2025,
arXiv:2504.11651), which use Huffman codes where this uses fixed ones, so that a row can be found
and computed with at once.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# N rows and K columns of a block

TILE = 128
TILE_BYTES = 192
ESCAPE = 15
GROUP_WEIGHTS = 4096
HEADER_BYTES = 64
PADDING_BYTES = 64  # a sealed block is a multiple of this
MAGIC = 0x3150524D  # "MRP1"

_HEADER = struct.Struct("<QQIIII16s16x")
_MASK = 2**64 - 1
_KEY = (
    0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93,
    0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3,
)  # fmt: skip
_STEP = 0x2545F4914F6CDD1D
# Where each of the 128 bytes of a tile's low plane comes from in the row.
TILE_ORDER = tuple(p // 64 * 64 + p % 16 // 8 * 32 + p % 64 // 16 * 8 + p % 8 for p in range(TILE))

INTACT, ALTERED, FOREIGN = range(3)


def row_bytes(K: int) -> int:
    """Bytes of one packed row, escapes left out."""
    tail = K % TILE
    return K // TILE * TILE_BYTES + tail + (tail + 1) // 2


def group_rows(K: int) -> int:
    """Rows that share one entry of the escape index."""
    return -(-GROUP_WEIGHTS // K)


def index_entries(N: int, K: int) -> int:
    """Entries of the escape index: one a group of rows, and the number of all."""
    return -(-N // group_rows(K)) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTask:
    """A sealed block to check and, unless `weights` is None, to unpack there.

    `block`: uint8 `[bytes]`; `weights`: contiguous memory of N * K weights of 2 bytes, any dtype.
    """

    block: torch.Tensor
    N: int
    K: int
    identity: int
    weights: torch.Tensor | None


class BlockCodec(Protocol):
    """Packs, seals, checks and unpacks; all implementations agree in every byte."""

    def pack(self, weights_NK: torch.Tensor) -> torch.Tensor:
        """The block of bf16 or other 2-byte weights, neither padded nor sealed: uint8."""

    def seal(self, block: torch.Tensor, identity: int) -> None:
        """Name a padded block and write its checksum."""

    def checksum(self, data: torch.Tensor) -> int:
        """64 bits of contiguous uint8 `data`."""

    def run(
        self,
        tasks: Sequence[BlockTask],
        *,
        num_threads: int = 1,
        stream: bool = False,
        is_known: bool = False,
    ) -> list[int]:
        """INTACT, ALTERED or FOREIGN for each task.

        `stream` writes past the caches; `is_known` trusts checksums that were right before.
        """


class TorchCodec:
    """The codec where there is no compiled library."""

    def pack(self, weights_NK: torch.Tensor) -> torch.Tensor:
        N, K = weights_NK.shape
        both_NK2 = weights_NK.contiguous().view(torch.uint8).view(N, K, 2)
        low_NK, high_NK = _to_places(both_NK2[..., 0]), _to_places(both_NK2[..., 1])
        counts = torch.bincount(high_NK.reshape(-1).long(), minlength=256)
        frequent = torch.sort(counts, descending=True, stable=True).indices[:ESCAPE]
        frequent = frequent[counts[frequent] > 0]
        codes = torch.full((256,), ESCAPE, dtype=torch.uint8)
        codes[frequent] = torch.arange(len(frequent), dtype=torch.uint8)
        code_NK = codes[high_NK.long()]
        is_escape_NK = code_NK == ESCAPE
        escapes = high_NK[is_escape_NK]
        starts = _starts(is_escape_NK)
        table = torch.zeros(16, dtype=torch.uint8)
        table[: len(frequent)] = frequent.to(torch.uint8)
        header = _HEADER.pack(0, 0, MAGIC, N, K, len(escapes), bytes(table.tolist()))
        index = struct.pack(f"<{len(starts)}I", *starts)
        return torch.cat(
            [_bytes(header), _with_codes(low_NK, code_NK).reshape(-1), _bytes(index), escapes]
        )

    def seal(self, block: torch.Tensor, identity: int) -> None:
        block[:16] = _bytes(struct.pack("<QQ", 0, identity))
        block[:8] = _bytes(struct.pack("<Q", self.checksum(block)))

    def checksum(self, data: torch.Tensor) -> int:
        num_bytes = data.numel()
        padded = torch.zeros(-(-num_bytes // 64) * 64, dtype=torch.uint8)
        padded[:num_bytes] = data
        words_S8 = padded.view(torch.int64).view(-1, 8)
        key_8 = torch.tensor([_signed(key) for key in _KEY])
        stripe_S1 = torch.arange(len(words_S8)).unsqueeze(1)
        mixed_S8 = words_S8 ^ (key_8 + stripe_S1 * _STEP)  # int64 wraps around, as intended
        product_S8 = (mixed_S8 & 0xFFFFFFFF) * (mixed_S8 >> 32 & 0xFFFFFFFF)
        neighbour_S8 = words_S8.view(-1, 4, 2).flip(2).reshape(-1, 8)
        lanes = key_8 + (neighbour_S8 + product_S8).sum(0)
        total = num_bytes
        for lane in lanes.tolist():
            total = (total ^ lane & _MASK) * _KEY[0] & _MASK
            total ^= total >> 29
        return total

    def run(
        self,
        tasks: Sequence[BlockTask],
        *,
        num_threads: int = 1,
        stream: bool = False,
        is_known: bool = False,
    ) -> list[int]:
        return [self._run(task, is_known) for task in tasks]

    def _run(self, task: BlockTask, is_known: bool) -> int:
        N, K, block = task.N, task.K, task.block
        if block.numel() < HEADER_BYTES:
            return ALTERED
        head = bytes(block[:HEADER_BYTES].tolist())
        checksum, identity, magic, rows, columns, num_escapes, table = _HEADER.unpack(head)
        if not is_known:
            unsealed = block.clone()
            unsealed[:8] = 0
            if self.checksum(unsealed) != checksum:
                return ALTERED
        if (magic, identity, rows, columns) != (MAGIC, task.identity, N, K):
            return FOREIGN
        if task.weights is None:
            return INTACT
        end = HEADER_BYTES + N * row_bytes(K)
        first = end + 4 * index_entries(N, K)
        low_NK, code_NK = _split(block[HEADER_BYTES:end].view(N, -1), K)
        high_NK = _bytes(table)[code_NK.long()]
        is_escape_NK = code_NK == ESCAPE
        escapes = block[first : first + num_escapes]
        index = struct.unpack(f"<{index_entries(N, K)}I", bytes(block[end:first].tolist()))
        if list(index) != _starts(is_escape_NK) or not index[-1] == num_escapes == len(escapes):
            return ALTERED
        high_NK[is_escape_NK] = escapes
        both_NK2 = torch.stack([_from_places(low_NK), _from_places(high_NK)], 2)
        task.weights.view(-1).view(torch.uint8).copy_(both_NK2.view(-1))
        return INTACT


def _starts(is_escape_NK: torch.Tensor) -> list[int]:
    """The escape index: escapes before each group of rows, and all."""
    counts_N = is_escape_NK.sum(1)
    before_N = counts_N.cumsum(0) - counts_N
    return [*before_N[:: group_rows(is_escape_NK.shape[1])].tolist(), int(counts_N.sum())]


def _to_places(bytes_NK: torch.Tensor) -> torch.Tensor:
    """Bytes of a row in the order in which the block holds them; the tail stays in order."""
    return _reordered(bytes_NK, torch.tensor(TILE_ORDER))


def _from_places(bytes_NK: torch.Tensor) -> torch.Tensor:
    return _reordered(bytes_NK, torch.tensor(TILE_ORDER).argsort())


def _reordered(bytes_NK: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    N, K = bytes_NK.shape
    whole = K // TILE * TILE
    tiles = bytes_NK[:, :whole].reshape(N, -1, TILE)
    return torch.cat([tiles[..., order].reshape(N, whole), bytes_NK[:, whole:]], 1)


def _with_codes(low_NK: torch.Tensor, code_NK: torch.Tensor) -> torch.Tensor:
    """Low bytes and codes of rows as the block holds them: `[N, row_bytes(K)]`."""
    N, K = low_NK.shape
    whole, tail = K // TILE * TILE, K % TILE
    codes = code_NK[:, :whole].reshape(N, -1, 2, 64)
    nibbles = codes[:, :, 0] | codes[:, :, 1] << 4
    tiles = torch.cat([low_NK[:, :whole].reshape(N, -1, TILE), nibbles], 2).reshape(N, -1)
    half = (tail + 1) // 2
    tail_codes = torch.zeros(N, 2 * half, dtype=torch.uint8)
    tail_codes[:, :tail] = code_NK[:, whole:]
    tail_nibbles = tail_codes[:, :half] | tail_codes[:, half:] << 4
    return torch.cat([tiles, low_NK[:, whole:], tail_nibbles], 1)


def _split(rows: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, row_bytes(K)]` as low bytes and codes, `[N, K]` each."""
    N, tail = len(rows), K % TILE
    end = K // TILE * TILE_BYTES
    tiles = rows[:, :end].reshape(N, -1, TILE_BYTES)
    nibbles = tiles[..., TILE:]
    codes = torch.cat([nibbles & 15, nibbles >> 4], 2).reshape(N, -1)
    tail_nibbles = rows[:, end + tail :]
    tail_codes = torch.cat([tail_nibbles & 15, tail_nibbles >> 4], 1)[:, :tail]
    low = torch.cat([tiles[..., :TILE].reshape(N, -1), rows[:, end : end + tail]], 1)
    return low, torch.cat([codes, tail_codes], 1)


def _bytes(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
