"""How much faster experts compute from fewer bytes: packed, int8 and int4 rows against bfloat16."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from moe_runtime.errors import ProbeError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.kernels.cpu.experts import Gate, Weight
from moe_runtime.kernels.cpu.matrix import FORMS, Form, Matrix, Part
from moe_runtime.kernels.cpu.unpack import load_codec
from moe_runtime.kernels.packed_blocks import PADDING_BYTES
from moe_runtime.kernels.quantise import QUANTISED_DTYPES, QuantisedDtype, quantise
from moe_runtime.measure.bench.expert_steps import measured_kernel
from moe_runtime.measure.bench.presets import Preset
from moe_runtime.measure.spread import Spread
from moe_runtime.memory.available import available_memory_bytes
from moe_runtime.memory.layout import ALIGNMENT_BYTES
from moe_runtime.memory.packing import rows_per_block

_POOL_BYTES = 384 * 2**20  # of bfloat16 weights: beyond the caches in every form
_REPEATS = 4  # steps of each form a round
_WEIGHT_SIZE = 0.02  # normal weights, whose exponents are as in trained layers
_FORMS = ("packed", *QUANTISED_DTYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormSpeed:
    """One token through its experts. `speedup` is over bfloat16 rows in the same round."""

    shape: str
    form: str
    num_experts: int
    share_of_bytes: float
    microseconds: Spread
    bfloat16_microseconds: Spread
    speedup: Spread


def measure_forms(
    preset: Preset, *, rounds: int, on_round: Callable[[int, int], None]
) -> list[FormSpeed]:
    """All forms take turns on the same weights and threads, on bytes that no cache still has."""
    kernel, (dim, ffn) = measured_kernel(), preset.expert_sizes()
    top_k = preset.top_k
    pools = {form: _Pool(form, dim, ffn, top_k) for form in ("bfloat16", *_FORMS)}
    x_TD = torch.full((1, dim), 0.01, dtype=torch.bfloat16)
    token_R = torch.zeros(top_k, dtype=torch.int64)
    weight_R = torch.full((top_k,), 1 / top_k)
    rows = [(row, row + 1) for row in range(top_k)]
    layer = kernel.layer(dim=dim, ffn=ffn, num_up=2 * ffn, gate=Gate.SILU)
    times: dict[str, list[float]] = {form: [] for form in pools}
    for done in range(rounds + 1):  # the first warms up
        for form, pool in pools.items():
            chosen = [pool.next(top_k) for _ in range(_REPEATS)]
            start = time.perf_counter()
            for up, down in chosen:
                layer.begin(x_TD, token_R, weight_R).run(up, down, rows, is_last=True)
            if done:
                times[form].append((time.perf_counter() - start) / _REPEATS)
        on_round(done, rounds)
    plain = times["bfloat16"]
    return [
        FormSpeed(
            shape=preset.name,
            form=form,
            num_experts=top_k,
            share_of_bytes=pools[form].expert_bytes / pools["bfloat16"].expert_bytes,
            microseconds=Spread.of([seconds * 1e6 for seconds in times[form]]),
            bfloat16_microseconds=Spread.of([seconds * 1e6 for seconds in plain]),
            speedup=Spread.of([a / b for a, b in zip(plain, times[form], strict=True)]),
        )
        for form in _FORMS
    ]


class _Pool:
    """Copies of one expert in one form, beside each other, taken in turns."""

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
        experts = [
            [_weight(form, [self._copy(part) for part in parts], k) for parts, k in matrices]
            for _ in range(number)
        ]
        self._turns = itertools.cycle(experts)

    def next(self, number: int) -> tuple[list[Weight], list[Weight]]:
        """Up and down matrices of the experts that follow those given out last."""
        chosen = list(itertools.islice(self._turns, number))
        return [up for up, _ in chosen], [down for _, down in chosen]

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
        dtype = cast(QuantisedDtype, form)
        values, scales = quantise(w_NK, dtype)
        return [Part(form=FORMS[dtype], num_rows=num_rows, rows=values, scales=scales)]
    codec = load_codec()
    parts = []
    for rows in torch.split(w_NK, rows_per_block(num_rows, num_columns)):
        block = codec.pack(rows)
        padding = torch.zeros(-block.numel() % PADDING_BYTES, dtype=torch.uint8)
        parts.append(Part(form=Form.PACKED, num_rows=len(rows), rows=torch.cat([block, padding])))
    return parts
