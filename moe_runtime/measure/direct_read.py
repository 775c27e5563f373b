"""How fast a folder's file system reads when the page cache is left out."""

import errno
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 4 * 2**20
_PAGE_BYTES = 4096
_NUM_THREADS = 2
_SCRATCH_BYTES = 256 * 2**20
_LEAST_BYTES = 32 * 2**20  # below this a file's rate says little
_SPARE_BYTES = 512 * 2**20  # left free on the disk when a scratch file is written


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


def measure_direct_read(folder: Path, *, seconds: float) -> DirectReadRate:
    """Read the largest checkpoint file in `folder`, or a scratch file, for about `seconds`.

    The scratch file has no name from the start, so nothing stays behind whatever happens. A file
    that was just written may sit in a cache of the disk or of the host: a large checkpoint's rate
    is the more honest one. Raises CannotMeasureError.
    """
    with _source(folder) as (descriptor, source):
        direct = _reopen_direct(descriptor)
        try:
            bytes_read, elapsed = _read_for(descriptor if direct is None else direct, seconds)
        finally:
            if direct is not None:
                os.close(direct)
    return DirectReadRate(
        source=source, is_direct=direct is not None, bytes_read=bytes_read, seconds=elapsed
    )


@contextmanager
def _source(folder: Path) -> Iterator[tuple[int, str]]:
    """An open file to read and what it is."""
    checkpoint = _largest_checkpoint_file(folder)
    if checkpoint is not None:
        descriptor, source = os.open(checkpoint, os.O_RDONLY), checkpoint.name
    else:
        descriptor, source = _write_scratch(folder), "scratch file"
    try:
        yield descriptor, source
    finally:
        os.close(descriptor)


def _largest_checkpoint_file(folder: Path) -> Path | None:
    sizes = {
        path: path.stat().st_size
        for path in folder.glob("*.safetensors")
        if path.is_file() and os.access(path, os.R_OK)
    }
    large = {path: size for path, size in sizes.items() if size >= _LEAST_BYTES}
    return max(large, key=large.__getitem__, default=None)


def _write_scratch(folder: Path) -> int:
    """A descriptor of a file without a name, full of bytes that do not compress."""
    num_bytes = min(_SCRATCH_BYTES, shutil.disk_usage(folder).free - _SPARE_BYTES)
    if num_bytes < _LEAST_BYTES:
        raise CannotMeasureError(
            errno.ENOSPC, f"less than {(_LEAST_BYTES + _SPARE_BYTES) // 2**20} MiB free"
        )
    try:
        descriptor = _open_nameless(folder)
    except OSError as error:
        raise CannotMeasureError(error.errno, error.strerror) from error
    try:
        noise = os.urandom(_BLOCK_BYTES)
        for _ in range(num_bytes // _BLOCK_BYTES):
            _write_all(descriptor, noise)
        os.fsync(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise CannotMeasureError(error.errno, error.strerror) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_nameless(folder: Path) -> int:
    """A new file that no name leads to: the kernel frees it with its last descriptor."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOENT):
                raise
    path = folder / f".moe-runtime-scratch-{os.getpid()}-{threading.get_ident()}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    path.unlink()
    return descriptor


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _reopen_direct(descriptor: int) -> int | None:
    """The same file opened past the page cache, tried with a real read; None where refused."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, _PAGE_BYTES) as page:
            os.preadv(direct, [page], 0)
    except OSError:
        os.close(direct)
        return None
    return direct


def _read_for(descriptor: int, seconds: float) -> tuple[int, float]:
    """Read whole blocks of the file, over and over, for `seconds`: (bytes, seconds taken)."""
    num_blocks = os.fstat(descriptor).st_size // _BLOCK_BYTES
    start = time.perf_counter()

    def read_share(thread: int) -> int:
        total = 0
        with mmap.mmap(-1, _BLOCK_BYTES) as buffer:  # starts on a page, as direct reads want
            block = thread
            while time.perf_counter() - start < seconds:
                offset = block % num_blocks * _BLOCK_BYTES
                if hasattr(os, "posix_fadvise"):  # where reads are not direct, forget the last pass
                    os.posix_fadvise(descriptor, offset, _BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
                total += os.preadv(descriptor, [buffer], offset)
                block += _NUM_THREADS
        return total

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        bytes_read = sum(pool.map(read_share, range(_NUM_THREADS)))
    return bytes_read, time.perf_counter() - start
