"""Rates of one GPU: its link to the host, its memory, its matrix products."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_runtime.errors import ProbeError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.probe.matmul_rate import MatmulRates, torch_products
from moe_runtime.measure.probe.memory_rate import sound_noise
from moe_runtime.measure.probe.nvml import Nvml, NvmlDevice
from moe_runtime.measure.probe.rounding import rounded, rounded_quartiles
from moe_runtime.measure.spread import Spread
from moe_runtime.perf.hardware import Gpu

_ROWS = (1, 2, 4, 16, 64, 256, 1024, 4096)
_NOISE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSizes:
    """How much is moved and multiplied at a time; caches of GPUs hold up to 0.1 GB."""

    pool_bytes: int = 2 * 2**30
    link_bytes: int = 256 * 2**20
    weight_shape: tuple[int, int] = (8192, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDevice:
    """A GPU that torch computes on, and its two kinds of calls that a CPU has no need of."""

    device: torch.device
    name: str
    memory_bytes: int
    compute_capability: str
    multiprocessors: int
    free_bytes: int
    facts: NvmlDevice | None
    synchronize: Callable[[], None]
    pinned: Callable[[int], torch.Tensor]  # so many bytes of host memory that the GPU may reach


def gpu_devices(nvml: Nvml | None) -> list[GpuDevice]:
    """The GPUs that torch sees; none where torch is built without CUDA."""
    return [gpu_device(index, nvml) for index in range(torch.cuda.device_count())]


def gpu_device(index: int, nvml: Nvml | None) -> GpuDevice:
    """One of the GPUs that torch sees."""
    properties: Any = torch.cuda.get_device_properties(index)
    device = torch.device("cuda", index)
    return GpuDevice(
        device=device,
        name=properties.name,
        memory_bytes=properties.total_memory,
        compute_capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        free_bytes=torch.cuda.mem_get_info(device)[0],
        facts=None if nvml is None else nvml.device(str(properties.uuid)),
        synchronize=lambda: torch.cuda.synchronize(device),
        pinned=lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True),
    )


def unmeasured_gpu(facts: NvmlDevice) -> Gpu:
    """A GPU that the driver knows and torch cannot use: facts, and no rates."""
    return Gpu(
        name=facts.name,
        memory_bytes=facts.memory_bytes,
        compute_capability=facts.compute_capability,
        sm_clock_mhz=facts.sm_clock_mhz,
        memory_clock_mhz=facts.memory_clock_mhz,
        power_limit_watts=facts.power_limit_watts,
    )


class GpuMemoryRate:
    """Memory of one GPU, read and copied by torch's kernels."""

    def __init__(self, gpu: GpuDevice, num_bytes: int) -> None:
        self.reads_gbps: list[float] = []
        self.copies_gbps: list[float] = []
        self._gpu = gpu
        num_bytes -= num_bytes % _NOISE_BYTES
        self.pool = torch.empty(num_bytes, dtype=torch.uint8, device=gpu.device)
        self.pool.view(-1, _NOISE_BYTES).copy_(sound_noise(_NOISE_BYTES).to(gpu.device))
        self._target = torch.empty_like(self.pool)

    def read_gbps(self) -> float:
        """GB/s of a sum over all bytes."""
        numbers = self.pool.view(torch.float32)
        rate = timed_gbps(numbers.sum, self.pool.nbytes, self._gpu.synchronize)
        self.reads_gbps.append(rate)
        return rate

    def copy_gbps(self) -> float:
        """GB copied a second; each of them is read once and written once."""
        rate = timed_gbps(
            lambda: self._target.copy_(self.pool), self.pool.nbytes, self._gpu.synchronize
        )
        self.copies_gbps.append(rate)
        return rate


class GpuRates:
    """Samples of one GPU."""

    def __init__(self, gpu: GpuDevice, sizes: GpuSizes) -> None:
        self._gpu = gpu
        self._memory = GpuMemoryRate(gpu, _pool_bytes(gpu, sizes))
        products = torch_products(_ROWS, num_inputs=sizes.weight_shape[1], device=gpu.device)
        self._matmul = MatmulRates(
            self._memory,
            products,
            weight_shape=sizes.weight_shape,
            calls_per_wait=8,
            synchronize=gpu.synchronize,
        )
        self._on_gpu = torch.empty(sizes.link_bytes, dtype=torch.uint8, device=gpu.device)
        self._hosts = {
            "pinned": gpu.pinned(sizes.link_bytes),
            "pageable": torch.empty(sizes.link_bytes, dtype=torch.uint8),
        }
        for host in self._hosts.values():
            host.zero_()  # pages are there before they are timed
        self._links: dict[str, list[float]] = defaultdict(list)
        self._pcie: tuple[int | None, int | None] = (None, None)

    def warm_up(self) -> None:
        """The first copy and the first product of a shape set things up."""
        self._on_gpu.copy_(self._hosts["pinned"], non_blocking=True)
        self._matmul.warm_up()
        self._gpu.synchronize()

    def sample(self) -> None:
        """One sample of everything."""
        for kind, host in self._hosts.items():
            self._sample_copy(f"{kind}_to_gpu_gbps", self._on_gpu, host)
            self._sample_copy(f"gpu_to_{kind}_gbps", host, self._on_gpu)
        if self._gpu.facts is not None:
            self._pcie = self._gpu.facts.pcie_link()  # while the link is awake
        self._memory.copy_gbps()
        self._matmul.sample()

    def _sample_copy(self, name: str, target: torch.Tensor, source: torch.Tensor) -> None:
        rate = timed_gbps(
            lambda: target.copy_(source, non_blocking=True), source.nbytes, self._gpu.synchronize
        )
        self._links[name].append(rate)

    def result(self) -> Gpu:
        """Facts, medians and quartiles of the samples so far."""
        facts = self._gpu.facts
        rates: dict[str, Any] = {}
        for name, samples in self._rates().items():
            spread = Spread.of(samples)
            rates[name] = rounded(spread.median)
            rates[f"{name}_quartiles"] = rounded_quartiles(spread)
        return Gpu(
            name=self._gpu.name,
            memory_bytes=self._gpu.memory_bytes,
            compute_capability=self._gpu.compute_capability,
            multiprocessors=self._gpu.multiprocessors,
            sm_clock_mhz=None if facts is None else facts.sm_clock_mhz,
            memory_clock_mhz=None if facts is None else facts.memory_clock_mhz,
            pcie_generation=self._pcie[0],
            pcie_width=self._pcie[1],
            power_limit_watts=None if facts is None else facts.power_limit_watts,
            matmul=self._matmul.result(),
            **rates,
        )

    def _rates(self) -> dict[str, list[float]]:
        """Samples by the field of Gpu that they become."""
        return {
            "memory_read_gbps": self._memory.reads_gbps,
            "memory_copy_gbps": self._memory.copies_gbps,
            **self._links,
        }

    def samples(self) -> dict[str, list[float]]:
        """Every sample in its order, GB/s, by a name that says what it is of."""
        own = {**self._rates(), **self._matmul.samples()}
        return {f"{self._gpu.device} {name}": samples for name, samples in own.items()}


def _pool_bytes(gpu: GpuDevice, sizes: GpuSizes) -> int:
    """How much to read and copy: what is usual, or a quarter of what others have left free."""
    num_bytes = min(sizes.pool_bytes, gpu.free_bytes // 4)
    least_bytes = max(_NOISE_BYTES, math.prod(sizes.weight_shape) * torch.float32.itemsize)
    if num_bytes < least_bytes:
        raise ProbeError(
            f"{gpu.device} ({gpu.name}) has {format_bytes(gpu.free_bytes)} free and the probe "
            f"needs {format_bytes(4 * least_bytes)}; end what uses it, or hide it with "
            "CUDA_VISIBLE_DEVICES"
        )
    return num_bytes


def timed_gbps(
    work: Callable[[], object], num_bytes: int, synchronize: Callable[[], None]
) -> float:
    """GB/s of `work`, which starts something that moves `num_bytes`."""
    synchronize()  # sync: what was started before is not of this measurement
    start = time.perf_counter()
    work()
    synchronize()  # sync: the clock must not stop before the work does
    return num_bytes / (time.perf_counter() - start) / 1e9
