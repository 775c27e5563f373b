"""Random reads take whole blocks of their files, and say whether caches were left out."""

import os
from pathlib import Path

import pytest

from moe_runtime.measure import random_read
from moe_runtime.measure.file_system import UNKNOWN, file_system_of, is_in_memory
from moe_runtime.measure.random_read import RandomReads

BLOCK = 64 * 2**10
SHARED_MEMORY = Path("/dev/shm")


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(16 * BLOCK + 100))
    return path


def test_every_thread_reads_at_least_one_whole_block(file: Path) -> None:
    with RandomReads([file]) as reads:
        num_bytes, seconds = reads.read_for(block_bytes=BLOCK, num_threads=3, seconds=0)
    assert num_bytes >= 3 * BLOCK
    assert num_bytes % BLOCK == 0
    assert seconds > 0


def test_large_files_are_read_more_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"large": 300 * BLOCK, "small": 10 * BLOCK}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    counts = dict.fromkeys(sizes, 0)
    read = os.preadv

    def counted(descriptor: int, buffers: list[object], offset: int) -> int:
        counts[Path(f"/proc/self/fd/{descriptor}").readlink().name] += 1
        return read(descriptor, buffers, offset)  # type: ignore[arg-type]

    with RandomReads([tmp_path / name for name in sizes]) as reads:
        monkeypatch.setattr(os, "preadv", counted)
        reads.read_for(block_bytes=4096, num_threads=1, seconds=0.2)
    assert counts["large"] > counts["small"]


def test_no_descriptor_stays_open(file: Path) -> None:
    before = num_descriptors()
    with RandomReads([file, file]) as reads:
        assert num_descriptors() == before + 2
        reads.rate_gbps(block_bytes=BLOCK, num_threads=2, seconds=0)
    assert num_descriptors() == before
    with pytest.raises(FileNotFoundError):
        RandomReads([file, file.with_name("missing")])
    assert num_descriptors() == before


def test_where_direct_reads_are_refused_pages_are_dropped_before_each_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_read, "_open_direct", lambda path: None)
    calls: list[str] = []
    advise, read = os.posix_fadvise, os.preadv

    def advised(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (length, advice) == (BLOCK, os.POSIX_FADV_DONTNEED)
        calls.append(f"drop {offset}")
        advise(descriptor, offset, length, advice)

    def counted(descriptor: int, buffers: list[object], offset: int) -> int:
        calls.append(f"read {offset}")
        return read(descriptor, buffers, offset)  # type: ignore[arg-type]

    with RandomReads([file]) as reads:
        assert not reads.is_direct
        monkeypatch.setattr(os, "posix_fadvise", advised)
        monkeypatch.setattr(os, "preadv", counted)
        reads.read_for(block_bytes=BLOCK, num_threads=1, seconds=0.01)
    assert [call.replace("read", "drop") for call in calls[1::2]] == calls[::2]


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="there is no /dev/shm")
def test_a_file_system_in_memory_is_never_direct() -> None:
    """Newer kernels accept O_DIRECT there, and copy memory as before."""
    descriptor = os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR)
    try:
        if not is_in_memory(file_system_of(descriptor)):
            pytest.skip("/dev/shm is not in memory here")
        os.write(descriptor, bytes(2 * BLOCK))
        with RandomReads([Path(f"/proc/self/fd/{descriptor}")]) as reads:
            assert not reads.is_direct
            assert reads.file_system == "tmpfs"
    finally:
        os.close(descriptor)


def test_the_file_system_is_the_one_that_the_kernel_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    device = os.fstat(descriptor).st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"21 1 999:9 / / rw - overlay overlay rw\n"
        f"22 21 {os.major(device)}:{os.minor(device)} / /a\\040b rw shared:1 - xfs /dev/x rw\n"
    )
    monkeypatch.setattr("moe_runtime.measure.file_system._MOUNTS", mounts)
    try:
        assert file_system_of(descriptor) == "xfs"
        mounts.write_text("")
        assert file_system_of(descriptor) == UNKNOWN
        mounts.unlink()
        assert file_system_of(descriptor) == UNKNOWN
    finally:
        os.close(descriptor)
