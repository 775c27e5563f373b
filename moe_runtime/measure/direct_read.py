"""What to read in a folder to learn how fast its file system is: checkpoint files, or scratch."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.file_system import file_system_of, is_in_memory
from moe_runtime.measure.random_read import RandomReads
from moe_runtime.memory.available import available_memory_bytes

_BLOCK_BYTES = 4 * 2**20
_NUM_THREADS = 2
_SCRATCH_BYTES = 256 * 2**20
_LEAST_BYTES = 32 * 2**20  # below this a file's rate says little
_SPARE_BYTES = 512 * 2**20  # left free on the disk when a scratch file is written
_CHECKPOINTS = ("*.safetensors", "*.gguf")


class CannotMeasureError(OSError):
    """The folder holds nothing large enough to read, and no scratch file can be written there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectReadRate:
    """What was read, how, and how fast. `is_direct` is False where O_DIRECT was refused."""

    source: str
    is_direct: bool
    bytes_read: int
    seconds: float

    @property
    def rate_gbps(self) -> float:
        return self.bytes_read / self.seconds / 1e9


@dataclass(frozen=True, slots=True)
class FolderReads:
    """Reads of something in a folder, and what that is: checkpoint files or a scratch file."""

    reads: RandomReads
    source: str
    is_scratch: bool


def measure_direct_read(folder: Path, *, seconds: float) -> DirectReadRate:
    """Read 4 MiB blocks, two at a time, in `folder` for about `seconds`. Raises OSError."""
    with open_folder(folder, least_bytes=_LEAST_BYTES, scratch_bytes=_SCRATCH_BYTES) as found:
        bytes_read, elapsed = found.reads.read_for(
            block_bytes=_BLOCK_BYTES, num_threads=_NUM_THREADS, seconds=seconds
        )
        return DirectReadRate(
            source=found.source,
            is_direct=found.reads.is_direct,
            bytes_read=bytes_read,
            seconds=elapsed,
        )


@contextmanager
def open_folder(folder: Path, *, least_bytes: int, scratch_bytes: int) -> Iterator[FolderReads]:
    """Reads of the checkpoint files in `folder`, or of a scratch file.

    Checkpoint files are read if they hold `least_bytes` together. The scratch file, of
    `scratch_bytes` or what the disk has free, has no name from the start, so nothing stays behind
    whatever happens. A file that was just written may sit in a cache of the disk or of the host: a
    large checkpoint's rate is the more honest one. Raises CannotMeasureError, or OSError.
    """
    checkpoint = _checkpoint_files(folder)
    if sum(file.stat().st_size for file in checkpoint) >= least_bytes:
        others = f" and {len(checkpoint) - 1} more" if len(checkpoint) > 1 else ""
        with RandomReads(checkpoint) as reads:
            yield FolderReads(reads, f"{checkpoint[0].name}{others}", is_scratch=False)
        return
    descriptor = _write_scratch(folder, least_bytes, scratch_bytes)
    try:
        size = format_bytes(os.fstat(descriptor).st_size)
        with RandomReads([Path(f"/proc/self/fd/{descriptor}")]) as reads:
            yield FolderReads(reads, f"scratch file of {size}, just written", is_scratch=True)
    finally:
        os.close(descriptor)


def _checkpoint_files(folder: Path) -> list[Path]:
    """Files of weights that are worth reading, the largest first."""
    found = {
        file: file.stat().st_size
        for pattern in _CHECKPOINTS
        for file in sorted(folder.glob(pattern))
        if file.is_file() and os.access(file, os.R_OK)
    }
    large = [file for file, size in found.items() if size >= _LEAST_BYTES]
    return sorted(large, key=found.__getitem__, reverse=True)


def _write_scratch(folder: Path, least_bytes: int, scratch_bytes: int) -> int:
    """A descriptor of a file without a name, full of bytes that do not compress."""
    num_bytes = min(scratch_bytes, _free_bytes(folder) - _SPARE_BYTES)
    if num_bytes < least_bytes:
        raise CannotMeasureError(
            errno.ENOSPC, f"less than {(least_bytes + _SPARE_BYTES) // 2**20} MiB free"
        )
    try:
        descriptor = _open_nameless(folder)
    except OSError as error:
        raise CannotMeasureError(error.errno, error.strerror) from error
    try:
        for _ in range(num_bytes // _BLOCK_BYTES):
            _write_all(descriptor, os.urandom(_BLOCK_BYTES))
        os.fsync(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise CannotMeasureError(error.errno, error.strerror) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _free_bytes(folder: Path) -> int:
    """What may be written; a file system in memory fills memory that somebody else may need."""
    free = shutil.disk_usage(folder).free
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        in_memory = is_in_memory(file_system_of(descriptor))
    finally:
        os.close(descriptor)
    return min(free, available_memory_bytes()) if in_memory else free


def _open_nameless(folder: Path) -> int:
    """A new file that no name leads to: the kernel frees it with its last descriptor."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOENT):
                raise
    path = folder / f".moe-runtime-scratch-{os.getpid()}-{threading.get_ident()}"
    try:
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    finally:
        path.unlink(missing_ok=True)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
