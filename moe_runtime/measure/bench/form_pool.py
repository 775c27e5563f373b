"""Experts in one form, beside each other in more memory than caches hold."""

import itertools
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from moe_runtime.errors import ProbeError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.kernels.cpu.matrix import FORMS, Form, Matrix, Part, Weight
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.packed_blocks import PADDING_BYTES
from moe_runtime.kernels.quantise import QuantisedDtype, quantise
from moe_runtime.kernels.reference import quantize_fp8_reference, quantize_mxfp4_reference
from moe_runtime.memory.available import available_memory_bytes
from moe_runtime.memory.layout import ALIGNMENT_BYTES
from moe_runtime.memory.packing import rows_per_block

_POOL_BYTES = 384 * 2**20  # of bfloat16 weights: beyond the caches in every form
_WEIGHT_SIZE = 0.02  # normal weights, whose exponents are as in trained layers


@dataclass(frozen=True, slots=True, kw_only=True)
class FormExpert:
    """Up and down matrices for the kernel, and what they are made of."""

    up: Weight
    down: Weight
    parts: tuple[list[Part], list[Part]]


class FormPool:
    """Copies of one expert in `form`, taken in turns.

    `form` is "bfloat16", "packed", "int8", "int4", "fp8" or "mxfp4".
    """

    def __init__(self, form: str, dim: int, ffn: int, top_k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        matrices = []
        for shape in ((2 * ffn, dim), (dim, ffn)):
            w_NK = torch.randn(shape, generator=generator) * _WEIGHT_SIZE
            matrices.append((_parts(form, w_NK.bfloat16()), shape[1]))
        number = max(_POOL_BYTES // (3 * dim * ffn * torch.bfloat16.itemsize), 2 * top_k)
        tensors = [t for parts, _ in matrices for part in parts for t in (part.rows, part.scales)]
        self.expert_bytes = sum(_room_of(t) for t in tensors if t is not None)
        needed, free = number * self.expert_bytes, available_memory_bytes()
        if needed > free // 2:
            raise ProbeError(
                f"{number} {form} experts of {format_bytes(self.expert_bytes)} and half of the "
                f"{format_bytes(free)} that are free is allowed; end other programs, or choose "
                "smaller shapes"
            )
        # numpy's memory comes in huge pages, as the runtime's slots do.
        self._memory = torch.from_numpy(np.empty(needed, dtype=np.uint8))
        self._end = 0
        self.num_experts = number
        self._turns = itertools.cycle([self._expert(form, matrices) for _ in range(number)])

    def next(self, number: int) -> list[FormExpert]:
        """The experts that follow those given out last."""
        return list(itertools.islice(self._turns, number))

    def next_bytes(self, number: int) -> torch.Tensor:
        """As many bytes as that many experts have, uint8; their turn is over then."""
        first = self.next(number)[0].parts[0][0].rows
        offset = first.data_ptr() - self._memory.data_ptr()
        size = number * self.expert_bytes
        return self._memory[min(offset, len(self._memory) - size) :][:size]

    def _expert(self, form: str, matrices: list[tuple[list[Part], int]]) -> FormExpert:
        up, down = ([self._copy(part) for part in parts] for parts, _ in matrices)
        return FormExpert(
            up=_weight(form, up, matrices[0][1]),
            down=_weight(form, down, matrices[1][1]),
            parts=(up, down),
        )

    def _copy(self, part: Part) -> Part:
        scales = None if part.scales is None else self._place(part.scales)
        return replace(part, rows=self._place(part.rows), scales=scales)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        place = self._memory[self._end : self._end + tensor.nbytes]
        self._end += _room_of(tensor)
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _room_of(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _weight(form: str, parts: list[Part], num_columns: int) -> Weight:
    return parts[0].rows if form == "bfloat16" else Matrix(parts, num_columns)


def _parts(form: str, w_NK: torch.Tensor) -> list[Part]:
    """A matrix as a slot holds it; packed ones in blocks as a packed folder has them."""
    num_rows, num_columns = w_NK.shape
    if form == "bfloat16":
        return [Part(form=Form.PLAIN, num_rows=num_rows, rows=w_NK)]
    if form != "packed":
        if form == "fp8":
            values, scales = quantize_fp8_reference(w_NK)
        elif form == "mxfp4":
            values, scales = quantize_mxfp4_reference(w_NK)
            values = values.flatten(1)
        else:
            values, scales = quantise(w_NK, cast(QuantisedDtype, form))
        kind = FORMS[cast(QuantisedDtype, form)]
        return [Part(form=kind, num_rows=num_rows, rows=values, scales=scales)]
    codec = load_codec()
    parts = []
    for rows in torch.split(w_NK, rows_per_block(num_rows, num_columns)):
        block = codec.pack(rows)
        padding = torch.zeros(-block.numel() % PADDING_BYTES, dtype=torch.uint8)
        parts.append(Part(form=Form.PACKED, num_rows=len(rows), rows=torch.cat([block, padding])))
    return parts
