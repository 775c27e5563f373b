"""Rows with their routing as bytes, so that one message carries all three tensors."""

import torch

from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.payload import ExactPayload, Payload

_EXACT = ExactPayload()


def pack_rows(rows: Rows, payload: Payload = _EXACT) -> torch.Tensor:
    """`[n, row bytes]` uint8: hidden states by `payload`, weights, then expert ids of two bytes."""
    routing = (rows.weights, rows.index.to(torch.int16))
    parts = [part.contiguous().view(torch.uint8) for part in routing]
    return torch.cat([payload.encode(rows.hidden), *parts], dim=1)


def unpack_rows(packed: torch.Tensor, like: Rows, payload: Payload = _EXACT) -> Rows:
    """Of what `pack_rows` made, in the dtypes and sizes of `like`."""
    hidden_bytes = payload.row_bytes(like.hidden.shape[1], like.hidden.dtype)
    weight_bytes = like.weights.shape[1] * like.weights.element_size()
    index = columns(packed, hidden_bytes + weight_bytes, packed.shape[1], torch.int16)
    return Rows(
        payload.decode(columns(packed, 0, hidden_bytes, torch.uint8), like.hidden.dtype),
        index.to(like.index.dtype),
        columns(packed, hidden_bytes, hidden_bytes + weight_bytes, like.weights.dtype),
    )


def columns(packed: torch.Tensor, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes `begin` to `end` of every row, in memory of their own.

    Not by `contiguous()`, which leaves one row where it is, maybe not aligned for `dtype`.
    """
    columns = packed.new_empty((len(packed), end - begin))
    return columns.copy_(packed[:, begin:end]).view(dtype)
