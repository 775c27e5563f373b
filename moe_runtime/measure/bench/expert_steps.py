"""What share of the memory's read rate a step of experts reaches, by shapes and tokens."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from moe_runtime.errors import ProbeError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.operation import Gate
from moe_runtime.measure.bench.presets import Preset
from moe_runtime.measure.probe.memory_rate import sound_noise
from moe_runtime.measure.spread import Spread
from moe_runtime.memory.available import available_memory_bytes

_POOL_BYTES = 768 * 2**20  # far beyond caches, and fewer bytes than small machines have
_NOISE_BYTES = 2**20
_TOKENS = (1, 2, 4, 8)
_ROWS_EACH = 2
_MANY_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShare:
    """One kind of step. `share` is of reads of as many bytes that took turns with it."""

    shape: str
    tokens: int
    num_experts: int
    rows_per_expert: int
    step_bytes: int
    share: Spread
    gbps: Spread
    read_gbps: Spread


def measured_kernel() -> CpuExperts:
    """The kernel of bfloat16 experts. Raises ProbeError where there is none."""
    kernel = CpuExperts.load(torch.bfloat16)
    if kernel is None:
        raise ProbeError(f"there is no kernel to measure: {CpuExperts.status()}")
    return kernel


def measure_steps(
    preset: Preset, *, rounds: int, on_round: Callable[[int, int], None]
) -> list[StepShare]:
    """Shares for 1 to 8 tokens with at most two rows an expert, and for eight rows of one.

    Reads and steps take turns on the same threads, each on bytes that no cache still has. A step is
    all of it: from tensors to the output, Python included.
    """
    kernel, (dim, ffn) = measured_kernel(), preset.expert_sizes()
    pool = _Pool(dim, ffn)
    kinds = [*few_rows(preset), (_MANY_ROWS, 1, _MANY_ROWS)]
    ratios: list[list[float]] = [[] for _ in kinds]
    rates: list[list[float]] = [[] for _ in kinds]
    reads: list[list[float]] = [[] for _ in kinds]
    for done in range(rounds + 1):  # the first warms up
        for n, (_, num_experts, rows_each) in enumerate(kinds):
            read = _gbps(pool, num_experts, _read(kernel, pool, num_experts))
            step = _gbps(pool, num_experts, _step(kernel, pool, num_experts, rows_each))
            if done:
                ratios[n].append(step / read)
                rates[n].append(step)
                reads[n].append(read)
        on_round(done, rounds)
    return [
        StepShare(
            shape=preset.name,
            tokens=tokens,
            num_experts=num_experts,
            rows_per_expert=rows_each,
            step_bytes=num_experts * pool.expert_bytes,
            share=Spread.of(ratios[n]),
            gbps=Spread.of(rates[n]),
            read_gbps=Spread.of(reads[n]),
        )
        for n, (tokens, num_experts, rows_each) in enumerate(kinds)
    ]


def few_rows(preset: Preset) -> list[tuple[int, int, int]]:
    """(tokens, experts, rows of each) of 1 to 8 tokens: few experts, but at most two rows each."""
    kinds = []
    for tokens in _TOKENS:
        rows_each = min(tokens, _ROWS_EACH)
        num_experts = max(1, min(preset.num_experts, tokens * preset.top_k // rows_each))
        kinds.append((tokens, num_experts, rows_each))
    return kinds


class _Pool:
    """Experts beside each other in more memory than caches hold, taken in turns."""

    def __init__(self, dim: int, ffn: int) -> None:
        self.dim, self.ffn = dim, ffn
        self.expert_bytes = 3 * dim * ffn * torch.bfloat16.itemsize
        self.num_experts = max(2, _POOL_BYTES // self.expert_bytes)
        needed = self.num_experts * self.expert_bytes
        if needed > available_memory_bytes() // 2:
            raise ProbeError(
                f"the weights to compute with take {format_bytes(needed)} and half of the "
                f"{format_bytes(available_memory_bytes())} that are free is allowed; end other "
                "programs, or choose smaller shapes"
            )
        # numpy's memory comes in huge pages, as the runtime's slots do.
        self._bytes = torch.from_numpy(np.empty(needed, dtype=np.uint8))
        noise = sound_noise(_NOISE_BYTES)
        for begin in range(0, needed, _NOISE_BYTES):
            part = self._bytes[begin : begin + _NOISE_BYTES]
            part.copy_(noise[: len(part)])
        self._turns = count()

    def next(self, number: int) -> Iterator[int]:
        """`number` experts that follow those given out last."""
        for _ in range(number):
            yield next(self._turns) % self.num_experts

    def next_bytes(self, number: int) -> torch.Tensor:
        first, *_ = self.next(number)
        first = min(first, self.num_experts - number)
        return self._bytes[first * self.expert_bytes : (first + number) * self.expert_bytes]

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = expert * self.expert_bytes
        values = self._bytes[begin : begin + self.expert_bytes].view(torch.bfloat16)
        num_up = 2 * self.ffn * self.dim
        return values[:num_up].view(-1, self.dim), values[num_up:].view(self.dim, self.ffn)


def _read(kernel: CpuExperts, pool: _Pool, num_experts: int) -> Callable[[], None]:
    """A read of as many bytes as that many experts have."""
    part = pool.next_bytes(num_experts)
    return lambda: kernel.read(part)


def _step(kernel: CpuExperts, pool: _Pool, num_experts: int, rows_each: int) -> Callable[[], None]:
    """A step of `num_experts`, each with `rows_each` rows; its weights are chosen now."""
    chosen = [pool.weights(expert) for expert in pool.next(num_experts)]
    up, down = [w for w, _ in chosen], [w for _, w in chosen]
    num_rows = num_experts * rows_each
    rows = [(begin, begin + rows_each) for begin in range(0, num_rows, rows_each)]
    x_TD = torch.full((rows_each, pool.dim), 0.01, dtype=torch.bfloat16)
    token_R = torch.arange(num_rows) % rows_each
    weight_R = torch.full((num_rows,), 1 / num_experts)

    layer = kernel.layer(dim=pool.dim, ffn=pool.ffn, num_up=2 * pool.ffn, gate=Gate.SILU)

    def run() -> None:
        step = layer.begin(x_TD, token_R, weight_R)
        step.run(up, down, rows, is_last=True)

    return run


def _gbps(pool: _Pool, num_experts: int, work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return num_experts * pool.expert_bytes / (time.perf_counter() - start) / 1e9
