"""Laws of the disk reader: the right bytes, no more reads than needed, and no half-read expert."""

import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_runtime.errors import ExpertReadError
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.anonymous_memory import anonymous_memory
from moe_runtime.memory.disk import CHUNK_BYTES, DiskReader
from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.layout import BLOCK_BYTES, ExpertLayout
from moe_runtime.memory.tensor_map import ByteMove, Extent, TensorMap
from tests.expert_files import FileWriter, Parameter, Weights, make_layer, random_layers

SMALL_CHUNK = 8192  # so that small experts are read in several pieces
BLOCK = 4096


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder on a real disk: the temporary folder may be memory."""
    return tmp_path


def read_expert(reader: DiskReader, tensor_map: TensorMap, key: ExpertKey) -> Weights:
    """All parameters of `key`, from a blob that was full of NaN."""
    blob = aligned_blob(tensor_map.slot_bytes)
    load = ExpertLoad()
    reader.submit(tensor_map.extents(key), tensor_map.layout(key), blob, load)
    load.wait()
    return tensor_map.layout(key).views(torch.from_numpy(blob))


def aligned_blob(num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    memory = np.full(num_bytes + 64, 0xFF, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = {2: torch.int16, 4: torch.int32}[found.dtype.itemsize]
    assert torch.equal(found.view(bits), expected.contiguous().view(bits))


def assert_all_read(reader: DiskReader, tensor_map: TensorMap, weights: list[Weights]) -> None:
    for layer, expected in enumerate(weights):
        for expert in range(tensor_map.layers[layer].num_experts):
            found = read_expert(reader, tensor_map, ExpertKey(layer, expert))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert_same_bits(found[name], value[expert])


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "page cache"])
@pytest.mark.parametrize("seed", range(40))
def test_blobs_are_the_weights(seed: int, direct: bool, folder: Path) -> None:
    """Law: whatever the layout in files, a blob read is the converted weights, bit for bit.

    Bytes asked of the system are what the extents hold, plus at most two blocks each.
    """
    rng = random.Random(seed)
    scale = 6 if seed % 4 == 0 else 1  # some need several chunks
    tensor_map, weights = random_layers(rng, folder, num_layers=2, scale=scale)
    with closing(DiskReader(tensor_map.files(), direct=direct, chunk_bytes=SMALL_CHUNK)) as reader:
        assert_all_read(reader, tensor_map, weights)
        extents = [
            extent
            for layer, group in enumerate(tensor_map.layers)
            for expert in range(group.num_experts)
            for extent in tensor_map.extents(ExpertKey(layer, expert))
        ]
        wanted = sum(extent.num_bytes for extent in extents)
        most = wanted + (2 * BLOCK * len(extents) if reader.is_direct else 0)
        assert wanted <= reader.bytes_read <= most


def big_layer(folder: Path, seed: int = 0, width: int = 500) -> tuple[TensorMap, list[Weights]]:
    """Four fused experts of 600 kB or more: several chunks of any size tested here."""
    writer = FileWriter(folder, random.Random(seed), 1)
    layer, weights = make_layer(
        [Parameter("up", "fused", (300, width)), Parameter("down", "fused", (width, 300))],
        4,
        writer,
        torch.Generator().manual_seed(seed),
    )
    writer.write(tail_bytes=2 * BLOCK)
    return TensorMap([layer]), [weights]


@pytest.mark.parametrize("chunk_bytes", [SMALL_CHUNK, 65_536, 100_001, CHUNK_BYTES])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_chunk_size(folder: Path, chunk_bytes: int, num_threads: int) -> None:
    """Law: neither the size of pieces nor the number of threads changes a bit or a block read."""
    tensor_map, weights = big_layer(folder)
    reader = DiskReader(tensor_map.files(), chunk_bytes=chunk_bytes, num_threads=num_threads)
    with closing(reader):
        assert_all_read(reader, tensor_map, weights)
        payload = tensor_map.total_bytes
        assert payload <= reader.bytes_read <= payload + 8 * 2 * BLOCK


def io_counter(name: str) -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)[name])


def test_direct_reads_reach_the_disk_once(folder: Path) -> None:
    """Law: what the kernel counts as read from storage is `bytes_read`, and no more."""
    tensor_map, weights = big_layer(folder)
    with closing(DiskReader(tensor_map.files(), chunk_bytes=65_536)) as reader:
        if not reader.is_direct:
            pytest.skip(f"{folder} has no direct reads")
        read_expert(reader, tensor_map, ExpertKey(0, 0))  # writes back what is still dirty
        before, before_bytes = io_counter("read_bytes"), reader.bytes_read
        assert_all_read(reader, tensor_map, weights)
        assert io_counter("read_bytes") - before == reader.bytes_read - before_bytes


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "page cache"])
def test_every_read_is_counted(folder: Path, direct: bool) -> None:
    """Law: `bytes_read` is what the process received from read calls, in both modes."""
    tensor_map, weights = big_layer(folder)
    with closing(DiskReader(tensor_map.files(), direct=direct, chunk_bytes=65_536)) as reader:
        first = io_counter("rchar")
        own = io_counter("rchar") - first  # reading the counter counts too
        before = io_counter("rchar")
        assert_all_read(reader, tensor_map, weights)
        assert abs(io_counter("rchar") - before - own - reader.bytes_read) <= 8


def refuse_direct_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    real_preadv = os.preadv
    real_open, direct = os.open, set[int]()

    def remember(path: str, flags: int, *args: int, **kwargs: int) -> int:
        descriptor = real_open(path, flags, *args, **kwargs)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "preadv", refuse)


@pytest.mark.parametrize("refuse", [refuse_direct_open, refuse_direct_reads])
def test_without_direct_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Law: where O_DIRECT is refused, at opening or at reading, the page cache serves."""
    tensor_map, weights = random_layers(random.Random(1), folder)
    refuse(monkeypatch)
    with closing(DiskReader(tensor_map.files(), direct=True)) as reader:
        assert not reader.is_direct
        assert_all_read(reader, tensor_map, weights)


def test_page_cache_mode_says_so(folder: Path) -> None:
    """Law: a reader that was not asked for direct reads does not claim them."""
    tensor_map, _ = random_layers(random.Random(1), folder)
    with closing(DiskReader(tensor_map.files(), direct=False)) as reader:
        assert not reader.is_direct


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "page cache"])
def test_short_reads_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Law: a read call that returns less than asked is continued, on block borders if direct."""
    tensor_map, weights = big_layer(folder)
    real_preadv, rng = os.preadv, random.Random(0)
    with closing(DiskReader(tensor_map.files(), direct=direct, chunk_bytes=65_536)) as reader:

        def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            window = buffers[0]
            step = BLOCK if reader.is_direct else 1
            length = min(len(window), step * rng.randint(1, max(1, len(window) // step)))
            count = real_preadv(descriptor, [window[:length]], offset)
            return max(min(count, step), count - rng.randrange(1000))  # not even whole blocks

        monkeypatch.setattr(os, "preadv", short)
        assert_all_read(reader, tensor_map, weights)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "page cache"])
@pytest.mark.parametrize("left", [0, 512, 4096, 100_000, 250_001, 900_000])
@pytest.mark.timeout(20)
def test_truncated_file_stops(folder: Path, direct: bool, left: int) -> None:
    """Law: a file cut while in use raises ExpertReadError with file and offset, and never hangs."""
    tensor_map, _ = big_layer(folder)
    (file,) = tensor_map.files()
    key = ExpertKey(0, 3)
    with closing(DiskReader([file], direct=direct, chunk_bytes=65_536)) as reader:
        os.truncate(file, left)
        with pytest.raises(ExpertReadError, match=r"at offset \d+") as caught:
            read_expert(reader, tensor_map, key)
        assert str(file) in str(caught.value)
        assert "load the model again" in str(caught.value)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "page cache"])
@pytest.mark.timeout(20)
def test_every_truncation_point_stops(folder: Path, direct: bool) -> None:
    """Law: wherever the cut falls inside an expert, reading it raises and does not loop."""
    tensor_map, _ = random_layers(random.Random(5), folder)
    key = ExpertKey(0, tensor_map.layers[0].num_experts - 1)
    extent = tensor_map.extents(key)[-1]
    raw = extent.file.read_bytes()
    rng = random.Random(0)
    for _ in range(30):
        extent.file.write_bytes(raw)
        with closing(DiskReader(tensor_map.files(), direct=direct)) as reader:
            os.truncate(extent.file, extent.offset + rng.randrange(extent.num_bytes))
            with pytest.raises(ExpertReadError, match=r"(truncated|changed) while in use"):
                read_expert(reader, tensor_map, key)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "page cache"])
def test_changed_file_stops(folder: Path, direct: bool) -> None:
    """Law: a file written to while in use raises ExpertReadError, though its bytes can be read."""
    tensor_map, weights = big_layer(folder)
    (file,) = tensor_map.files()
    with closing(DiskReader([file], direct=direct)) as reader:
        assert_all_read(reader, tensor_map, weights)
        with file.open("r+b") as stream:
            stream.write(b"\0")
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with pytest.raises(ExpertReadError, match=r"changed while in use \(read at offset \d+\)"):
            read_expert(reader, tensor_map, ExpertKey(0, 1))


def test_read_error_names_file_and_offset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: an error of the disk raises ExpertReadError; the next read works if the disk does."""
    tensor_map, weights = big_layer(folder)
    (file,) = tensor_map.files()
    real_preadv = os.preadv

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with closing(DiskReader([file])) as reader:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(
            ExpertReadError, match=r"offset \d+ failed: Input/output error"
        ) as caught:
            read_expert(reader, tensor_map, ExpertKey(0, 2))
        assert str(file) in str(caught.value)
        monkeypatch.setattr(os, "preadv", real_preadv)
        assert_all_read(reader, tensor_map, weights)


def test_closed_descriptor_is_an_error(folder: Path) -> None:
    """Law: a descriptor closed behind our back raises ExpertReadError, not another file's bytes."""
    tensor_map, _ = big_layer(folder)
    (file,) = tensor_map.files()
    reader = DiskReader([file])
    descriptor = reader._files[file].descriptor
    os.close(descriptor)
    with pytest.raises(ExpertReadError, match="Bad file descriptor"):
        read_expert(reader, tensor_map, ExpertKey(0, 2))
    reader._files.clear()
    reader.close()


def test_absent_file_is_named(tmp_path: Path) -> None:
    """Law: a file that is gone raises ExpertReadError and leaves no open file behind."""
    there = tmp_path / "there.bin"
    there.write_bytes(b"0" * 10_000)
    before = open_files()
    with pytest.raises(ExpertReadError, match=r"absent\.bin cannot be opened: No such file"):
        DiskReader([there, tmp_path / "absent.bin"])
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def disk_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("moe-runtime-disk")]


def test_close_ends_threads_and_files(folder: Path) -> None:
    """Law: after close() no thread runs and no file is open, reads under way included."""
    tensor_map, weights = big_layer(folder)
    threads, files = len(disk_threads()), open_files()
    reader = DiskReader(tensor_map.files(), chunk_bytes=SMALL_CHUNK)
    key, load = ExpertKey(0, 0), ExpertLoad()
    blob = aligned_blob(tensor_map.slot_bytes)
    reader.submit(tensor_map.extents(key), tensor_map.layout(key), blob, load)
    reader.close()
    reader.close()
    load.wait()
    found = tensor_map.layout(key).views(torch.from_numpy(blob))
    assert_same_bits(found["down"], weights[0]["down"][0])
    assert len(disk_threads()) == threads
    assert open_files() == files


def test_waiters_wake_after_completion(folder: Path) -> None:
    """Law: `on_complete` runs once, after the last byte and before anybody wakes."""
    tensor_map, _ = big_layer(folder)
    with closing(DiskReader(tensor_map.files(), chunk_bytes=SMALL_CHUNK, num_threads=4)) as reader:
        for attempt in range(100):
            key, load = ExpertKey(0, attempt % 4), ExpertLoad()
            events: list[bool] = []
            gap = threading.Event()

            def complete(load: ExpertLoad = load, gap: threading.Event = gap) -> None:
                gap.wait(0.001)  # time for a second thread to wake the waiters too early
                events.append(load.is_done)  # noqa: B023  # used in this turn of the loop only

            reader.submit(
                tensor_map.extents(key),
                tensor_map.layout(key),
                aligned_blob(tensor_map.slot_bytes),
                load,
                complete,
            )
            load.wait()
            assert events == [False]


def test_failing_completion_reaches_the_waiter(folder: Path) -> None:
    """Law: an error after the reads (a copy to a device) is raised to whoever waits."""
    tensor_map, _ = big_layer(folder)

    def fail() -> None:
        raise RuntimeError("the device is gone")

    with closing(DiskReader(tensor_map.files())) as reader:
        key, load = ExpertKey(0, 0), ExpertLoad()
        blob = aligned_blob(tensor_map.slot_bytes)
        reader.submit(tensor_map.extents(key), tensor_map.layout(key), blob, load, fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            load.wait()
        assert load.is_done
        assert not load.has_arrived


@pytest.mark.parametrize("interrupted_at", range(4))
def test_interrupted_submit_is_settled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    """Law: an interrupt while reads are handed out leaves none under way and no waiter stuck."""
    tensor_map, _ = big_layer(folder)
    with closing(DiskReader(tensor_map.files(), chunk_bytes=65_536)) as reader:
        real_submit, calls = reader._pool.submit, iter(range(100))

        def submit(job: Callable[[], object]) -> None:
            if next(calls) == interrupted_at:
                raise KeyboardInterrupt
            real_submit(job)

        monkeypatch.setattr(reader._pool, "submit", submit)
        key, load = ExpertKey(0, 0), ExpertLoad()
        blob = aligned_blob(tensor_map.slot_bytes)
        with pytest.raises(KeyboardInterrupt):
            reader.submit(tensor_map.extents(key), tensor_map.layout(key), blob, load)
        load.settle()
        assert load.is_done
        assert not load.has_arrived
        blob.fill(7)
        reader._pool.shutdown()
        assert (blob == 7).all(), "a read went on after the interrupt was answered"


def test_memory_of_reads_is_bounded(folder: Path) -> None:
    """Law: plain reads of any size use the buffers made at the start, one a thread."""
    tensor_map, weights = big_layer(folder)
    with closing(DiskReader(tensor_map.files(), chunk_bytes=SMALL_CHUNK, num_threads=2)) as reader:
        assert_all_read(reader, tensor_map, weights)
        buffers = [reader._buffers.get(timeout=1) for _ in range(2)]
        assert [len(buffer) for buffer in buffers] == [SMALL_CHUNK + 2 * BLOCK] * 2
        assert reader._buffers.empty()
        for chunk_bytes in range(SMALL_CHUNK, SMALL_CHUNK + 64, 9):
            reader._chunk_bytes = chunk_bytes
            for offset in range(0, 9000, 501):
                assert_chunks_fit(reader, tensor_map.files()[0], offset)


def assert_chunks_fit(reader: DiskReader, file: Path, offset: int) -> None:
    """Chunks follow each other, and each with its blocks fits a buffer of its chunk size."""
    num_bytes = 3 * reader._chunk_bytes + offset % 977
    extent = Extent(file, offset, num_bytes, (ByteMove(offset, num_bytes, 0),))
    end = offset
    for _, first, length in chunks_of(reader, extent):
        assert first == end
        end = first + length
        blocks = -(-end // BLOCK) * BLOCK - first // BLOCK * BLOCK
        assert 0 < blocks <= reader._chunk_bytes + 2 * BLOCK
    assert end == offset + num_bytes


def chunks_of(reader: DiskReader, extent: Extent) -> Iterator[tuple[object, int, int]]:
    for job in reader._chunk_jobs(extent, aligned_blob(64)):
        file, start, length, *_ = job.args  # type: ignore[attr-defined]
        yield file, start, length


@pytest.mark.parametrize("seed", range(6))
def test_what_stands_as_in_its_block_is_read_in_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Law: reads in place give the bytes of the file and touch no other; else they are copied."""
    rng = random.Random(seed)
    content = np.random.default_rng(seed).integers(0, 256, 3 * 2**20 + rng.randrange(9), np.uint8)
    file = folder / "data"
    file.write_bytes(content.tobytes())
    memory = np.frombuffer(mmap.mmap(-1, 4 * 2**20), np.uint8)
    in_place: list[bool] = []
    real = DiskReader._read_in_place

    def watched(self: DiskReader, *arguments: Any) -> bool:
        in_place.append(real(self, *arguments))
        return in_place[-1]

    monkeypatch.setattr(DiskReader, "_read_in_place", watched)
    with closing(DiskReader([file])) as reader:
        block = reader._files[file].block_bytes
        for is_alike in (True, False) * 8:
            offset = rng.randrange(0, 2**20, 2)
            num_bytes = rng.choice([len(content) - offset, rng.randrange(4 * block, 2**20)])
            start = offset % block + block * rng.randrange(9) + (0 if is_alike else 2)
            memory.fill(0xA5)
            extent = Extent(file, offset, num_bytes, (ByteMove(offset, num_bytes, start),))
            load = ExpertLoad()
            in_place.clear()
            before = reader.bytes_read
            reader.submit((extent,), ExpertLayout((), 0), memory, load)
            load.wait()
            assert (memory[start : start + num_bytes] == content[offset : offset + num_bytes]).all()
            assert (memory[:start] == 0xA5).all()
            assert (memory[start + num_bytes :] == 0xA5).all()
            assert num_bytes <= reader.bytes_read - before <= num_bytes + 2 * BLOCK
            if reader.is_direct:
                assert set(in_place) == {is_alike}


def test_large_experts_need_no_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: beside their blocks all experts are read in place, and are what they were."""
    tensor_map, (weights,) = big_layer(folder, width=1500)
    beside = tensor_map.beside_blocks()
    assert beside.slot_bytes % BLOCK_BYTES == 0
    memory = anonymous_memory(beside.slot_bytes)
    with closing(DiskReader(tensor_map.files())) as reader:
        if reader.is_direct and max(f.block_bytes for f in reader._files.values()) == BLOCK_BYTES:
            monkeypatch.setattr(reader, "_read", None)  # reads that are copied
        for expert in range(4):
            memory.fill(0xFF)
            key, load = ExpertKey(0, expert), ExpertLoad()
            reader.submit(beside.extents(key), beside.layout(key), memory, load)
            load.wait()
            found = beside.layout(key).views(torch.from_numpy(memory))
            for name, value in weights.items():
                assert_same_bits(found[name], value[expert])


def test_a_read_that_is_cut_stays_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: chunks end where large parameters do; neighbours lie at other phases."""
    tensor_map, _ = big_layer(folder, width=1500)
    beside = tensor_map.beside_blocks()
    memory = anonymous_memory(beside.slot_bytes)
    with closing(DiskReader(tensor_map.files(), chunk_bytes=100_000)) as reader:
        if not reader.is_direct:
            pytest.skip("this file system refuses direct reads")
        if max(f.block_bytes for f in reader._files.values()) != BLOCK_BYTES:
            pytest.skip("this disk has larger blocks")
        monkeypatch.setattr(reader, "_read", None)
        load = ExpertLoad()
        key = ExpertKey(0, 1)
        reader.submit(beside.extents(key), beside.layout(key), memory, load)
        load.wait()


def test_small_experts_stay_where_they_are(folder: Path) -> None:
    """Law: where the room for a block would count, there is none."""
    tensor_map, _ = big_layer(folder, width=100)
    assert tensor_map.beside_blocks().slot_bytes == tensor_map.slot_bytes
