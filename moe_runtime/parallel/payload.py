"""How hidden states are written in messages: as they are, or smaller and rounded.

n rows, D model dim.
"""

from typing import Protocol

import torch

_INT8_MOST = 127
_SCALE_BYTES = 4
_SMALLEST = torch.finfo(torch.float32).tiny


class Payload(Protocol):
    """Rows to bytes and back."""

    @property
    def name(self) -> str: ...

    def row_bytes(self, model_dim: int, dtype: torch.dtype) -> int:
        """Of one row."""

    def encode(self, rows_nD: torch.Tensor) -> torch.Tensor:
        """`[n, row bytes]` uint8."""

    def decode(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[n, D]` of what `encode` made, in memory of its own."""


class ExactPayload:
    """Every bit."""

    name = "exact"

    def row_bytes(self, model_dim: int, dtype: torch.dtype) -> int:
        return model_dim * dtype.itemsize

    def encode(self, rows_nD: torch.Tensor) -> torch.Tensor:
        return rows_nD.contiguous().view(torch.uint8)

    def decode(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return packed.view(dtype)


class BFloat16Payload:
    """Two bytes a number, 8 bits of it exact: half of float32."""

    name = "bfloat16"

    def row_bytes(self, model_dim: int, dtype: torch.dtype) -> int:
        return model_dim * torch.bfloat16.itemsize

    def encode(self, rows_nD: torch.Tensor) -> torch.Tensor:
        return rows_nD.to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return packed.view(torch.bfloat16).to(dtype)


class Int8Payload:
    """A byte a number, and the row's largest magnitude / 127 in float32 before them.

    A number is at most half of that scale from what it was. A row with a NaN or an infinity comes
    back as NaN.
    """

    name = "int8"

    def row_bytes(self, model_dim: int, dtype: torch.dtype) -> int:
        return model_dim + _SCALE_BYTES

    def encode(self, rows_nD: torch.Tensor) -> torch.Tensor:
        wide_nD = rows_nD.float()
        # Never zero, which would make NaN of a row of zeros.
        scale_n1 = (wide_nD.abs().amax(1, keepdim=True) / _INT8_MOST).clamp(min=_SMALLEST)
        whole_nD = (wide_nD / scale_n1).round()
        bytes_nD = whole_nD.nan_to_num(0).clamp(-_INT8_MOST, _INT8_MOST).to(torch.int8)
        scale_n1 = scale_n1.masked_fill(~scale_n1.isfinite(), torch.nan)
        return torch.cat([scale_n1.view(torch.uint8), bytes_nD.view(torch.uint8)], dim=1)

    def decode(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale = packed.new_empty((len(packed), _SCALE_BYTES)).copy_(packed[:, :_SCALE_BYTES])
        numbers = packed[:, _SCALE_BYTES:].contiguous().view(torch.int8)
        return (numbers.float() * scale.view(torch.float32)).to(dtype)


_ALL: tuple[Payload, ...] = (ExactPayload(), BFloat16Payload(), Int8Payload())
PAYLOADS = tuple(payload.name for payload in _ALL)


def make_payload(name: str) -> Payload:
    """The payload of that name; ValueError, with the names there are, for one that is none."""
    for payload in _ALL:
        if payload.name == name:
            return payload
    raise ValueError(f"payload {name!r} is unknown; choose from {', '.join(PAYLOADS)}")
