"""The rates of one machine that a latency model reads, drawn from its hardware file."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from moe_runtime.perf.hardware import Disk, Gpu, Hardware, Matmul

_GIGA = 1e9
_DTYPES = {2: ("bfloat16", "float16"), 4: ("float32",)}
# Share of the plain read rate that a product of one row reaches where none was measured; of peak
# arithmetic that large products reach where only a datasheet tells it.
_UNMEASURED_SHARE = 0.8
_DATASHEET_SHARE = 0.6
_KERNELS = ("gemv", "experts")  # of ours, as they end in a hardware file
# Operations a second for each core where no product was measured: 16 lanes, 2 operations, 2 GHz.
_CORE_FLOPS = 64e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Products of some rows with weights that no cache holds: bytes of weights a second, by rows.

    Between rows that were measured, seconds a byte are read off a straight line; beyond the last,
    arithmetic is the limit and seconds grow with the rows.
    """

    rows: tuple[float, ...]
    bytes_per_second: tuple[float, ...]

    def seconds(self, weight_bytes: float, rows: float) -> float:
        """To multiply so many rows with weights of so many bytes."""
        per_byte = 1 / np.asarray(self.bytes_per_second)
        last = self.rows[-1]
        found = float(np.interp(rows, self.rows, per_byte))
        return weight_bytes * found * max(1.0, rows / last)

    def flops(self, value_bytes: int) -> float:
        """Operations a second at the most rows: two for each weight and row."""
        return 2 * self.rows[-1] * self.bytes_per_second[-1] / value_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes and operations a second. `link` is None where experts are computed on the CPU.

    `linear` are torch's products, `kernel` those of the experts' kernel. `copy` counts each byte
    once. `memory` is where experts are computed, `host` the CPU's. `operator_seconds` is of one
    small operator from Python, where it was measured.
    """

    linear: Products
    kernel: Products
    memory_bytes_per_second: float
    copy_bytes_per_second: float
    host_bytes_per_second: float
    host_products: Products
    disk_bytes_per_second: float | None
    link_bytes_per_second: float | None
    operator_seconds: float | None = None

    @classmethod
    def of(cls, hardware: Hardware, *, value_bytes: int, read_bytes: int | None = None) -> Self:
        """Of the machine's first GPU if it has one, else of its CPU.

        The disk's rate is that of reads of about `read_bytes`, or the best of all.
        """
        memory = hardware.memory
        gpu = hardware.gpus[0] if hardware.gpus else None
        read = memory.read_gbps * _GIGA
        cores = hardware.cpu.physical_cores
        host_linear, host_kernel = _products(
            hardware.matmul, read, cores * _CORE_FLOPS, value_bytes
        )
        disk = None if hardware.disk is None else _disk_gbps(hardware.disk, read_bytes) * _GIGA
        nanoseconds = hardware.cpu.operator_nanoseconds
        operator = None if nanoseconds is None else nanoseconds / _GIGA
        if gpu is None:
            return cls(
                linear=host_linear,
                kernel=host_kernel,
                memory_bytes_per_second=read,
                copy_bytes_per_second=memory.copy_gbps * _GIGA,
                host_bytes_per_second=read,
                host_products=host_kernel,
                disk_bytes_per_second=disk,
                link_bytes_per_second=None,
                operator_seconds=operator,
            )
        gpu_read = _gpu_read(gpu)
        linear, kernel = _products(gpu.matmul, gpu_read, 100 * gpu_read, value_bytes)
        link = gpu.pinned_to_gpu_gbps
        return cls(
            linear=linear,
            kernel=kernel,
            memory_bytes_per_second=gpu_read,
            copy_bytes_per_second=(gpu.memory_copy_gbps or gpu_read / _GIGA / 2) * _GIGA,
            host_bytes_per_second=read,
            host_products=host_kernel,
            disk_bytes_per_second=disk,
            link_bytes_per_second=(memory.copy_gbps if link is None else link) * _GIGA,
            operator_seconds=operator,
        )


def _disk_gbps(disk: Disk, read_bytes: int | None) -> float:
    """The highest of the block size nearest to `read_bytes`, by ratio."""
    if read_bytes is None:
        return disk.best.gbps
    nearest = min(
        (read.block_bytes for read in disk.reads),
        key=lambda size: abs(math.log(size / read_bytes)),
    )
    return max(read.gbps for read in disk.reads if read.block_bytes == nearest)


def _gpu_read(gpu: Gpu) -> float:
    """Where not measured, of memory clock and bus nothing is known: a copy reads and writes."""
    if gpu.memory_read_gbps is not None:
        return gpu.memory_read_gbps * _GIGA
    if gpu.memory_copy_gbps is not None:
        return 2 * gpu.memory_copy_gbps * _GIGA
    return 200 * _GIGA


def _products(
    matmul: Matmul | None, read: float, peak_flops: float, value_bytes: int
) -> tuple[Products, Products]:
    """Of torch and of the experts' kernel; from the plain read rate where nothing was measured."""
    found: dict[str, dict[float, float]] = {"torch": {}, "kernel": {}}
    for rate in () if matmul is None else matmul.rates:
        if rate.dtype not in _DTYPES[value_bytes] or rate.dtype == "float16":
            continue
        share = _DATASHEET_SHARE if rate.kernel == "datasheet" else 1.0
        kind = "kernel" if rate.kernel.endswith(_KERNELS) else "torch"
        speed = share * rate.weights_gbps * _GIGA
        found[kind][rate.rows] = max(speed, found[kind].get(rate.rows, 0.0))
    linear = found["torch"]
    if not linear:
        # Rows at which arithmetic takes as long as reading the weights.
        knee = max(2.0, peak_flops * value_bytes / 2 / read)
        linear = {1.0: _UNMEASURED_SHARE * read, knee: _UNMEASURED_SHARE * read}
    elif min(linear) > 1:  # a datasheet tells the peak alone
        rows, speed = min(linear.items())
        knee = max(2.0, rows * speed / (_UNMEASURED_SHARE * read))
        linear = {1.0: _UNMEASURED_SHARE * read, knee: _UNMEASURED_SHARE * read}
    kernel = {**linear}
    for rows, speed in found["kernel"].items():
        kernel[rows] = max(speed, kernel.get(rows, 0.0))
    return _sorted(linear), _sorted(kernel)


def _sorted(speeds: dict[float, float]) -> Products:
    rows = sorted(speeds)
    return Products(
        rows=tuple(float(row) for row in rows),
        bytes_per_second=tuple(speeds[row] for row in rows),
    )
