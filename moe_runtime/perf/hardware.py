"""The hardware file: what one machine can do, measured by `moe-runtime probe`.

Rates are medians; `*_quartiles` are the first and third quartile of the same samples, absent where
a datasheet is the source. GB are decimal.
"""

from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from moe_runtime.config import Plausible, load_config, parse_config, plain_config, save_config

_REMEDY = "measure again with moe-runtime probe"

Count = Annotated[int, Plausible(1, 1_000_000)]
Bytes = Annotated[int, Plausible(1, 2**60, "bytes")]
DiskGbps = Annotated[float, Plausible(0.0001, 1000, "GB/s")]
MemoryGbps = Annotated[float, Plausible(0.1, 20_000, "GB/s")]
LinkGbps = Annotated[float, Plausible(0.01, 2000, "GB/s")]
# Slow kernels at many rows stream weights far below any memory's rate.
WeightsGbps = Annotated[float, Plausible(0.00001, 20_000, "GB/s")]
Gflops = Annotated[float, Plausible(0.001, 100_000_000, "GFLOP/s")]
Share = Annotated[float, Plausible(0, 10)]
PartialShare = Annotated[float, Plausible(0.01, 1)]
Cores = Annotated[float, Plausible(0, 1_000_000, "cores")]
Megahertz = Annotated[int, Plausible(1, 100_000, "MHz")]
Nanoseconds = Annotated[float, Plausible(1, 1_000_000, "ns")]
Watts = Annotated[float, Plausible(1, 100_000, "W")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What ran the measurement. `others_cores`: cores that other programs kept busy meanwhile."""

    operating_system: str
    python: str
    torch: str
    moe_runtime: str
    nvidia_driver: str | None = None
    others_cores: Cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor. `threads` computed and read memory; `isa` are the vector instructions.

    `operator_nanoseconds`: of one small operator from Python, which a step's software is made of.
    """

    model: str
    physical_cores: Count
    threads: Count
    isa: tuple[str, ...]
    operator_nanoseconds: Nanoseconds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of the CPU. `available_bytes` heeds control groups.

    `copy_gbps` counts each copied byte once, although it is read and written.
    """

    total_bytes: Bytes
    available_bytes: Bytes
    read_gbps: MemoryGbps
    read_gbps_quartiles: tuple[MemoryGbps, MemoryGbps] | None = None
    copy_gbps: MemoryGbps
    copy_gbps_quartiles: tuple[MemoryGbps, MemoryGbps] | None = None

    def __post_init__(self) -> None:
        _check_quartiles(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRate:
    """`rows` rows of input times weights that no cache holds.

    `share_of_read` is the rate at which the weights are read over that at which the same memory is
    read by a plain loop within the same second: more telling than a ratio of two medians.
    """

    dtype: Literal["float32", "bfloat16", "float16"]
    kernel: str
    rows: Count
    weights_gbps: WeightsGbps
    weights_gbps_quartiles: tuple[WeightsGbps, WeightsGbps] | None = None
    gflops: Gflops
    share_of_read: Share | None = None

    def __post_init__(self) -> None:
        _check_quartiles(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matmul:
    """Rates of `x W^T` with weights `W` of `weight_shape` = (outputs, inputs)."""

    weight_shape: tuple[Count, Count]
    rates: tuple[MatmulRate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRate:
    """Reads of `block_bytes` at random places with `depth` of them under way at any time."""

    block_bytes: Bytes
    depth: Count
    gbps: DiskGbps
    gbps_quartiles: tuple[DiskGbps, DiskGbps] | None = None

    def __post_init__(self) -> None:
        _check_quartiles(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideCompute:
    """What is left of the disk's rate to one read at a time, and of computing, when both go on."""

    read_share: PartialShare
    compute_share: PartialShare


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One file system. `direct`: O_DIRECT was used; else pages were dropped from the page cache."""

    file_system: str
    direct: bool
    read_from: str
    reads: tuple[ReadRate, ...]
    beside_compute: BesideCompute | None = None

    def __post_init__(self) -> None:
        if not self.reads:
            raise ValueError("reads is empty")

    @property
    def best(self) -> ReadRate:
        """The request size and depth with the highest rate."""
        return max(self.reads, key=lambda read: read.gbps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. Facts that the driver does not tell are None, and so are rates not measured.

    `memory_copy_gbps` counts each copied byte once. Links are one way at a time.
    """

    name: str
    memory_bytes: Bytes
    compute_capability: str
    multiprocessors: Count | None = None
    sm_clock_mhz: Megahertz | None = None
    memory_clock_mhz: Megahertz | None = None
    pcie_generation: Annotated[int, Plausible(1, 10)] | None = None
    pcie_width: Annotated[int, Plausible(1, 64, "lanes")] | None = None
    power_limit_watts: Watts | None = None
    memory_read_gbps: MemoryGbps | None = None
    memory_read_gbps_quartiles: tuple[MemoryGbps, MemoryGbps] | None = None
    memory_copy_gbps: MemoryGbps | None = None
    memory_copy_gbps_quartiles: tuple[MemoryGbps, MemoryGbps] | None = None
    pinned_to_gpu_gbps: LinkGbps | None = None
    pinned_to_gpu_gbps_quartiles: tuple[LinkGbps, LinkGbps] | None = None
    gpu_to_pinned_gbps: LinkGbps | None = None
    gpu_to_pinned_gbps_quartiles: tuple[LinkGbps, LinkGbps] | None = None
    pageable_to_gpu_gbps: LinkGbps | None = None
    pageable_to_gpu_gbps_quartiles: tuple[LinkGbps, LinkGbps] | None = None
    gpu_to_pageable_gbps: LinkGbps | None = None
    gpu_to_pageable_gbps_quartiles: tuple[LinkGbps, LinkGbps] | None = None
    matmul: Matmul | None = None

    def __post_init__(self) -> None:
        _check_quartiles(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine: what a cost model has to know of it."""

    source: Literal["measured", "datasheet"]
    measured_on: date | None = None
    url: str | None = None
    software: Software | None = None
    cpu: Cpu
    memory: Memory
    matmul: Matmul | None = None
    disk: Disk | None = None
    gpus: tuple[Gpu, ...]

    def __post_init__(self) -> None:
        if self.source == "measured" and (self.measured_on is None or self.software is None):
            raise ValueError("source is measured, so measured_on and software must be there")
        if self.source == "datasheet" and self.url is None:
            raise ValueError("source is datasheet, so its url must be there")

    @classmethod
    def load(cls, path: Path) -> "Hardware":
        """Read a hardware file. Raises ConfigError naming the field, its value and the range."""
        return load_config(cls, path, remedy=_REMEDY)

    def save(self, path: Path) -> None:
        """Write what `load` reads back as an equal object. Raises ConfigError."""
        parse_config(Hardware, self.as_dict(), source="this measurement", remedy=_REMEDY)
        save_config(self, path, heading="A machine, as `moe-runtime probe` writes it.")

    def as_dict(self) -> dict[str, object]:
        """Mappings, lists and scalars; what is None is left out."""
        return plain_config(self)


def _check_quartiles(rates: object) -> None:
    """Every `x_quartiles` holds its `x` between its two ends."""
    for field in fields(rates):  # type: ignore[arg-type]
        quartiles = getattr(rates, field.name) if field.name.endswith("_quartiles") else None
        if quartiles is None:
            continue
        name = field.name.removesuffix("_quartiles")
        value, (low, high) = getattr(rates, name), quartiles
        if value is None or not low <= value <= high:
            raise ValueError(f"{name} ({value}) is outside its quartiles ({low} to {high})")
