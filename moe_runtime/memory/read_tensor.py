"""Reads one whole tensor of a checkpoint into fresh memory."""

import os

import torch

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels.cpu.dequant import load_dequantizer
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.scaled_blocks import ScaledWeights
from moe_runtime.memory.layout import ALIGNMENT_BYTES, STORED_DTYPES, empty_at
from moe_runtime.memory.packing import (
    ITEM_BYTES,
    PackedTensor,
    SealedTensor,
    require_intact,
    seal_of,
)
from moe_runtime.memory.safetensors_header import FileTensor
from moe_runtime.memory.scaled_tensor import ScaledTensor, unsound

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def read_tensor(tensor: FileTensor) -> torch.Tensor:
    """The tensor, read with plain reads: a mapped file would count its pages to this process.

    Raises CheckpointError when the dtype is not one that a dense weight has, or the read fails.
    """
    if tensor.dtype not in _TORCH_DTYPES:
        raise CheckpointError(
            f"{tensor} has a dtype that is not supported; use a bfloat16, float16 or float32 "
            "checkpoint"
        )
    if isinstance(tensor, PackedTensor):
        return _read_packed(tensor)
    # Where a mapped file would put it: matrix kernels see the same address modulo a cache line, and
    # sum in the same order, as in the unmodified model.
    data = empty_at(tensor.num_bytes, tensor.offset % ALIGNMENT_BYTES)
    _read_bytes(tensor, tensor.offset, data)
    if isinstance(tensor, SealedTensor) and seal_of(data, load_codec()) != tensor.checksum:
        raise CheckpointError(
            f"{tensor.file} was altered: the checksum of {tensor.name} is wrong; copy the folder "
            "again, or pack the model again"
        )
    return data.view(_TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def read_scaled(tensor: ScaledTensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights that `tensor` stands for, dequantised to `dtype`.

    Raises CheckpointError when a scale is no number, or a read fails.
    """
    dense = torch.empty(tensor.shape, dtype=dtype)
    matrices = dense.view(-1, *tensor.shape[-2:])
    matrices = matrices.mT if tensor.is_transposed else matrices
    M, N, _ = matrices.shape
    values = _read_stored(tensor.values).view(M, N, -1)
    scales = _read_stored(tensor.scales).view(M, *tensor.scales.shape[-2:])
    dequantizer = load_dequantizer()
    for m in range(M):
        weights = ScaledWeights(format=tensor.format, values=values[m], scales=scales[m])
        if not weights.is_sound:
            raise unsound(tensor.scales)
        dequantizer.run(weights, matrices[m])
    return dense


def _read_stored(tensor: FileTensor) -> torch.Tensor:
    data = torch.empty(tensor.num_bytes, dtype=torch.uint8)
    _read_bytes(tensor, tensor.offset, data)
    return data.view(STORED_DTYPES[tensor.dtype]).view(tensor.shape)


def _read_packed(tensor: PackedTensor) -> torch.Tensor:
    """The tensor unpacked. Raises ExpertReadError when a block was altered."""
    data = empty_at(tensor.num_bytes, tensor.offset % ALIGNMENT_BYTES)
    codec = load_codec()
    for block in tensor.blocks():
        packed = torch.empty(block.num_bytes, dtype=torch.uint8)
        _read_bytes(tensor, block.offset, packed)
        first = block.first_element * ITEM_BYTES
        weights = data[first : first + block.num_elements * ITEM_BYTES]
        require_intact(codec.run([block.task(packed, weights)]), [block], tensor.file)
    return data.view(_TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def _read_bytes(tensor: FileTensor, offset: int, data: torch.Tensor) -> None:
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            window, done = memoryview(data.numpy().data), 0
            while done < len(window):
                count = os.preadv(stream.fileno(), [window[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{tensor.file} ends inside {tensor.name} at offset {offset + done}"
                    )
                done += count
            # The bytes are ours now; the page cache is better spent on something else.
            os.posix_fadvise(stream.fileno(), offset, len(window), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(
            f"reading {tensor.name} from {tensor.file} at offset {offset} failed: {error.strerror}"
        ) from error
