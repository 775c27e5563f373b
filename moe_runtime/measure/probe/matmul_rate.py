"""Rates at which weights are multiplied, by dtype and rows, each beside a read of the memory."""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from moe_runtime.kernels.cpu.gemv import CpuGemv
from moe_runtime.kernels.cpu.gemv_status import ACTIVE
from moe_runtime.measure.probe.memory_rate import MemoryRate
from moe_runtime.measure.probe.rounding import rounded, rounded_quartiles
from moe_runtime.measure.spread import Spread
from moe_runtime.perf.hardware import Matmul, MatmulRate

DtypeName = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SAMPLE_SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Product:
    """One way to multiply: `run(W)` computes `x W^T` for `rows` rows of input made beforehand."""

    dtype: DtypeName
    kernel: str
    rows: int
    run: Callable[[torch.Tensor], object]


class MatmulRates:
    """Multiplies by matrices of `weight_shape`, one after the other, all over the memory's pool.

    `calls_per_wait` products are started between two calls of `synchronize`.
    """

    def __init__(
        self,
        memory: MemoryRate,
        products: Sequence[Product],
        *,
        weight_shape: tuple[int, int],
        calls_per_wait: int = 1,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._memory = memory
        self._products = products
        self._weight_shape = weight_shape
        self._calls_per_wait = calls_per_wait
        self._synchronize = synchronize
        self._weights_gbps: dict[Product, list[float]] = defaultdict(list)
        self._shares: dict[Product, list[float]] = defaultdict(list)
        self._weights = {
            name: itertools.cycle(self._matrices(dtype)) for name, dtype in _DTYPES.items()
        }

    def _matrices(self, dtype: torch.dtype) -> list[torch.Tensor]:
        N, K = self._weight_shape
        numbers = self._memory.pool.view(dtype)
        count = len(numbers) // (N * K)
        return list(numbers[: count * N * K].view(count, N, K))

    def warm_up(self) -> None:
        """Run each product once: the first call of a shape may choose or compile its code."""
        for product in self._products:
            product.run(next(self._weights[product.dtype]))
        self._synchronize()

    def sample(self) -> None:
        """One sample of every product, with reads of the memory between them."""
        before = self._memory.read_gbps()
        for product in self._products:
            rate = self._sample(product)
            after = self._memory.read_gbps()
            self._weights_gbps[product].append(rate)
            self._shares[product].append(rate / statistics.mean((before, after)))
            before = after

    def _sample(self, product: Product) -> float:
        num_bytes = 0
        start = time.perf_counter()
        while num_bytes == 0 or time.perf_counter() - start < _SAMPLE_SECONDS:
            for weight in itertools.islice(self._weights[product.dtype], self._calls_per_wait):
                product.run(weight)
                num_bytes += weight.nbytes
            self._synchronize()  # sync: the clock must not stop before the work does
        return num_bytes / (time.perf_counter() - start) / 1e9

    def result(self) -> Matmul:
        """Medians and quartiles of the samples so far."""
        return Matmul(
            weight_shape=self._weight_shape,
            rates=tuple(self._rate(product) for product in self._products),
        )

    def _rate(self, product: Product) -> MatmulRate:
        spread = Spread.of(self._weights_gbps[product])
        operations_per_byte = 2 * product.rows / _DTYPES[product.dtype].itemsize
        return MatmulRate(
            dtype=product.dtype,
            kernel=product.kernel,
            rows=product.rows,
            weights_gbps=rounded(spread.median),
            weights_gbps_quartiles=rounded_quartiles(spread),
            gflops=rounded(spread.median * operations_per_byte),
            share_of_read=rounded(statistics.median(self._shares[product])),
        )

    def samples(self) -> dict[str, list[float]]:
        """Every sample in its order, GB/s of weights, by a name that says what it is of."""
        return {
            f"matmul {p.dtype} {p.kernel}, {p.rows} rows": rates
            for p, rates in self._weights_gbps.items()
        }


def torch_products(rows: Sequence[int], *, num_inputs: int, device: torch.device) -> list[Product]:
    """torch's own linear layer, for each dtype and number of rows."""

    def product(name: DtypeName, num_rows: int) -> Product:
        generator = torch.Generator().manual_seed(num_rows)
        x_TK = torch.randn(num_rows, num_inputs, generator=generator).to(device, _DTYPES[name])
        return Product(name, "torch", num_rows, lambda w_NK: functional.linear(x_TK, w_NK))

    return [product(name, num_rows) for name in _DTYPES for num_rows in rows]


def gemv_products(weight_shape: tuple[int, int]) -> list[Product]:
    """Our C kernel for one row of bfloat16, where the runtime would use it for this shape."""
    kernel = CpuGemv.load()
    k_block = None if kernel is None else kernel.find_k_block(*weight_shape)
    if kernel is None or k_block is None:
        return []
    x_1K = torch.randn(1, weight_shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    return [Product("bfloat16", ACTIVE, 1, lambda w_NK: kernel.run([w_NK], x_1K, k_block))]
