"""Rates at which weights are multiplied, by dtype and rows, each beside a read of the memory."""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch.nn import functional

from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.cpu.experts_layer import CpuLayer
from moe_runtime.kernels.cpu.gemv import CpuGemv
from moe_runtime.kernels.cpu.gemv_status import ACTIVE
from moe_runtime.kernels.cpu.operation import Gate
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
_EXPERTS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Product:
    """One way to multiply: `run` computes `x W^T` for `rows` rows of input made beforehand.

    It takes `at_once` matrices `W`, and reads a `share` of them.
    """

    dtype: DtypeName
    kernel: str
    rows: int
    run: Callable[[list[torch.Tensor]], object]
    at_once: int = 1
    share: float = 1.0


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
            product.run(self._next(product))
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
            for _ in range(self._calls_per_wait):
                weights = self._next(product)
                product.run(weights)
                num_bytes += sum(weight.nbytes for weight in weights)
            self._synchronize()  # sync: the clock must not stop before the work does
        return product.share * num_bytes / (time.perf_counter() - start) / 1e9

    def _next(self, product: Product) -> list[torch.Tensor]:
        return list(itertools.islice(self._weights[product.dtype], product.at_once))

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
        return Product(name, "torch", num_rows, lambda weights: functional.linear(x_TK, *weights))

    return [product(name, num_rows) for name in _DTYPES for num_rows in rows]


def gemv_products(weight_shape: tuple[int, int]) -> list[Product]:
    """Our C kernel for one row of bfloat16, where the runtime would use it for this shape."""
    kernel = CpuGemv.load()
    k_block = None if kernel is None else kernel.find_k_block(*weight_shape)
    if kernel is None or k_block is None:
        return []
    x_1K = torch.randn(1, weight_shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    return [Product("bfloat16", ACTIVE, 1, lambda weights: kernel.run(weights, x_1K, k_block))]


def expert_products(rows: Sequence[int], weight_shape: tuple[int, int]) -> list[Product]:
    """Our C kernel for layers of experts, each with as many rows, where this CPU has it.

    Three quarters of a matrix `[N, K]` are an expert with inputs of K numbers and N / 4 inside.
    """
    N, K = weight_shape
    names: tuple[DtypeName, ...] = ("float32", "bfloat16")
    products = []
    for name in names:
        kernel = CpuExperts.load(_DTYPES[name])
        if kernel is None or N % 4:
            continue
        layer = kernel.layer(dim=K, ffn=N // 4, num_up=N // 2, gate=Gate.SILU)
        for num_rows in rows:
            generator = torch.Generator().manual_seed(num_rows)
            x_TK = torch.randn(num_rows, K, generator=generator).to(_DTYPES[name])
            run = partial(_run_experts, layer, x_TK)
            path = f"{kernel.level} experts"
            products.append(Product(name, path, num_rows, run, _EXPERTS_AT_ONCE, share=0.75))
    return products


def _run_experts(layer: CpuLayer, x_TK: torch.Tensor, weights: list[torch.Tensor]) -> None:
    num_rows, num_experts = len(x_TK), len(weights)
    N, K = weights[0].shape
    step = layer.begin(
        x_TK, torch.arange(num_rows).repeat(num_experts), torch.ones(num_rows * num_experts)
    )
    step.run(
        [weight[: N // 2] for weight in weights],
        [weight[N // 2 : N // 4 * 3].view(K, N // 4) for weight in weights],
        [(i * num_rows, (i + 1) * num_rows) for i in range(num_experts)],
        is_last=True,
    )
