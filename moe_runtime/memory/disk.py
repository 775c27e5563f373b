"""Reads extents of files into blobs, past the page cache where the file system allows."""

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from moe_runtime.errors import ExpertReadError
from moe_runtime.kernels.cpu.quantise import load_quantiser
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.memory.ahead_line import AheadLine, AheadRead, read_now
from moe_runtime.memory.anonymous_memory import Blob, anonymous_memory
from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.packing import ITEM_BYTES, require_intact
from moe_runtime.memory.quantised_blob import row_tensors
from moe_runtime.memory.read_watch import ReadWatch
from moe_runtime.memory.reader_pool import ReaderPool
from moe_runtime.memory.tensor_map import BlockMove, ByteMove, Extent, RowsMove, StridedMove

# One expert's reads must fill the disk's queue by themselves: with few misses in a layer nothing
# else does. But each piece is Python's work beside the layer's own: with experts of 12.6 MB at 2.5
# GB/s, a decode step of 1 and of 8 tokens takes 0.92 and 0.95 of its time with pieces of half the
# size; twice the size gains with one token and loses with eight. A demand may wait for one, 0.6 ms.
CHUNK_BYTES = 1536 * 2**10
# A parameter of more bytes has pieces of its own, which may be read in place.
_LARGE_BYTES = 704 * 2**10
NUM_THREADS = 8
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _OpenFile:
    path: Path
    descriptor: int
    num_bytes: int
    modified_ns: int
    block_bytes: int  # reads start and end on multiples of this; 1 through the page cache


class DiskReader:
    """Owns open files, a small pool of threads and their aligned buffers.

    `direct` asks for O_DIRECT reads, which leave the page cache alone, so that a memory budget is
    one; where the file system refuses, reads go through the page cache and `is_direct` says so.
    `ahead` is the line of reads that nobody has demanded. A `watch` hears of every read.
    """

    def __init__(
        self,
        files: Iterable[Path],
        *,
        direct: bool = True,
        num_threads: int = NUM_THREADS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        # Borders inside an extent are rounded down to pages and must stay in order.
        assert chunk_bytes >= 2 * _PAGE_BYTES, chunk_bytes
        self._files: dict[Path, _OpenFile] = {}
        # Also when the reader is simply forgotten; the pool ends its threads by itself then.
        self._close_files = weakref.finalize(self, _close_all, self._files)
        try:
            for path in files:
                self._files[path] = _open(path, direct)
        except BaseException:
            self._close_files()
            raise
        self._chunk_bytes = chunk_bytes
        self._codec = load_codec()
        self._quantise = load_quantiser()
        # Every plain read borrows one of these: all memory is known now.
        self._buffers: SimpleQueue[Blob] = SimpleQueue()
        # Each on a page of its own.
        buffer_bytes = -(-chunk_bytes // _PAGE_BYTES) * _PAGE_BYTES + 2 * _PAGE_BYTES
        for buffer in anonymous_memory(num_threads * buffer_bytes).reshape(num_threads, -1):
            self._buffers.put(buffer)
        self._pool = ReaderPool(num_threads, "moe-runtime-disk")
        self.ahead = AheadLine(self._pool)
        self._counter_lock = threading.Lock()
        self._bytes_read = 0
        self.watch: ReadWatch | None = None

    @property
    def is_direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(file.block_bytes > 1 for file in self._files.values())

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the operating system so far, alignment included."""
        return self._bytes_read

    def submit(
        self,
        extents: tuple[Extent, ...],
        layout: ExpertLayout,
        blob: Blob,
        load: ExpertLoad,
        on_complete: Callable[[], None] | None = None,
    ) -> None:
        """Start reading one expert into `blob`; `on_complete` runs once, before waiters wake.

        If it raises (an interrupt), `load` is settled: nothing writes to `blob` any more.
        """
        pieces = self._pieces(extents, layout, blob)
        read_now(self._pool, pieces, load, on_complete)

    def ahead_read(
        self,
        extents: tuple[Extent, ...],
        layout: ExpertLayout,
        blob: Blob,
        load: ExpertLoad,
        on_complete: Callable[[], None] | None = None,
    ) -> AheadRead:
        """One expert for the line `ahead`, which nothing reads before it is put there."""
        return AheadRead(self._pieces(extents, layout, blob), load, on_complete)

    def close(self) -> None:
        """Finish the reads under way, end the threads and close the files."""
        self.ahead.clear()
        self._pool.shutdown()
        self._close_files()

    def _pieces(
        self, extents: tuple[Extent, ...], layout: ExpertLayout, blob: Blob
    ) -> deque[Callable[[], None]]:
        """The jobs that read one expert together."""
        jobs: deque[Callable[[], None]] = deque()
        for extent in extents:
            if isinstance(extent.moves[0], ByteMove):
                jobs += self._chunk_jobs(extent, blob)
            elif isinstance(extent.moves[0], BlockMove):
                jobs += self._block_jobs(extent, blob)
            elif isinstance(extent.moves[0], RowsMove):
                file = self._files[extent.file]
                jobs += [partial(self._read_rows, file, move, blob) for move in extent.moves]
            else:
                jobs.append(lambda e=extent: self._read_strided(e, layout, blob))  # type: ignore[misc]
        assert jobs, "an expert without bytes"
        return jobs

    def _chunk_jobs(self, extent: Extent, blob: Blob) -> list[Callable[[], None]]:
        """Chunks of an extent of plain bytes, each a read and its copies.

        What is large has chunks of its own, which can be read in place; what is smaller shares
        them.
        """
        file = self._files[extent.file]
        jobs: list[Callable[[], None]] = []
        for moves in _runs(extent, min(self._chunk_bytes, _LARGE_BYTES)):
            first, last = moves[0].file_offset, moves[-1].file_offset + moves[-1].num_bytes
            for start, end in itertools.pairwise(_borders(first, last, self._chunk_bytes)):
                copies = []
                for move in moves:
                    source = max(move.file_offset, start)
                    length = min(move.file_offset + move.num_bytes, end) - source
                    if length > 0:
                        destination = move.blob_offset + source - move.file_offset
                        copies.append((source - start, length, destination))
                jobs.append(partial(self._read_plain, file, start, end - start, copies, blob))
        return jobs

    def _block_jobs(self, extent: Extent, blob: Blob) -> list[Callable[[], None]]:
        """Whole blocks, as many as a chunk holds, each job a read and what becomes of them."""
        groups: list[list[BlockMove]] = []
        for move in extent.moves:
            assert isinstance(move, BlockMove)
            end = move.file_offset + move.num_bytes
            if not groups or end - groups[-1][0].file_offset > self._chunk_bytes:
                groups.append([])
            groups[-1].append(move)
        file = self._files[extent.file]
        return [partial(self._read_blocks, file, group, blob) for group in groups]

    def _read_blocks(self, file: _OpenFile, moves: list[BlockMove], blob: Blob) -> None:
        first, last = moves[0], moves[-1]
        num_bytes = last.file_offset + last.num_bytes - first.file_offset
        with self._buffer(num_bytes) as buffer:
            if first.keeps_packed:  # neighbours in the file are neighbours in the blob
                data = blob[first.blob_offset : first.blob_offset + num_bytes]
                if not self._read_in_place(file, first.file_offset, data, buffer):
                    np.copyto(data, self._read(file, first.file_offset, num_bytes, buffer))
            else:
                data = self._read(file, first.file_offset, num_bytes, buffer)
            tasks = []
            for move in moves:
                start = move.file_offset - first.file_offset
                packed = torch.from_numpy(data[start : start + move.num_bytes])
                weights = None
                if not move.keeps_packed:
                    end = move.blob_offset + move.block.num_elements * ITEM_BYTES
                    weights = torch.from_numpy(blob[move.blob_offset : end])
                tasks.append(move.block.task(packed, weights))
            # Past the caches: other experts may be computing out of them.
            status = self._codec.run(tasks, stream=True)
            require_intact(status, [move.block for move in moves], file.path)

    def _read_rows(self, file: _OpenFile, move: RowsMove, blob: Blob) -> None:
        with self._buffer(move.num_bytes) as buffer:
            data = torch.from_numpy(self._read(file, move.file_offset, move.num_bytes, buffer))
            if move.block is not None:
                weights = torch.empty(move.block.num_elements * ITEM_BYTES, dtype=torch.uint8)
                status = self._codec.run([move.block.task(data, weights)])
                require_intact(status, [move.block], file.path)
                data = weights
            elif data.data_ptr() % ITEM_BYTES:  # a file may hold a tensor at an odd address
                data = data.clone()
            shape = (move.num_rows, move.num_columns)
            values, scales = row_tensors(
                torch.from_numpy(blob),
                move.values_offset,
                move.scales_offset,
                *shape,
                move.dtype,
            )
            self._quantise(data.view(torch.bfloat16).view(shape), move.dtype, values, scales)

    @contextmanager
    def _buffer(self, num_bytes: int) -> Iterator[Blob]:
        """Room for a read of so many bytes: one of the pool's, or for very long rows a new one."""
        if num_bytes > self._chunk_bytes:
            yield anonymous_memory(num_bytes + 2 * _PAGE_BYTES)
            return
        buffer = self._buffers.get()
        try:
            yield buffer
        finally:
            self._buffers.put(buffer)

    def _read_plain(
        self,
        file: _OpenFile,
        offset: int,
        num_bytes: int,
        copies: list[tuple[int, int, int]],
        blob: Blob,
    ) -> None:
        with self._buffer(num_bytes) as buffer:
            if len(copies) == 1 and copies[0][1] == num_bytes:
                destination = copies[0][2]
                target = blob[destination : destination + num_bytes]
                if self._read_in_place(file, offset, target, buffer):
                    return
            data = self._read(file, offset, num_bytes, buffer)
            for source, length, destination in copies:
                np.copyto(blob[destination : destination + length], data[source : source + length])

    def _read_in_place(self, file: _OpenFile, offset: int, target: Blob, buffer: Blob) -> bool:
        """Fill `target` from the disk with no copy between, where both lie alike in their blocks.

        The blocks at its ends, of which it has a part, go through `buffer`. False, with `target` in
        any state, where it lies otherwise, or where the read gave less than was asked for.
        """
        block, num_bytes = file.block_bytes, len(target)
        if block == 1 or (target.ctypes.data - offset) % block or num_bytes < 4 * block:
            return False
        start, end = offset // block * block, -(-(offset + num_bytes) // block) * block
        first = start + block if start < offset else start  # of the blocks that are whole
        last = end - block if end > offset + num_bytes else end
        head, tail = buffer[:block], buffer[block : 2 * block]
        vectors: list[Any] = [target[first - offset : last - offset]]
        vectors = ([head] if first > start else []) + vectors + ([tail] if last < end else [])
        try:
            count = self._ask(file, vectors, start)
        except OSError:
            return False  # the plain way tries again, and says what is wrong
        if start + count < offset + num_bytes:
            return False
        target[: first - offset] = head[offset - start :][: first - offset]
        target[last - offset :] = tail[: offset + num_bytes - last]
        self._account(file, offset, count)
        return True

    def _read_strided(self, extent: Extent, layout: ExpertLayout, blob: Blob) -> None:
        file = self._files[extent.file]
        buffer = anonymous_memory(extent.num_bytes + 2 * _PAGE_BYTES)
        data = torch.from_numpy(self._read(file, extent.offset, extent.num_bytes, buffer))
        if extent.blocks:
            data = self._unpacked(data, extent, file)
        views = layout.as_read.views(torch.from_numpy(blob))
        for move in extent.moves:
            assert isinstance(move, StridedMove)
            first = move.file_offset - extent.offset
            # A tensor's first byte may stand at an odd address; view() wants it aligned.
            source = data[first : first + move.num_bytes]
            if (source.data_ptr()) % move.dtype.itemsize:
                source = source.clone()
            target = views[move.parameter.name]
            for dim, (start, length) in enumerate(zip(move.start, move.size, strict=True)):
                target = target.narrow(dim, start, length)
            target.copy_(source.view(move.dtype).as_strided(move.size, move.stride))

    def _unpacked(self, data: torch.Tensor, extent: Extent, file: _OpenFile) -> torch.Tensor:
        """The bytes of the weights in the blocks of `extent`."""
        num_weights = sum(block.num_elements for block in extent.blocks)
        weights = torch.empty(num_weights * ITEM_BYTES, dtype=torch.uint8)
        tasks, end = [], 0
        for block in extent.blocks:
            start, end = end, end + block.num_elements * ITEM_BYTES
            first = block.offset - extent.offset
            packed = data[first : first + block.num_bytes]
            tasks.append(block.task(packed, weights[start:end]))
        require_intact(self._codec.run(tasks), extent.blocks, file.path)
        return weights

    def _read(self, file: _OpenFile, offset: int, num_bytes: int, buffer: Blob) -> Blob:
        """Exactly the wanted bytes, as a view into `buffer`. Raises ExpertReadError."""
        block = file.block_bytes
        start = offset // block * block
        end = -(-(offset + num_bytes) // block) * block
        done = 0
        while start + done < offset + num_bytes:
            try:
                count = self._ask(file, [buffer[done : end - start]], start + done)
            except OSError as error:
                raise ExpertReadError(
                    f"reading {file.path} at offset {start + done} failed: {error.strerror}; "
                    "check the disk, then load the model again"
                ) from error
            before, done = done, done + count
            if start + done < offset + num_bytes:
                # Direct reads go on from a block border; only the end of a file gives less.
                done -= done % block
                if done == before:
                    raise ExpertReadError(
                        f"{file.path} ends at offset {start + before + count}, and "
                        f"{offset + num_bytes} was expected: it was truncated while in use; "
                        "restore it and load the model again"
                    )
        self._account(file, offset, done)
        return buffer[offset - start :][:num_bytes]

    def _ask(self, file: _OpenFile, vectors: list[Any], offset: int) -> int:
        """One read of the operating system; how many bytes it gave."""
        watch = self.watch
        if watch is None:
            return os.preadv(file.descriptor, vectors, offset)
        watch.begun()
        try:
            return os.preadv(file.descriptor, vectors, offset)
        finally:
            watch.ended(sum(map(len, vectors)))

    def _account(self, file: _OpenFile, offset: int, num_bytes: int) -> None:
        """After a read: the file is still the one that was opened, and so many bytes were asked."""
        status = os.fstat(file.descriptor)
        if (status.st_size, status.st_mtime_ns) != (file.num_bytes, file.modified_ns):
            raise ExpertReadError(
                f"{file.path} changed while in use (read at offset {offset}); load the model again"
            )
        with self._counter_lock:
            self._bytes_read += num_bytes


def _runs(extent: Extent, large_bytes: int) -> list[list[ByteMove]]:
    """The moves in order, each large one by itself and neighbours of the others together."""
    runs: list[list[ByteMove]] = []
    was_large = True
    for move in extent.moves:
        assert isinstance(move, ByteMove)
        is_large = move.num_bytes > large_bytes
        if is_large or was_large:
            runs.append([])
        runs[-1].append(move)
        was_large = is_large
    return runs


def _borders(start: int, end: int, chunk_bytes: int) -> list[int]:
    """Of equal chunks; inner ones on whole pages, so that neighbours read no block twice."""
    num_chunks = -(-(end - start) // chunk_bytes)
    step = -(-(end - start) // num_chunks)
    inner = [(start + i * step) // _PAGE_BYTES * _PAGE_BYTES for i in range(1, num_chunks)]
    return [start, *inner, end]


def _close_all(files: dict[Path, _OpenFile]) -> None:
    while files:
        os.close(files.popitem()[1].descriptor)


def _open(path: Path, direct: bool) -> _OpenFile:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ExpertReadError(f"{path} cannot be opened: {error.strerror}") from error
    block_bytes = 1
    if direct:
        direct_descriptor, block_bytes = _open_direct(path)
        if direct_descriptor is not None:
            os.close(descriptor)
            descriptor = direct_descriptor
    status = os.fstat(descriptor)
    return _OpenFile(path, descriptor, status.st_size, status.st_mtime_ns, block_bytes)


def _open_direct(path: Path) -> tuple[int | None, int]:
    """A descriptor for direct reads and the block they need, or (None, 1)."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None, 1
    try:
        descriptor = os.open(path, os.O_RDONLY | flag)
    except OSError:
        return None, 1
    probe = anonymous_memory(2 * _PAGE_BYTES)
    # The second read tells whether memory and offset may be aligned to less than a page.
    for block in (512, _PAGE_BYTES):
        try:
            os.preadv(descriptor, [probe[block : 2 * block].data], block)
        except OSError:
            continue
        return descriptor, block
    os.close(descriptor)
    return None, 1
