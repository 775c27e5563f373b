"""A tensor of a checkpoint as pages of its file, for weights of which a forward uses few rows."""

import mmap
import os
import weakref

import torch

from moe_runtime.errors import CheckpointError, ExpertReadError
from moe_runtime.memory.layout import TORCH_DTYPES
from moe_runtime.memory.safetensors_header import FileTensor


class MappedTensor:
    """`tensor` is read where it is touched, and dropped where memory is short.

    Private: what is written to it stays in memory. The kernel is told not to read ahead, as rows
    are looked up in no order. Touching a page behind the end of a shortened file would end the
    process: call `check` before a use.

    Raises CheckpointError when the file is shorter than its header says, or cannot be mapped.
    """

    def __init__(self, place: FileTensor) -> None:
        start = place.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        end = place.offset + place.num_bytes
        try:
            self._descriptor = os.open(place.file, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._state = self._present_state()
            if self._state[0] < end:
                raise CheckpointError(f"{place.file} ends inside {place.name}; download it again")
            pages = mmap.mmap(
                self._descriptor,
                end - start,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=start,
            )
            if hasattr(mmap, "MADV_RANDOM"):
                pages.madvise(mmap.MADV_RANDOM)
        except OSError as error:
            raise CheckpointError(
                f"mapping {place.name} of {place.file} failed: {error.strerror}"
            ) from error
        dtype = TORCH_DTYPES[place.dtype]
        flat = torch.frombuffer(
            pages,
            dtype=dtype,
            count=place.num_bytes // dtype.itemsize,
            offset=place.offset - start,
        )
        self.tensor = flat.view(place.shape)
        self._place = place

    def check(self) -> None:
        """Raise ExpertReadError if the file changed since it was mapped."""
        if self._present_state() != self._state:
            raise ExpertReadError(
                f"{self._place.file} changed while in use ({self._place.name} is mapped at offset "
                f"{self._place.offset}); load the model again"
            )

    def _present_state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns
