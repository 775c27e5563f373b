"""A tensor of a checkpoint as pages of its file, for weights of which a forward uses few rows."""

import ctypes
import mmap
import os
import weakref

import torch

from moe_runtime.errors import CheckpointError, ExpertReadError
from moe_runtime.memory.layout import TORCH_DTYPES
from moe_runtime.memory.safetensors_header import FileTensor

_FAILED = ctypes.c_void_p(-1).value


class MappedTensor:
    """`tensor` is read where it is touched, and dropped where memory is short.

    Private: what is written to it stays in memory. The kernel is told not to read ahead, as rows
    are looked up in no order. No file stays open. Touching a page behind the end of a shortened
    file would end the process: call `check` before a use.

    Raises CheckpointError when the file is shorter than its header says, or cannot be mapped.
    """

    def __init__(self, place: FileTensor) -> None:
        try:
            self._state = _state(place)
            if self._state[2] < place.offset + place.num_bytes:
                raise CheckpointError(f"{place.file} ends inside {place.name}; download it again")
            data = _map(place)
        except OSError as error:
            raise CheckpointError(
                f"mapping {place.name} of {place.file} failed: {error.strerror}"
            ) from error
        self.tensor = data.view(TORCH_DTYPES[place.dtype]).view(place.shape)
        self._place = place

    def check(self) -> None:
        """Raise ExpertReadError if the file changed since it was mapped.

        One that was deleted or replaced is no danger: the mapping keeps what it mapped.
        """
        try:
            state = _state(self._place)
        except OSError:
            return
        if state[:2] == self._state[:2] and state != self._state:
            raise ExpertReadError(
                f"{self._place.file} changed while in use ({self._place.name} is mapped at offset "
                f"{self._place.offset}); load the model again"
            )


def can_map(place: FileTensor) -> bool:
    """Whether this system maps files, and the numbers stand where their dtype allows."""
    dtype = TORCH_DTYPES.get(place.dtype)
    return (
        os.name == "posix"
        and dtype is not None
        and place.num_bytes > 0
        and place.offset % dtype.itemsize == 0
    )


def _state(place: FileTensor) -> tuple[int, int, int, int]:
    """Which file it is, then how large and how old."""
    status = place.file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _map(place: FileTensor) -> torch.Tensor:
    """The tensor's bytes. Python's own mapping would keep the file open. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    sizes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mmap.argtypes = (*sizes, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    libc.madvise.argtypes, libc.munmap.argtypes = (*sizes, ctypes.c_int), sizes
    start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = place.offset + place.num_bytes - start
    descriptor = os.open(place.file, os.O_RDONLY)
    try:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = libc.mmap(None, num_bytes, access, mmap.MAP_PRIVATE, descriptor, start)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if hasattr(mmap, "MADV_RANDOM"):
        libc.madvise(address, num_bytes, mmap.MADV_RANDOM)
    pages = (ctypes.c_uint8 * num_bytes).from_address(address)
    weakref.finalize(pages, libc.munmap, address, num_bytes)  # when no tensor looks there any more
    return torch.frombuffer(pages, dtype=torch.uint8, offset=place.offset - start)
